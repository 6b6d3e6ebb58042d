"""Rules: how the conditional and the unconditional prediction of a step become one.

A rule is a frozen dataclass with an `algebra`. It takes the inner products of

    X (denoised conditional prediction), c (conditional prediction), d = c - u, m (momentum)

and gives the factors of X, c, d and m in the guided prediction. To add a rule, subclass `Rule` here or in your own
module and give it an `algebra`. Everything else (spaces, momentum, policies, pipelines) follows. See docs/extending.md.
"""

import copy
import math
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from diffusers_guidance import kernels, samples, scales
from diffusers_guidance.checks import is_number, is_whole, plain, plain_fields
from diffusers_guidance.kernels import Coefficients, Gram, coefficients
from diffusers_guidance.kernels.algebra import Algebra, algebra_of
from diffusers_guidance.kernels.reference import gram
from diffusers_guidance.steps import Step


@dataclass(frozen=True)
class Rule:
    """Base of all rules.

    Args:
        guidance_scale: w, where 1 is the conditional prediction alone. None takes the pipeline call's. Under `attach`
            it replaces the call's own argument, and counts like it: if a pipeline counts from 0 (Z-Image), w is one
            more. It may be a number, a list with a number for each step, or a schedule such as "linear(9, 3)" or
            "3x3+7x45": see `scales`.
    """

    guidance_scale: scales.Given | None = None

    # These are not annotated, so they are not fields. A rule that lets users choose one declares the field itself.
    momentum = 0.0
    """beta: the share of the previous step's direction that is carried over. 0 means no momentum."""
    norm_dim = None  # type: tuple[int, ...] | None
    """The dimensions of the inner products; None: all but the batch."""
    needs_denoised = False
    """Whether `coefficients` uses X or m, and so needs a scheduler whose predictions can be denoised.

    A rule that uses them without setting this is refused at its first guided step.
    """

    def __post_init__(self) -> None:
        plain_fields(self)
        object.__setattr__(self, "guidance_scale", scales.checked(self.guidance_scale))

    def at(self, step: Step) -> "Rule":
        """This rule at one step of a run, with the settled guidance scale `step.w`.

        A rule that changes over the run overrides this, and starts from `super().at(step)`.
        """
        return replace(self, guidance_scale=step.w)

    @property
    def w(self) -> float:
        """The settled guidance scale."""
        if self.guidance_scale is None or isinstance(self.guidance_scale, str | tuple):
            raise ValueError(
                f"guidance_scale={self.guidance_scale!r} is not settled: use rule.at(Step(w=guidance_scale)) first; "
                "an `at` of your own starts from super().at(step)"
            )
        return self.guidance_scale

    @cached_property
    def is_scheduled(self) -> bool:
        """Whether its scale follows a schedule that replaces the pipeline's own."""
        return scales.changes(self.guidance_scale)

    @property
    def is_plain(self) -> bool:
        """Whether this rule is the pipeline's own `u + w (c - u)`, which then stays untouched."""
        return False

    @property
    def alone(self) -> "Rule":
        """What it does to the only prediction of a step without guidance; a plain rule changes nothing."""
        return CFG()

    rests_at_one = True
    """Whether at a scale of 1 the result is the conditional prediction, so that the other can be skipped."""
    fuses = True
    """Whether its step may be fused with the scheduler's; False if it carries something other than the momentum."""

    def guided(
        self, sample: Tensor, cond: Tensor, uncond: Tensor, momentum: Tensor | None, a: float, b: float
    ) -> tuple[Tensor, Tensor]:
        """The guided prediction, and the value carried to the next step: the new momentum (`kernels.guide`)."""
        return kernels.guide(sample, cond, uncond, momentum, a, b, self)

    @property
    def centred(self) -> bool:
        """Whether the `coefficients` are an algebra that takes c and d shifted by a number near them."""
        used = algebra_of(type(self))
        return used is not None and used.centred

    algebra: ClassVar[Algebra | None] = None
    """The factors as a function of the Gram, b and the `settings`, which Triton compiles too; see `kernels.algebra`."""

    def settings(self, numel: int) -> tuple[float, ...]:
        """Up to four settings for the `algebra`, for a group of `numel` numbers."""
        return (self.w,)

    def coefficients(self, gram: Gram, b: float) -> Coefficients:
        """Factors of (X, c, d, m, u) in the guided prediction; `b` is the prediction's factor in denoised space.

        It uses the `algebra`; a rule without one overrides this method. Do not guard divisions in either: a sample
        with a non-finite coefficient stays unguided.
        """
        if self.algebra is None:
            raise NotImplementedError(f"{type(self).__name__} has neither an algebra nor coefficients")
        return self.algebra(gram, b, *self.settings(gram.numel))


