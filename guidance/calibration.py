"""Calibration: how the predictions of a model under full guidance correlate, and estimates fitted to that.

Write a run of T steps as the 2T vectors p = (c_0 .. c_{T-1}, d_0 .. d_{T-1}): its conditional predictions, and
d = c - u. A calibration keeps the sum of all their inner products over many runs, but none of the runs:

    G = sum of p p^T        (2T x 2T)

For any choice of evaluations, G gives the least-squares estimates of the skipped predictions (LinearAG,
arXiv 2312.12487, section 5). With R the predictions known at that step, and t the wanted one:

    estimate = w . p_R        w = (G_RR + ridge diag G_RR)^-1 G_Rt

Such matrices add up, so several machines may each calibrate a share. A calibration also keeps how the denoised
predictions move (`motion.py`), which depends on neither the scheduler nor the number of steps.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from diffusers_guidance import hub, samples
from diffusers_guidance.checks import is_number, plain_fields
from diffusers_guidance.errors import CalibrationMismatch
from diffusers_guidance.files import write
from diffusers_guidance.motion import Motion, merged
from diffusers_guidance.spaces import Space
from diffusers_guidance.steps import Action

FORMAT = "diffusers-guidance calibration 2"
READ = (FORMAT, "diffusers-guidance calibration 1")
"""The formats that `load` reads; the first one has no motions."""
_MODEL = ("pipeline", "denoisers")
"""The parts of a setting on which a motion depends."""


@dataclass(frozen=True)
class Fit:
    """How a skipped prediction is estimated.

    Args:
        regressors: "all" predictions evaluated so far, as in the paper; or "recent": the predictions of the last two
            steps evaluated in full, and the current conditional one.
        target: "delta"; or "uncond" as in the paper, where u also replaces d among the regressors. Since c_t is a
            regressor of d_t, both span the same estimates. Only the ridge shrinks different things.
        ridge: relative to the regressors' own squares.
        per_channel: separate coefficients for each channel; the calibration must be made with `per_channel`.
    """

    regressors: Literal["all", "recent"] = "all"
    target: Literal["delta", "uncond"] = "delta"
    ridge: float = 1e-6
    per_channel: bool = False

    def __post_init__(self) -> None:
        plain_fields(self)
        if self.regressors not in ("all", "recent"):
            raise ValueError(f'regressors={self.regressors!r}: "all" or "recent"')
        if self.target not in ("delta", "uncond"):
            raise ValueError(f'target={self.target!r}: "delta" or "uncond"')
        if not is_number(self.ridge, 0):
            raise ValueError(f"ridge={self.ridge!r}: 0 or a small positive number")


DELTAS = Fit()
RECENT = Fit("recent")
"""The fit of schedules that repay."""
UNCONDS = Fit(target="uncond")
"""The published fit of LinearAG."""


def combinations(gram: Tensor, actions: Sequence[str], fit: Fit = DELTAS) -> Tensor:
    """The c_t and d_t that each step guides with, as combinations of the predictions of the run.

    Args:
        gram: (2T, 2T), or (C, 2T, 2T) for separate channels; float64.
        actions: T of "both", "conditional", "extrapolate", "neither".
        fit: how missing predictions are estimated.

    Returns:
        (2T, 2T) or (C, 2T, 2T) coefficients: the rows make c_0 .. c_{T-1}, d_0 .. d_{T-1} from the same, as columns.
    """
    steps = len(actions)
    unit = torch.eye(2 * steps, dtype=gram.dtype)
    c, d = unit[:steps], unit[steps:]
    other = d if fit.target == "delta" else c - d
    made = unit.expand(gram.shape).clone()
    for t, action in enumerate(actions):
        if action == Action.BOTH:
            continue
        full = [i for i in range(t) if actions[i] == Action.BOTH]
        conds = [i for i in range(t) if actions[i] != Action.NEITHER]
        if fit.regressors == "recent":
            full = conds = full[-2:]
        if action == Action.NEITHER:
            made[..., t, :] = least_squares(gram, torch.cat([c[conds], other[full]]), c[t], fit.ridge)
        else:
            conds = [*conds, t]
        if action == Action.CONDITIONAL:
            made[..., steps + t, :] = 0
            continue
        estimate = least_squares(gram, torch.cat([c[conds], other[full]]), other[t], fit.ridge)
        made[..., steps + t, :] = estimate if fit.target == "delta" else made[..., t, :] - estimate
    return made


def repayments(
    gram: Tensor, actions: Sequence[str], gain: Sequence[float], w: float | Tensor, fit: Fit = RECENT
) -> tuple[Tensor, Tensor]:
    """What each step that evaluates both adds to its guided prediction, and the errors that remain.

    A step without an evaluation is handed g_t + e_t in place of g_t = c_t + (w - 1) d_t. Errors of neighbouring steps
    move the picture the same way, so their sum counts, each times its step's gain. The next step i that evaluates both
    knows more. It adds the s closest to the debt,

        gain_i s = - sum of gain_t e_t over the steps t since the last step that evaluated both

    by least squares on all predictions evaluated so far. If the fit is "recent", it uses only those of the last three
    steps evaluated in full.

    Args:
        gram, actions, fit: as for `combinations`.
        gain: (T,), of each step.
        w: the guidance scale, or (T, 1), that of each step.

    Returns:
        (C, T, 2T) combinations of the run's predictions, zero where nothing is added. And (C, N, 2T): the sum that
        remains in each of the N stretches between such steps.
    """
    steps = len(actions)
    unit = torch.eye(2 * steps, dtype=gram.dtype)
    off = combinations(gram, actions, fit) - unit
    errors = off[..., :steps, :] + (w - 1) * off[..., steps:, :]  # (C, T, 2T)
    added, left, owed = torch.zeros_like(errors), [], torch.zeros_like(errors[..., 0, :])
    for t, action in enumerate(actions):
        if action != Action.BOTH:
            owed = owed + gain[t] * errors[..., t, :]
            continue
        if gain[t] > 0 and bool(owed.any()):
            full = [i for i in range(t + 1) if actions[i] == Action.BOTH]
            full = full[-3:] if fit.regressors == "recent" else full
            known = torch.cat([unit[full], unit[[steps + i for i in full]]])
            added[..., t, :] = least_squares(gram, known, -owed / gain[t], fit.ridge)
            owed = owed + gain[t] * added[..., t, :]
        left.append(owed)
        owed = torch.zeros_like(owed)
    return added, torch.stack([*left, owed], -2)


def least_squares(gram: Tensor, regressors: Tensor, target: Tensor, ridge: float) -> Tensor:
    """(..., 2T) the combination of `regressors` (k, 2T) closest to `target` (..., 2T) by `gram` (..., 2T, 2T)."""
    products = regressors @ gram  # (..., k, 2T)
    normal, right = products @ regressors.T, (products @ target[..., None])[..., 0]
    squares = normal.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(squares > 0, squares, 1).rsqrt()
    normal = normal * scale[..., None] * scale[..., None, :] + ridge * torch.eye(len(regressors), dtype=gram.dtype)
    weights = torch.linalg.lstsq(normal, (right * scale)[..., None], driver="gelsd").solution[..., 0]
    return (weights * scale) @ regressors


@dataclass(frozen=True, eq=False)
class Moments:
    """Inner products of one denoiser's predictions over all trajectories, T of its evaluations in each."""

    first: int
    """The step of the run at which this denoiser is evaluated first."""
    gram: Tensor
    """(C, 2T, 2T) float64: sums of inner products of (c_0 .., d_0 ..) for each channel; C is 1 if channels are not
    split."""
    similarity: dict[str, Tensor]
    """For each space, "denoised" and "noise": (trajectories, T) float32 cosines of both predictions, NaN where
    unknown."""

    @property
    def steps(self) -> int:
        return self.gram.shape[-1] // 2

    @property
    def total(self) -> Tensor:
        """(2T, 2T), over all channels."""
        return self.gram.sum(0)

    def __add__(self, other: "Moments") -> "Moments":
        if self.first != other.first or self.gram.shape != other.gram.shape:
            raise CalibrationMismatch(
                f"Gram matrices {tuple(self.gram.shape)} from step {self.first} on, and {tuple(other.gram.shape)} from "
                f"step {other.first} on, do not add up: calibrate both shares with the same settings"
            )
        both = {space: torch.cat([seen, other.similarity[space]]) for space, seen in self.similarity.items()}
        return Moments(self.first, self.gram + other.gram, both)


