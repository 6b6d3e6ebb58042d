"""Calibration: how the predictions of a model under full guidance go together, and estimates fitted to that.

Write a run of T steps as the 2T vectors p = (c_0 .. c_{T-1}, d_0 .. d_{T-1}): its conditional predictions, and
d = c - u. A calibration keeps the sum over many runs of all their inner products, and no run:

    G = sum of p p^T        (2T x 2T)

From G follow, for any choice of evaluations, the least-squares estimates of the predictions left out (LinearAG,
arXiv 2312.12487, section 5). With R the predictions there will be by then, and t the one wanted:

    estimate = w . p_R        w = (G_RR + ridge diag G_RR)^-1 G_Rt

Such Grams add: several machines may each calibrate a share.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from diffusers_guidance.checks import is_number, plain_fields
from diffusers_guidance.errors import CalibrationMismatch
from diffusers_guidance.files import write
from diffusers_guidance.spaces import Space
from diffusers_guidance.steps import Action

FORMAT = "diffusers-guidance calibration 1"


@dataclass(frozen=True)
class Fit:
    """How a prediction that was left out is estimated.

    Args:
        regressors: "all" predictions evaluated so far, as in the paper; or "recent", of the last two steps
            evaluated in full, and the current conditional one.
        target: "delta"; or "uncond" as in the paper, with u in the place of d among regressors too. As c_t is a
            regressor of d_t, both span the same estimates, and only what the ridge shrinks differs.
        ridge: relative to the regressors' own squares.
        per_channel: coefficients of their own for each channel, from a calibration made `per_channel`.
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
UNCONDS = Fit(target="uncond")
"""As LinearAG was published."""


def combinations(gram: Tensor, actions: Sequence[str], fit: Fit = DELTAS) -> Tensor:
    """What each step guides with, c_t and d_t, as combinations of the predictions of the run.

    Args:
        gram: (2T, 2T), or (C, 2T, 2T) by channel; float64.
        actions: T of "both", "conditional", "extrapolate", "neither".
        fit: how what is missing is estimated.

    Returns:
        (2T, 2T) or (C, 2T, 2T) coefficients: the rows make c_0 .. c_{T-1}, d_0 .. d_{T-1} of the columns, likewise.
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


def least_squares(gram: Tensor, regressors: Tensor, target: Tensor, ridge: float) -> Tensor:
    """(..., 2T) the combination of `regressors` (k, 2T) closest to `target` (2T,) by `gram` (..., 2T, 2T)."""
    products = regressors @ gram  # (..., k, 2T)
    normal, right = products @ regressors.T, products @ target
    squares = normal.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(squares > 0, squares, 1).rsqrt()
    normal = normal * scale[..., None] * scale[..., None, :] + ridge * torch.eye(len(regressors), dtype=gram.dtype)
    weights = torch.linalg.lstsq(normal, (right * scale)[..., None], driver="gelsd").solution[..., 0]
    return (weights * scale) @ regressors


@dataclass(frozen=True, eq=False)
class Moments:
    """What one denoiser's predictions had in common over all trajectories, T of its evaluations in each."""

    first: int
    """The run's step at which this denoiser's first evaluation is."""
    gram: Tensor
    """(C, 2T, 2T) float64: sums of inner products of (c_0 .., d_0 ..) by channel; C is 1 where all count as one."""
    similarity: dict[str, Tensor]
    """By space, "denoised" and "noise": (trajectories, T) float32 cosines of both predictions, NaN where unknown."""

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
                f"step {other.first} on, do not add: calibrate both shares with the same settings"
            )
        both = {space: torch.cat([seen, other.similarity[space]]) for space, seen in self.similarity.items()}
        return Moments(self.first, self.gram + other.gram, both)