@dataclass(frozen=True)
class CFG(Rule):
    """Classifier-free guidance, `u + w (c - u)` (arXiv 2207.12598), as the pipeline does it.

    Args:
        guidance_scale: w. None takes the pipeline call's.
        rescale: phi of arXiv 2305.08891 (eq. 15-16), in [0, 1]: how far the guided prediction's standard deviation is
            pulled back to that of the conditional one. 0 keeps the pipeline's arithmetic bit for bit.
    """

    rescale: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.rescale, 0, 1):
            raise ValueError(f"rescale={self.rescale!r}: a number from 0 (off) to 1")

    @property
    def is_plain(self) -> bool:
        return self.rescale == 0

    algebra = coefficients.cfg

    def settings(self, numel: int) -> tuple[float, ...]:
        return self.w, self.rescale


@dataclass(frozen=True)
class APG(Rule):
    """Adaptive projected guidance (arXiv 2410.02416, Algorithm 1), on denoised predictions.

    Keeps high guidance scales from oversaturating. It damps the update's part parallel to the denoised prediction,
    which drives saturation, caps the update's norm, and subtracts the previous steps' direction.

    Args, the important ones first:
        guidance_scale: w. None takes the pipeline call's.
        norm_threshold: r, the cap on the update's Euclidean norm in each group; None means no cap. The paper's value
            for SDXL at 1024 pixels is 15. The norm grows with the square root of the latent's size; see
            `reference_numel`.
        momentum: beta in (-1, 1); negative pushes away from the previous directions. 0 turns it off. The
            paper uses -0.5 for SDXL, and a range from -0.75 to -0.25.
        eta: weight of the parallel part. 0 drops it (the paper's advice), 1 keeps all of it.
        norm_dim: dimensions of the norm and the projection. None: the whole sample. (-3, -2, -1) on
            (B, frames, C, H, W), or (1, 3, 4) on (B, C, frames, H, W): each frame of a video separately.
        reference_numel: if set, r is meant for a group of this many numbers and is scaled by sqrt(numel /
            reference_numel). With 65536, r means what it means for SDXL at 1024 pixels.
        cfg_steps: the number of first steps guided by CFG instead of APG; their directions count for the momentum.
        form: "paper" acts on denoised predictions, `c + (w - 1) update`; "diffusers" acts on predictions as the model
            makes them, `u + w update`, like diffusers' guiders.

    With eta=1, norm_threshold=None and momentum=0 this is CFG.
    """

    momentum: float = -0.5
    norm_threshold: float | None = 15.0
    eta: float = 0.0
    norm_dim: tuple[int, ...] | None = None
    reference_numel: int | None = None
    cfg_steps: int = 0
    form: Literal["paper", "diffusers"] = "paper"

    needs_denoised = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_whole(self.cfg_steps, 0):
            raise ValueError(f"cfg_steps={self.cfg_steps!r}: a whole number of steps from 0 up")
        if self.form not in ("paper", "diffusers"):
            raise ValueError(f'form={self.form!r}: "paper" or "diffusers"')
        if self.norm_threshold is not None and not (is_number(self.norm_threshold) and self.norm_threshold > 0):
            raise ValueError(f"norm_threshold={self.norm_threshold!r}: a number above 0, or None for no cap")
        if not (is_number(self.momentum) and -1 < self.momentum < 1):
            raise ValueError(f"momentum={self.momentum!r}: a number between -1 and 1, both excluded")
        if not is_number(self.eta, 0, 1):
            raise ValueError(f"eta={self.eta!r}: a number from 0 (orthogonal part alone) to 1 (the whole update)")
        if self.reference_numel is not None and not is_whole(self.reference_numel, 1):
            raise ValueError(f"reference_numel={self.reference_numel!r}: a whole number above 0, or None")
        object.__setattr__(self, "norm_dim", _dims(self.norm_dim))

    algebra = coefficients.apg

    def at(self, step: Step) -> Rule:
        if step.index < self.cfg_steps:
            return _CarryingCFG(step.w, self.momentum, self.form)
        if self.form == "diffusers":
            own = {field.name: getattr(self, field.name) for field in fields(self)}
            return _FromU(**own | {"guidance_scale": step.w})
        return super().at(step)

    def settings(self, numel: int) -> tuple[float, ...]:
        return self.w, self.momentum, self._threshold(numel), self.eta

    def _threshold(self, numel: int) -> float:
        if self.norm_threshold is None:
            return float("inf")
        scale = 1.0 if self.reference_numel is None else (numel / self.reference_numel) ** 0.5
        return self.norm_threshold * scale

    @classmethod
    def preset(cls, family: Any, **changes: Any) -> "APG":
        """The settings for a family of pipelines.

        Args:
            family: a name from `PRESETS`, or a pipeline. A pipeline's class name is looked up there; a bundled model
                has its own settings. A pipeline of another family gets "normalised".
            changes: fields to change, such as `guidance_scale=10`.
        """
        if isinstance(family, str):
            if family not in PRESETS:
                raise ValueError(f"family={family!r}: one of {', '.join(PRESETS)}, or a pipeline")
            preset = PRESETS[family]
        else:
            name = type(family).__name__
            known = samples.name_of(getattr(family, "name_or_path", None))
            matching = (p for p in PRESETS.values() if name.startswith(p.pipelines or "-"))
            preset = PRESETS[known] if known in PRESETS else next(matching, PRESETS["normalised"])
        return replace(preset.rule, **changes)