@dataclass(frozen=True, eq=False)
class Calibration:
    """What was measured about a model, and in which setting. `save` and `load` keep it in a file of kilobytes.

    It has two parts. Its `motions` serve `Forecast`, with any scheduler, number of steps, scale and size of the model.
    The moments of its `denoisers` serve `LinearAG`, `Schedule` and `search`, in the setting in which they were
    measured. `calibrate` measures both. `Forecast(learn=True)` measures motions only.

    Two calibrations of the same setting add up: `calibrate(..., share=(0, 2)) + calibrate(..., share=(1, 2))`. For
    different settings only their `portable` parts add up.
    """

    setting: dict[str, Any]
    """Plain JSON: the pipeline and its denoisers' fingerprints. With moments also the scheduler's fingerprint,
    timesteps, each denoiser's guidance scale, `gains`, and the arguments of `calibrate`."""
    denoisers: dict[str, Moments]
    """The moments of each denoiser, by its name in the pipeline."""
    prompts: dict[str, int]
    """The number of trajectories with each negative prompt."""
    motions: tuple[Motion, ...] = ()
    """How the predictions of whole runs move; one for each set of noise levels and scale."""
    source: str = ""
    """The file, folder or repository it comes from."""

    @property
    def trajectories(self) -> int:
        return sum(self.prompts.values())

    @property
    def steps(self) -> int:
        """Evaluations of a whole run."""
        self._need_moments()
        return len(self.setting["timesteps"])

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that identify its matrices, to be noted beside results that were made with it."""
        measured = [m.gram for m in self.denoisers.values()] or [m.variograms for m in self.motions]
        return hashlib.sha256(b"".join(numbers.numpy().tobytes() for numbers in measured)).hexdigest()[:16]

    @property
    def portable(self) -> "Calibration":
        """The part that serves `Forecast`. Such parts add up, whatever their scheduler, steps and scale."""
        setting = {name: self.setting[name] for name in _MODEL if name in self.setting}
        return Calibration(setting, {}, {}, self.motions, self.source)

    def weights(self, denoiser: str, fit: Fit = DELTAS) -> Tensor:
        """(C, 2T, 2T) Gram matrices for the coefficients of `fit`: one for each channel, or one for all.

        Raises:
            CalibrationMismatch: it does not tell channels apart.
        """
        moments = self.moments(denoiser)
        if fit.per_channel and len(moments.gram) == 1:
            raise CalibrationMismatch(f"{self!r} does not tell channels apart: calibrate with per_channel=True")
        return moments.gram if fit.per_channel else moments.total[None]

    @property
    def call(self) -> dict[str, Any]:
        """The `num_inference_steps` and `guidance_scale` of the pipeline's call.

        A two-stage solver makes more evaluations than that, and the scale of some pipelines is one less than w.
        """
        self._need_moments()
        return {name: self.setting["calibrated"][name] for name in ("num_inference_steps", "guidance_scale")}

    @property
    def gains(self) -> Tensor:
        """(steps,) float64: how much an error of each step's prediction moves the sample; see `gains`."""
        self._need_moments()
        return torch.tensor(self.setting["gains"], dtype=torch.float64)

    def _need_moments(self) -> None:
        if not self.denoisers:
            raise CalibrationMismatch(
                f"{self!r} says how predictions move, and serves Forecast alone: make one with calibrate(pipe, prompts)"
            )

    def __add__(self, other: "Calibration") -> "Calibration":
        motions = merged([*self.motions, *other.motions])
        if not (self.denoisers and other.denoisers):
            whole, part = (self, other) if self.denoisers else (other, self)
            whole.check({name: part.setting[name] for name in _MODEL if name in part.setting})
            # If a pipeline has two denoisers, its runs may have used one or both.
            known = part.setting.get("denoisers", {}) | whole.setting.get("denoisers", {})
            return Calibration(whole.setting | {"denoisers": known}, whole.denoisers, whole.prompts, motions)
        setting = self.setting
        made, more = (each.get("calibrated", {}) for each in (self.setting, other.setting))
        if made.get("share") != more.get("share"):
            setting = setting | {"calibrated": {key: value for key, value in made.items() if key != "share"}}
        other.check(setting)
        if self.denoisers.keys() != other.denoisers.keys():
            raise CalibrationMismatch(f"one has the denoisers {[*self.denoisers]}, the other {[*other.denoisers]}")
        denoisers = {name: moments + other.denoisers[name] for name, moments in self.denoisers.items()}
        texts = {**self.prompts, **other.prompts}
        prompts = {text: self.prompts.get(text, 0) + other.prompts.get(text, 0) for text in texts}
        return Calibration(setting, denoisers, prompts, motions)

    def __repr__(self) -> str:
        s, source = self.setting, f", from {self.source!r}" if self.source else ""
        if not self.denoisers:
            each = [f"{m.runs} at {len(m.levels)} levels and scale {m.scale:g}" for m in self.motions]
            return f"Calibration({s.get('pipeline', '')}, runs: {', '.join(each)}{source})"
        runs = [w if isinstance(w, list) else [w] for w in s["guidance_scale"].values()]
        scales = "/".join(dict.fromkeys("..".join(f"{w:g}" for w in dict.fromkeys([ws[0], ws[-1]])) for ws in runs))
        return (
            f"Calibration({s['pipeline']}, {s['scheduler']['class']}, {self.steps} steps, "
            f"guidance_scale={scales}, {self.trajectories} trajectories{source})"
        )

    def __hash__(self) -> int:
        return id(self)

    def moments(self, denoiser: str) -> Moments:
        """The moments of a denoiser by its name; without a name, the only ones."""
        self._need_moments()
        if not denoiser and len(self.denoisers) == 1:
            return next(iter(self.denoisers.values()))
        if denoiser not in self.denoisers:
            raise CalibrationMismatch(f"calibrated for {', '.join(self.denoisers)}; the run uses {denoiser!r}")
        return self.denoisers[denoiser]

    def similarity(self, space: str) -> Tensor:
        """(trajectories, steps) cosines of both predictions in "denoised" or "noise" space, NaN where unknown."""
        curves = torch.full((self.trajectories, self.steps), torch.nan)
        for moments in self.denoisers.values():
            curves[:, moments.first : moments.first + moments.steps] = moments.similarity[space]
        return curves

    def threshold(self, save: float, space: str | None = None) -> tuple[float, str]:
        """(threshold, space) with which Adaptive Guidance saves the share `save` of the NFEs on average.

        Default space: the one in which the later of two steps most often has the higher similarity.
        """
        if not 0 <= save < 0.5:
            raise ValueError(f"save={save!r}: a share of the NFEs from 0 to below 0.5")
        spaces = ("denoised", "noise") if space is None else (space,)
        curves = {name: self.similarity(name) for name in spaces}
        pairs = torch.triu_indices(self.steps, self.steps, 1)

        def rises(name: str) -> float:
            return float((curves[name][:, pairs[1]] > curves[name][:, pairs[0]]).double().mean())

        space = max(spaces, key=rises)
        seen = curves[space]
        if seen.isnan().all():
            raise CalibrationMismatch(f"{self!r} has no similarities: its predictions could not be denoised")
        # A run whose running maximum first reaches the threshold at step i evaluates i + 1 steps in full.
        highest = seen.nan_to_num(-1).cummax(1).values
        candidates = highest.flatten().clamp(1e-6, 1).unique()
        # It then saves an evaluation at each later step, except at a new denoiser's first step, which is evaluated in
        # full.
        firsts = {moments.first for moments in self.denoisers.values()}
        later = [t - 1 for t in range(1, self.steps) if t not in firsts]
        maxima = highest[:, later].flatten().sort().values
        reaching = len(maxima) - torch.searchsorted(maxima, candidates)
        saved = reaching.double() / len(highest) / (2 * self.steps)
        return float(candidates[(saved - save).abs().argmin()]), space

    def coefficients(self, denoiser: str, actions: Sequence[str], fit: Fit = DELTAS) -> Tensor:
        """(C, 2T, 2T) `combinations` for a denoiser's own T steps, from the `actions` of a whole run."""
        return _coefficients(self, denoiser, tuple(actions), fit)

    def repayments(self, denoiser: str, actions: Sequence[str], fit: Fit = RECENT) -> tuple[Tensor, Tensor]:
        """`repayments` for a denoiser's own T steps, from the `actions` of a whole run."""
        return _repayments(self, denoiser, tuple(actions), fit)

    def check(self, setting: dict[str, Any]) -> None:
        """Refuses a run whose `setting` differs in a value that both have; the error names the difference."""
        found = list(_differences(self.setting, setting, ""))
        if found:
            raise CalibrationMismatch(
                f"{self!r} was made for another setting than this run's: {'; '.join(found)}. "
                "Calibrate for this setting, or use the one it was made for."
            )

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, all at once or not at all."""
        tensors = {}
        for name, moments in self.denoisers.items():
            tensors[f"{name}.gram"] = moments.gram.contiguous()
            tensors |= {f"{name}.{space}": seen.contiguous() for space, seen in moments.similarity.items()}
        for i, motion in enumerate(self.motions):
            tensors[f"motion {i} levels"] = motion.levels.contiguous()
            tensors[f"motion {i}"] = motion.variograms.contiguous()
        first = {name: moments.first for name, moments in self.denoisers.items()}
        motions = [{"scale": motion.scale, "runs": motion.runs} for motion in self.motions]
        about = {"setting": self.setting, "first": first, "prompts": self.prompts, "motions": motions}
        described = json.dumps(about, allow_nan=False)
        write(Path(path), serialize(tensors, {"format": FORMAT, "calibration": described}))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a folder with the files that `push_to_hub` puts into a repository: the calibration and its card."""
        hub.keep(self, folder)

    def push_to_hub(self, name: str, *, private: bool | None = None, token: str | bool | None = None) -> str:
        """Puts it into a repository on the Hub, with a card. Creates the repository if there is none.

        Args:
            name: the repository's, as "owner/name".
            private: whether a new repository is private. Default: the owner's own default.
            token: of a user who may write there. Default: that of the logged-in user.

        Returns:
            The address of the repository.
        """
        return hub.push(self, name, private, token)

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> "Calibration":
        """Reads one from a folder, a file, or a repository on the Hub ("owner/name"), which is downloaded once.

        Args:
            options: for `huggingface_hub.hf_hub_download`, such as `revision`, `token` and `local_files_only`.

        Raises:
            FileNotFoundError: there is none.
            CalibrationMismatch: not a calibration, or one of another version.
        """
        return replace(cls.load(hub.found(name, **options)), source=str(name))

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Reads a file that `save` wrote.

        Args:
            path: the file, or the name of a bundled model's calibration, such as "dpm-20-5".

        Raises:
            FileNotFoundError: the file does not exist.
            CalibrationMismatch: it is not a calibration, or has another version.
        """
        path = Path(path)
        if not path.is_file() and path.name == str(path):
            bundled = samples.CALIBRATIONS / f"{path}.safetensors"
            path = bundled if bundled.is_file() else path
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such calibration; make one with calibrate(pipe, prompts, path=...)")
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise CalibrationMismatch(f"{path} is not a safetensors file ({error})") from error
        if about.get("format") not in READ:
            raise CalibrationMismatch(f"{path} has the format {about.get('format')!r}, not {FORMAT!r}: calibrate anew")
        try:
            return cls._of(json.loads(about["calibration"]), tensors, str(path))
        except (KeyError, TypeError, AttributeError) as error:
            raise CalibrationMismatch(f"{path} is damaged: {error!r} is missing or not what it should be") from error

    @classmethod
    def _of(cls, described: dict[str, Any], tensors: dict[str, Tensor], path: str) -> "Calibration":
        """The calibration in a file."""
        denoisers = {
            name: Moments(
                first,
                tensors[f"{name}.gram"],
                {space: tensors[f"{name}.{space}"] for space in ("denoised", "noise")},
            )
            for name, first in described["first"].items()
        }
        total = len(described["setting"].get("timesteps", ()))
        for name, moments in denoisers.items():
            square = moments.gram.ndim == 3 and moments.gram.shape[1] == moments.gram.shape[2] == 2 * moments.steps
            if not (square and moments.first + moments.steps <= total and moments.gram.isfinite().all()):
                raise CalibrationMismatch(
                    f"{path} is damaged: the Gram matrices {tuple(moments.gram.shape)} of {name} are not those of "
                    f"{total} timesteps, or not finite. Calibrate anew"
                )
        motions = tuple(
            Motion(tensors[f"motion {i} levels"], tensors[f"motion {i}"], float(each["scale"]), each["runs"])
            for i, each in enumerate(described.get("motions", ()))
        )
        for motion in motions:
            if not motion.is_sound:
                raise CalibrationMismatch(
                    f"{path} is damaged: the variograms {tuple(motion.variograms.shape)} are not those of "
                    f"{len(motion.levels)} noise levels, or not finite. Calibrate anew"
                )
        return cls(described["setting"], denoisers, described["prompts"], motions, path)


@lru_cache(maxsize=64)
def _coefficients(calibration: Calibration, denoiser: str, actions: tuple[str, ...], fit: Fit) -> Tensor:
    return combinations(calibration.weights(denoiser, fit), _own(calibration, denoiser, actions), fit)


@lru_cache(maxsize=64)
def _repayments(calibration: Calibration, denoiser: str, actions: tuple[str, ...], fit: Fit) -> tuple[Tensor, Tensor]:
    moments, scales = calibration.moments(denoiser), calibration.setting["guidance_scale"]
    gain = calibration.gains[moments.first : moments.first + moments.steps].tolist()
    w = scales[denoiser] if denoiser in scales else next(iter(scales.values()))
    if isinstance(w, list):  # for each step of the whole run
        w = torch.tensor(w[moments.first : moments.first + moments.steps], dtype=torch.float64)[:, None]
    return repayments(calibration.weights(denoiser, fit), _own(calibration, denoiser, actions), gain, w, fit)


def _own(calibration: Calibration, denoiser: str, actions: tuple[str, ...]) -> tuple[str, ...]:
    """The actions of a denoiser's own steps, from those of a whole run."""
    moments = calibration.moments(denoiser)
    own = actions[moments.first : moments.first + moments.steps]
    if len(own) != moments.steps:
        raise CalibrationMismatch(f"{calibration!r} is for {calibration.steps} steps; these are {len(actions)} actions")
    # A denoiser's first evaluation in a run is always a full one.
    return (Action.BOTH, *own[1:])