@dataclass(frozen=True, eq=False)
class Calibration:
    """What `calibrate` measured, and what it was measured on. `save` and `load` keep it in a file of kilobytes.

    Two of the same settings add: `calibrate(..., share=(0, 2)) + calibrate(..., share=(1, 2))`.
    """

    setting: dict[str, Any]
    """Plain JSON: the pipeline, its denoisers' and its scheduler's fingerprints, timesteps, each denoiser's guidance
    scale, `gains`, and the arguments of `calibrate`."""
    denoisers: dict[str, Moments]
    """By the denoiser's name in the pipeline."""
    prompts: dict[str, int]
    """How many trajectories were made with each negative prompt."""

    @property
    def trajectories(self) -> int:
        return sum(self.prompts.values())

    @property
    def steps(self) -> int:
        """Evaluations of a whole run."""
        return len(self.setting["timesteps"])

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of its Gram matrices: what was measured with it can say so."""
        return hashlib.sha256(b"".join(m.gram.numpy().tobytes() for m in self.denoisers.values())).hexdigest()[:16]

    def weights(self, denoiser: str, fit: Fit = DELTAS) -> Tensor:
        """(C, 2T, 2T) Gram matrices that `fit` has coefficients for: by channel, or one of all.

        Raises:
            CalibrationMismatch: it does not tell channels apart.
        """
        moments = self.moments(denoiser)
        if fit.per_channel and len(moments.gram) == 1:
            raise CalibrationMismatch(f"{self!r} does not tell channels apart: calibrate with per_channel=True")
        return moments.gram if fit.per_channel else moments.total[None]

    @property
    def call(self) -> dict[str, Any]:
        """The `num_inference_steps` and `guidance_scale` that the pipeline was called with.

        A solver of two stages evaluates more often; and some pipelines' scale is one less than w.
        """
        return {name: self.setting["calibrated"][name] for name in ("num_inference_steps", "guidance_scale")}

    @property
    def gains(self) -> Tensor:
        """(steps,) float64: how much an error of each step's prediction moves the sample; see `gains`."""
        return torch.tensor(self.setting["gains"], dtype=torch.float64)

    def __add__(self, other: "Calibration") -> "Calibration":
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
        return Calibration(setting, denoisers, prompts)

    def __repr__(self) -> str:
        s = self.setting
        scales = "/".join(f"{w:g}" for w in dict.fromkeys(s["guidance_scale"].values()))
        return (
            f"Calibration({s['pipeline']}, {s['scheduler']['class']}, {self.steps} steps, "
            f"guidance_scale={scales}, {self.trajectories} trajectories)"
        )

    def __hash__(self) -> int:
        return id(self)

    def moments(self, denoiser: str) -> Moments:
        """Those of a denoiser by its name; the only ones there are where it has none."""
        if not denoiser and len(self.denoisers) == 1:
            return next(iter(self.denoisers.values()))
        if denoiser not in self.denoisers:
            raise CalibrationMismatch(f"calibrated were {', '.join(self.denoisers)}; the run uses {denoiser!r}")
        return self.denoisers[denoiser]

    def similarity(self, space: str) -> Tensor:
        """(trajectories, steps) cosines of both predictions in "denoised" or "noise" space, NaN where unknown."""
        curves = torch.full((self.trajectories, self.steps), torch.nan)
        for moments in self.denoisers.values():
            curves[:, moments.first : moments.first + moments.steps] = moments.similarity[space]
        return curves

    def threshold(self, save: float, space: str | None = None) -> tuple[float, str]:
        """(threshold, space) with which Adaptive Guidance saves the share `save` of the NFEs on average.

        Without a space, the one in which of two steps the later has the higher similarity most often.
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
        # It then saves an evaluation at each later step, unless a denoiser is new there and evaluated in full.
        firsts = {moments.first for moments in self.denoisers.values()}
        later = [t - 1 for t in range(1, self.steps) if t not in firsts]
        maxima = highest[:, later].flatten().sort().values
        reaching = len(maxima) - torch.searchsorted(maxima, candidates)
        saved = reaching.double() / len(highest) / (2 * self.steps)
        return float(candidates[(saved - save).abs().argmin()]), space

    def coefficients(self, denoiser: str, actions: Sequence[str], fit: Fit = DELTAS) -> Tensor:
        """(C, 2T, 2T) `combinations` for a denoiser's own T steps out of a whole run's `actions`."""
        return _coefficients(self, denoiser, tuple(actions), fit)

    def check(self, setting: dict[str, Any]) -> None:
        """Refuses a run whose `setting` differs in something that both state, and says what it is."""
        found = list(_differences(self.setting, setting, ""))
        if found:
            raise CalibrationMismatch(
                f"{self!r} was made for something else than this run: {'; '.join(found)}. "
                "Calibrate for this setting, or use the one it was made for."
            )

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, all at once or not at all."""
        tensors = {}
        for name, moments in self.denoisers.items():
            tensors[f"{name}.gram"] = moments.gram.contiguous()
            tensors |= {f"{name}.{space}": seen.contiguous() for space, seen in moments.similarity.items()}
        first = {name: moments.first for name, moments in self.denoisers.items()}
        described = json.dumps({"setting": self.setting, "first": first, "prompts": self.prompts}, allow_nan=False)
        write(Path(path), serialize(tensors, {"format": FORMAT, "calibration": described}))

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            CalibrationMismatch: not a calibration, or one of another version.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such calibration; make one with calibrate(pipe, prompts, path=...)")
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise CalibrationMismatch(f"{path} is no safetensors file ({error})") from error
        if about.get("format") != FORMAT:
            raise CalibrationMismatch(f"{path} has the format {about.get('format')!r}, not {FORMAT!r}: calibrate anew")
        described = json.loads(about["calibration"])
        denoisers = {
            name: Moments(
                first,
                tensors[f"{name}.gram"],
                {space: tensors[f"{name}.{space}"] for space in ("denoised", "noise")},
            )
            for name, first in described["first"].items()
        }
        total = len(described["setting"]["timesteps"])
        for name, moments in denoisers.items():
            square = moments.gram.ndim == 3 and moments.gram.shape[1] == moments.gram.shape[2] == 2 * moments.steps
            if not (square and moments.first + moments.steps <= total and moments.gram.isfinite().all()):
                raise CalibrationMismatch(
                    f"{path} is damaged: the Gram matrices {tuple(moments.gram.shape)} of {name} are not those of "
                    f"{total} timesteps, or not finite. Calibrate anew"
                )
        return cls(described["setting"], denoisers, described["prompts"])