@dataclass(frozen=True)
class _FromU(APG):
    """APG on predictions as the model makes them; it carries the average of `c - u`."""

    algebra = coefficients.apg_from_u

    def guided(
        self, sample: Tensor, cond: Tensor, uncond: Tensor, momentum: Tensor | None, a: float, b: float
    ) -> tuple[Tensor, Tensor]:
        return kernels.guide(sample, cond, uncond, momentum, 0.0, 1.0, self)


@dataclass(frozen=True)
class _CarryingCFG(Rule):
    """CFG that keeps APG's momentum up to date."""

    momentum: float = 0.0
    form: str = "paper"

    needs_denoised = True
    fuses = False
    algebra = coefficients.cfg

    def guided(
        self, sample: Tensor, cond: Tensor, uncond: Tensor, momentum: Tensor | None, a: float, b: float
    ) -> tuple[Tensor, Tensor]:
        a, b = (a, b) if self.form == "paper" else (0.0, 1.0)
        return kernels.guide(sample, cond, uncond, momentum, a, b, self)


@dataclass(frozen=True)
class RenormCFG(Rule):
    """CFG whose result gets the length of the conditional prediction, or at most that length.

    `g ||c|| / ||g||` with `g = u + w (c - u)`. Over whole samples it is EP-CFG (arXiv 2412.09966) without its
    percentiles. `RenormCFG.preset("qwen-image")` and the others in `RENORMED` are what pipelines do.

    Args:
        guidance_scale: w. None takes the pipeline call's.
        norm_dim: dimensions of the norms. None: the whole sample. (-3,) on (B, C, H, W): each pixel separately.
        shorten_only: whether the result is only shortened, never lengthened.
    """

    norm_dim: tuple[int, ...] | None = None
    shorten_only: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "norm_dim", _dims(self.norm_dim))
        if not isinstance(self.shorten_only, bool):
            raise ValueError(f"shorten_only={self.shorten_only!r}: True or False")

    algebra = coefficients.renormed

    def settings(self, numel: int) -> tuple[float, ...]:
        return self.w, float(self.shorten_only)

    @classmethod
    def preset(cls, family: str, **changes: Any) -> "RenormCFG":
        """The rule of a pipeline or a paper: a name from `RENORMED`, with some fields changed."""
        if family not in RENORMED:
            raise ValueError(f"family={family!r}: one of {', '.join(RENORMED)}")
        return replace(RENORMED[family].rule, **changes)