def gains(table: Sequence[Space]) -> list[float]:
    """How far an error of each step's prediction moves the picture: `euler_gains`, times the solver's `reuse`."""
    return [gain * space.reuse for gain, space in zip(euler_gains(table), table, strict=True)]


def euler_gains(table: Sequence[Space]) -> list[float]:
    """How far an error of each step's prediction moves the picture, if the solver takes Euler steps.

    With x = signal x0 + noise eps and rho = noise / signal, an Euler step in rho turns an error e of the prediction
    into an error of x / signal that is e times

        |b| (1 - rho' / rho)        (a prime: at the next step; denoised = a x + b prediction)

    A gain is this factor over sqrt(rho): the noisier the sample, the more of the error later steps correct. For
    Gaussian data of unit variance 1 / sqrt(1 + rho'^2) of an error would remain at the end. Guidance amplifies
    differences, so more remains. The root fits measured pictures: docs/policies.md. The evaluations of one solver step
    share its gain. A first step from pure noise, where rho is infinite, counts as if it started from rho', which is
    rather too much than too little. The formula assumes that no step adds noise. With a stochastic scheduler the real
    gains fall less towards the end, by a factor of 1.3 to 3.
    """
    starts = [i for i, space in enumerate(table) if space.new_step] or [0]
    found: list[float] = []
    for start, stop in zip(starts, [*starts[1:], len(table)], strict=True):
        here = table[start]
        rho = here.noise / here.signal if here.signal else math.inf
        after = table[stop].noise / table[stop].signal if stop < len(table) else here.left
        weight = rho if rho < math.inf else after
        gain = abs(here.b * (1 - after / rho)) / math.sqrt(weight) if 0 < weight < math.inf else 0.0
        found += [gain / (stop - start)] * (stop - start)
    return [0.0] * starts[0] + found