@lru_cache(maxsize=64)
def _coefficients(calibration: Calibration, denoiser: str, actions: tuple[str, ...], fit: Fit) -> Tensor:
    moments = calibration.moments(denoiser)
    own = actions[moments.first : moments.first + moments.steps]
    if len(own) != moments.steps:
        raise CalibrationMismatch(f"{calibration!r} is for {calibration.steps} steps; these are {len(actions)} actions")
    # A denoiser's first evaluation in a run is always a full one.
    own = (Action.BOTH, *own[1:])
    return combinations(calibration.weights(denoiser, fit), own, fit)


def gains(table: Sequence[Space]) -> list[float]:
    """How far an error of one step's prediction moves the picture.

    With x = signal x0 + noise eps and rho = noise / signal, an Euler step in rho takes an error e of the
    prediction to one of x / signal that is e times

        |b| (1 - rho' / rho)        (a prime: at the next step; denoised = a x + b prediction)

    and `gains` are these over sqrt(rho): the steps to come mend the more of it the noisier the sample. For Gaussian
    data of unit variance 1 / sqrt(1 + rho'^2) of an error would be left at the end; guidance, which amplifies
    differences, leaves more. The root is what fits measured pictures: docs/policies.md.
    The evaluations of one solver step share its gain. A first step from pure noise, rho infinite, is weighed as if
    from rho', which is too much rather than too little. Steps are taken to end without noise, and to add none: of a
    stochastic scheduler the real gains fall less towards the end, by a factor of 1.3 to 3.
    """
    starts = [i for i, space in enumerate(table) if space.new_step] or [0]
    found: list[float] = []
    for start, stop in zip(starts, [*starts[1:], len(table)], strict=True):
        here = table[start]
        rho = here.noise / here.signal if here.signal else math.inf
        after = table[stop].noise / table[stop].signal if stop < len(table) else 0.0
        weight = rho if rho < math.inf else after
        gain = abs(here.b * (1 - after / rho)) / math.sqrt(weight) if 0 < weight < math.inf else 0.0
        found += [gain / (stop - start)] * (stop - start)
    return [0.0] * starts[0] + found


def _differences(made: Any, used: Any, where: str, precision: float = 0.0) -> Iterator[str]:
    """What differs between two trees of plain values, as far as both state it."""
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
    """Relative distance, inf of lists that cannot be compared."""
    if len(made) != len(used):
        return math.inf
    return math.dist(made, used) / (math.hypot(*made) or 1.0)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, int | float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-6)
    return bool(a == b)