@dataclass(frozen=True)
class BetaCFG(Rule):
    """beta-CFG (arXiv 2502.10574): `u + w p(t) (c - u) / ||c - u||^gamma`, p the density of a beta distribution.

    It acts on predictions as the model makes them. At both ends of the run p is 0, and the result is the unconditional
    prediction. `||c - u||` grows with the square root of the latent's size, so with gamma = 1 w must grow too: a 5 of
    CFG becomes about 5 ||c - u||.

    Args:
        guidance_scale: w. None takes the pipeline call's.
        gamma: power of the norm; 0 uses the curve without a norm, 1 is the authors' choice.
        a, b: the distribution's parameters, from 1 up; the authors use 2 and 2, or 2 and 3.
    """

    gamma: float = 1.0
    a: float = 2.0
    b: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.gamma, 0):
            raise ValueError(f"gamma={self.gamma!r}: a number from 0 (no norm) up")
        for name in ("a", "b"):
            if not is_number(getattr(self, name), 1):
                raise ValueError(f"{name}={getattr(self, name)!r}: a number from 1 up")

    def density(self, share: float) -> float:
        """The density p at a share of the run, from 0 to 1."""
        whole = math.gamma(self.a) * math.gamma(self.b) / math.gamma(self.a + self.b)
        return float(share ** (self.a - 1) * (1 - share) ** (self.b - 1)) / whole

    def at(self, step: Step) -> Rule:
        if step.w is None:
            return super().at(step)
        share = step.index / (step.count - 1) if step.count > 1 else 0.0
        return replace(self, guidance_scale=step.w * self.density(share))  # type: ignore[operator]

    rests_at_one = False
    algebra = coefficients.beta_cfg

    def settings(self, numel: int) -> tuple[float, ...]:
        return self.w, self.gamma


@dataclass(frozen=True)
class TAG(Rule):
    """Tangential amplifying guidance (arXiv 2510.04533): CFG with its part perpendicular to the sample times eta.

    The paper splits a solver's step into a part along the sample x and a part perpendicular to it, and lengthens the
    second. If a solver uses one prediction a step (DDIM, Euler), it is the same to lengthen the prediction's part
    perpendicular to x. This rule does so with any solver.

    Args:
        guidance_scale: w. None takes the pipeline call's.
        eta: factor of the perpendicular part, 1 or a little more; 1 is CFG.
    """

    eta: float = 1.15

    needs_denoised = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.eta, 1):
            raise ValueError(f"eta={self.eta!r}: a number from 1 (plain CFG) up")

    def at(self, step: Step) -> Rule:
        if step.space is not None and step.space.a == 0:
            raise ValueError(f"{self!r} needs the sample, which has no part in predictions of the clean sample")
        return super().at(step)

    rests_at_one = False
    algebra = coefficients.tag

    def settings(self, numel: int) -> tuple[float, ...]:
        return self.w, self.eta