def _differences(made: Any, used: Any, where: str, precision: float = 0.0) -> Iterator[str]:
    """The differences between two trees of plain values, where both have a value."""
    if isinstance(made, dict) and isinstance(used, dict):
        both = sorted(made.keys() & used.keys())
        if where.endswith(".weights"):
            if any(_apart(made[name], used[name]) > max(precision, 1e-4) for name in both):
                yield f"{where} differ"
            return
        precision = max(made.get("precision", 0.0), used.get("precision", 0.0))
        for key in both:
            if key != "precision":
                yield from _differences(made[key], used[key], f"{where}.{key}" if where else key, precision)
    elif isinstance(made, list) and isinstance(used, list) and len(made) != len(used):
        yield f"{where}: {len(used)} of them, calibrated for {len(made)}"
    elif isinstance(made, list) and isinstance(used, list):
        for i, (a, b) in enumerate(zip(made, used, strict=True)):
            if not _same(a, b):
                yield f"{where}[{i}]: {b!r}, calibrated for {a!r}"
                return
    elif not _same(made, used):
        yield f"{where}: {used!r}, calibrated for {made!r}"


def _apart(made: list[float], used: list[float]) -> float:
    """Relative distance; inf for lists of different lengths."""
    if len(made) != len(used):
        return math.inf
    return math.dist(made, used) / (math.hypot(*made) or 1.0)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, int | float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-6)
    return bool(a == b)