@dataclass(frozen=True)
class ADG(Rule):
    """Angle domain guidance (arXiv 2506.11039): turns the denoised prediction instead of lengthening it.

    With theta the angle between both denoised predictions, X turns away from the unconditional one by a further (w - 1)
    theta, but at most by `most`. The result is at most sqrt(2) times as long as X.

    Args:
        guidance_scale: w. None takes the pipeline call's.
        most: the largest angle in radians; pi / 3 is the authors' value.
    """

    most: float = math.pi / 3

    needs_denoised = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.most, 0, math.pi) and self.most > 0):
            raise ValueError(f"most={self.most!r}: an angle in radians above 0, up to pi")

    def coefficients(self, gram: Gram, b: float) -> Coefficients:
        """cos(t) X + sin(t) / sin(theta) (X - <U, X> / <U, U> U), t = min((w - 1) theta, most) and U = X - b d.

        |X| |U| sin(theta) is the area between X and U, and so between X and b d: no angle is lost to rounding.
        """
        if b == 0:
            return Coefficients(0.0, 1.0, 0.0, 0.0)
        UX, UU = gram.XX - b * gram.Xd, gram.XX - 2 * b * gram.Xd + b * b * gram.dd
        area = abs(b) * (gram.XX * gram.dd - gram.Xd * gram.Xd).clamp(min=0).sqrt()
        theta = torch.atan2(area, UX)
        t = ((self.w - 1) * theta).clamp(-self.most, self.most)
        sine = area / (gram.XX * UU).sqrt()
        turned = torch.where(sine > 1e-3, t.sin() / sine, self.w - 1)
        # X + b (g - c) = cos(t) X + turned ((1 - UX / UU) X + UX / UU b d)
        along = t.cos() - 1 + turned * (b * b * gram.dd - b * gram.Xd) / UU
        return Coefficients(along / b, torch.ones_like(along), turned * UX / UU, 0.0 * along)


@dataclass(frozen=True)
class MomentumGuidance(Rule):
    """Momentum guidance (arXiv 2602.20360, Algorithm 1): CFG, then a push away from the average of earlier steps.

    `v + alpha (v - m)` with `v = u + w (c - u)`, and `m = (1 - beta) v + beta m` for the next step; m starts at the
    first v. It is made for the velocities of flow matching. On models that predict noise it acts on the noise, which is
    the velocity of `x / signal`.

    It also acts in a call without guidance (`guidance_scale=1`, a distilled model), with `v = c`.

    Args:
        guidance_scale: w. None takes the pipeline call's.
        alpha: the strength of the push; 0 is CFG.
        beta: the share of the average that is kept, from 0 to below 1.
    """

    alpha: float = 0.5
    beta: float = 0.6

    needs_denoised = True  # it uses m, which other rules have in denoised space
    rests_at_one = False
    fuses = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.alpha, 0):
            raise ValueError(f"alpha={self.alpha!r}: a number from 0 (plain CFG) up")
        if not (is_number(self.beta, 0) and self.beta < 1):
            raise ValueError(f"beta={self.beta!r}: a number from 0 to below 1")

    @property
    def alone(self) -> Rule:
        return replace(self, guidance_scale=None)  # v is c then

    algebra = coefficients.momentum_guidance

    def settings(self, numel: int) -> tuple[float, ...]:
        return self.w, self.alpha

    def guided(
        self, sample: Tensor, cond: Tensor, uncond: Tensor, momentum: Tensor | None, a: float, b: float
    ) -> tuple[Tensor, Tensor]:
        found, _ = kernels.guide(sample, cond, uncond, momentum, a, b, self)
        working = torch.promote_types(cond.dtype, torch.float32)
        c = cond.to(working)
        v = c + (self.w - 1) * (c - uncond.to(working))
        return found, v if momentum is None else v + self.beta * (momentum - v)


@dataclass(frozen=True)
class CFGZeroStar(Rule):
    """CFG-Zero* (arXiv 2503.18886): first scales the unconditional prediction to fit the conditional one.

    `s u + w (c - s u)` with `s = <c, u> / ||u||^2` (Algorithm 1), on predictions as the model makes them.

    Args:
        guidance_scale: w. None takes the pipeline call's.
        zero_init: the number of first steps that predict zero in place of a flow-matching model's velocity (section
            4.2), which leaves the sample unchanged. The authors advise about 4 % of the steps for models that have not
            converged; 0 turns it off. It has no effect on models that predict something other than a velocity: a zero
            would change the sample there.
    """

    zero_init: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_whole(self.zero_init, 0):
            raise ValueError(f"zero_init={self.zero_init!r}: a whole number of steps from 0 up")

    @property
    def needs_denoised(self) -> bool:  # type: ignore[override]
        return self.zero_init > 0  # to know what the model predicts

    def at(self, step: Step) -> Rule:
        if step.index < self.zero_init and step.space is not None and step.space.predicts_velocity:
            return _Nothing(step.w)
        return super().at(step)

    algebra = coefficients.cfg_zero_star


@dataclass(frozen=True)
class _Nothing(Rule):
    """A prediction of zero."""

    def coefficients(self, gram: Gram, b: float) -> Coefficients:
        return Coefficients(0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class TCFG(Rule):
    """Tangential damping (arXiv 2503.18137): `u' + w (c - u')`, where u' is a projection of u.

    It projects u onto the direction that c and u share most, their first right singular vector (Algorithm 1), on
    predictions as the model makes them. The dropped part of u points away from the direction of the condition.
    """

    algebra = coefficients.tcfg


@dataclass(frozen=True)
class MagnitudeAware(Rule):
    """MAMBO-G (arXiv 2508.03442): `u + w' (c - u)` with `w' = 1 + (w - 1) exp(-alpha ||c - u|| / ||u||)`.

    It damps guidance where that would move the prediction far, as at the first steps. It acts on predictions as the
    model makes them.

    Args:
        guidance_scale: w. None takes the pipeline call's.
        alpha: the strength of the damping. 0 is CFG; 8 is the authors' value in diffusers, for a w of 10.
    """

    alpha: float = 8.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.alpha, 0):
            raise ValueError(f"alpha={self.alpha!r}: a number from 0 (plain CFG) up")

    algebra = coefficients.magnitude_aware

    def settings(self, numel: int) -> tuple[float, ...]:
        return self.w, self.alpha


def _dims(given: Any) -> tuple[int, ...] | None:
    """The dimensions of a norm, checked; None means all but the batch."""
    if given is None:
        return None
    dims = plain(tuple(given)) if isinstance(given, list | tuple) else ()
    if not dims or not all(is_whole(i) and i != 0 for i in dims) or len({*dims}) < len(dims):
        raise ValueError(
            f"norm_dim={given!r}: one or more dimensions as whole numbers, such as (-3, -2, -1), each once and "
            "not the batch (0); or None for the whole sample"
        )
    return dims


def settled(rule: Rule, step: Step) -> Rule:
    """`rule.at(step)`; refuses a rule that needs the denoised prediction without saying so, since it would get c for X.

    Raises:
        ValueError: its `needs_denoised` is False, but it has a momentum, or its coefficients use X or m.
    """
    made = rule.at(step)
    if not rule.needs_denoised and (uses := _denoised_in(made)):
        raise ValueError(f"{type(rule).__name__} {uses}, so its class must say `needs_denoised = True`")
    return made


_asks: dict[tuple[type, str], str] = {}
"""Findings about rules by class and settings, so that the rules themselves are not kept alive."""


def _denoised_in(rule: Rule) -> str:
    """What part of a rule needs the denoised prediction; empty if none does."""
    if rule.momentum:
        return f"has a momentum of {rule.momentum:g}, in denoised space"
    known = type(rule), repr(rule)
    if known not in _asks:
        if len(_asks) > 255:
            _asks.clear()
        _asks[known] = _looked_at(rule)
    return _asks[known]


def _looked_at(rule: Rule) -> str:
    """Which of X, m and b its coefficients use, found by trying several sets of numbers for them."""
    numbers = torch.arange(6 * 16 * 8, dtype=torch.float64).mul(1.7).sin().view(6, 16, 8)
    X, c, u, m, other_X, other_m = numbers

    def made(X: torch.Tensor, m: torch.Tensor, b: float) -> list[torch.Tensor]:
        tried = copy.deepcopy(rule)  # the rule may count its calls
        return [torch.as_tensor(k, dtype=torch.float64) for k in tried.coefficients(gram(X, c, u, m), b)]

    try:
        found = {b: made(X, m, b) for b in (-0.7, -0.1, 0.7)}
        others = [(found[b], made(size * other_X, size * other_m, b)) for b in (-0.7, 0.7) for size in (1e-3, 1.0, 1e3)]
    except Exception:  # a rule that rejects such numbers, or cannot be copied, raises again with the real ones
        return ""

    def same(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
        return all(torch.allclose(a, b, equal_nan=True) for a, b in zip(one, two, strict=True))

    for name, place in (("X", 0), ("m", 3)):
        if any((factors[place].nan_to_num() != 0).any() for factors in found.values()):
            return f"returns a factor of {name}, which is in denoised space"
    if not all(same(*pair) for pair in others):
        return "looks at inner products with X or m, which are in denoised space"
    if not all(same(found[-0.7], each) for each in found.values()):
        return "looks at b, the way to denoised space"
    return ""


class Preset(NamedTuple):
    """Settings of a rule, the prefix of their pipelines' class names, and their source."""

    rule: Any
    pipelines: str
    source: str


PRESETS = {
    "sdxl": Preset(APG(), "StableDiffusionXL", "arXiv 2410.02416, SDXL"),
    "normalised": Preset(
        APG(reference_numel=4 * 128 * 128),
        "",
        "the same cap per latent number (stable-diffusion.cpp, PR 1620)",
    ),
    "video": Preset(
        APG(norm_dim=(-4, -2, -1), reference_numel=4 * 128 * 128),
        "Wan",
        "per frame of (B, C, frames, H, W), as Waver's README and diffusers PR 13551 advise",
    ),
    "hunyuanimage-2.1": Preset(
        APG("3.5x6+10", norm_threshold=10.0, cfg_steps=6, form="diffusers"),
        "HunyuanImage",
        "shipped with HunyuanImage 2.1: CFG at 3.5 up to step 5, then APG at 10 "
        "(diffusers.guiders.AdaptiveProjectedMixGuidance)",
    ),
    "ace-step": Preset(
        APG(momentum=-0.75, norm_threshold=2.5, norm_dim=(1,)), "AceStep", "shipped with ACE-Step, over time alone"
    ),
    "waver": Preset(APG(norm_threshold=27.0), "", "shipped with Waver, w = 8"),
    "infinitetalk": Preset(APG(momentum=-0.75, norm_threshold=55.0), "", "shipped with InfiniteTalk"),
    "emoji": Preset(
        APG(norm_threshold=6, eta=0.5), "", "measured on the first bundled model, with AG: docs/results/apg.md"
    ),
    "emoji-flow": Preset(
        APG(momentum=-0.5, norm_threshold=2.25, eta=1.0),
        "",
        "measured on the second bundled model, without AG: docs/results/apart/emoji-flow.md",
    ),
    "stable-diffusion.cpp": Preset(APG(norm_threshold=5.0), "", "advice of stable-diffusion.cpp"),
}
"""Settings of APG for each family, published or measured here. Those with a prefix are found by a pipeline's class
name.

The published settings of flow-matching models act on the velocity as the network predicts it. Here, as in the paper,
the cap is on the denoised prediction's update, which is sigma times the velocity's. So the cap is looser at the last
steps.
"""


RENORMED = {
    "ep-cfg": Preset(RenormCFG(), "", "arXiv 2412.09966, without its percentiles"),
    "qwen-image": Preset(RenormCFG(norm_dim=(-1,)), "", "each token (diffusers, pipeline_qwenimage.py, `comb_pred`)"),
    "lumina-2": Preset(
        RenormCFG(norm_dim=(-1,)),
        "",
        "each row of (B, C, H, W) (diffusers, pipeline_lumina2.py, `cfg_normalization`)",
    ),
    "longcat-image": Preset(
        RenormCFG(norm_dim=(-1,), shorten_only=True),
        "",
        "each token, only shortened (diffusers, pipeline_longcat_image.py)",
    ),
    "z-image": Preset(
        RenormCFG(shorten_only=True),
        "",
        "the whole sample, only shortened (diffusers, pipeline_z_image.py)",
    ),
    "per-pixel": Preset(
        RenormCFG(norm_dim=(-3,), shorten_only=True),
        "",
        "each pixel of (B, C, H, W), only shortened (ComfyUI's CFGNorm)",
    ),
}
"""CFG with the length of the conditional prediction, as in pipelines and papers."""
