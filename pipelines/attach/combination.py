"""How the conditional and the unconditional prediction of a pipeline's step become one.

Pipelines differ in how they write it (`ANCHORS`), since each way rounds in a way of its own; in which
precision; in what the network predicts, where that is not what the scheduler wants (`NETWORKS`); and in what is done to
the result (`FINISHES`). A `Combination` is one choice of all of these.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusers_guidance.pipelines.attach.layout import View
from diffusers_guidance.pipelines.attach.residual import Scale, exact
from diffusers_guidance.scales import W
from diffusers_guidance.spaces import Space


@dataclass(frozen=True)
class Around:
    """What a pipeline's treatment of its predictions at a step may depend on beside them.

    Args:
        sample: the scheduler's; None: not known.
        space: of the scheduler's predictions; None: not known.
        rescale: the call's `guidance_rescale`.
        norm: the call's `cfg_normalization`.
        factor: what the finish multiplies by; None: it is computed.
    """

    sample: Tensor | None = None
    space: Space | None = None
    rescale: float = 0.0
    norm: float = 0.0
    factor: Tensor | None = None

    def through(self, view: View) -> "Around":
        """The same with a sample of the view's rows."""
        x = None if self.sample is None else view.working(self.sample)
        return self if x is self.sample else replace(self, sample=x)

    def fits(self, y: Tensor) -> bool:
        """Whether denoised predictions can be formed from ones like `y`, and the other way round."""
        return self.space is not None and self.space.b != 0 and self.sample is not None and self.sample.shape == y.shape

    @property
    def known(self) -> tuple[Tensor, Space]:
        assert self.sample is not None and self.space is not None
        return self.sample, self.space

    def denoised(self, y: Tensor) -> Tensor:
        x, space = self.known
        return space.a * x + space.b * y.to(x.dtype)  # which may be float32 beside a network in half precision

    def predicted(self, denoised: Tensor) -> Tensor:
        x, space = self.known
        return (denoised - space.a * x) / space.b


class Network(NamedTuple):
    """What a network predicts, where that is not what the scheduler wants.

    Args:
        reads: (a, b) of denoised = a * sample + b * output, from sigma.
        least: the least that the pipeline divides by on the way from there to what the scheduler wants.
        by_timestep: whether it divides by a timestep, which is where the sample is, and rounded with it there.
    """

    reads: Callable[[Any], tuple[Any, Any]]
    least: float = 0.0
    by_timestep: bool = False

    def denoised(self, y: Tensor, around: Around) -> Tensor:
        """What an output denoises to, rounded as pipelines do: in its own dtype, from a sigma in float32."""
        x, space = around.known
        working = torch.promote_types(x.dtype, torch.float32)
        a, b = self.reads(torch.tensor(space.sigma, dtype=working))
        return y if (a, b) == (0, 1) else (a * x + b * y.to(x.dtype)).to(y.dtype)

    def predicted(self, denoised: Tensor, around: Around) -> Tensor:
        """What the scheduler wants, for that."""
        x, space = around.known
        if (space.a, space.b) == (0, 1):
            return denoised
        way: dict[str, Any] = {
            "dtype": torch.promote_types(x.dtype, torch.float32),
            "device": x.device if self.by_timestep else None,
        }
        if abs(space.a) > 1:  # as noise is found: (x - signal * denoised) / noise
            signal, noise = torch.full((), 1 / space.a, **way), torch.full((), self._divisor(space) / space.a, **way)
            return (signal * denoised - x) / noise
        return (denoised - space.a * x) / torch.full((), self._divisor(space), **way)

    def _divisor(self, space: Space) -> float:
        return math.copysign(max(abs(space.b), self.least), space.b)

    def mixing(self, space: Space) -> tuple[float, float, float]:
        """(alpha, beta) of the scheduler's prediction, alpha * sample + beta * output: both denoise to the same.

        And how large the terms are, in samples, of which alpha * sample is what is left.
        """
        a, b = self.reads(space.sigma)
        divisor = self._divisor(space)
        return (a - space.a) / divisor, b / divisor, (abs(a) + abs(space.a)) / abs(divisor)


NETWORKS = {
    "x0": Network(lambda sigma: (0.0, 1.0), 0.05, by_timestep=True),  # PRX in pixels
    "x0 as it is": Network(lambda sigma: (0.0, 1.0)),
    # Of x = x0 + sigma eps: F of EDM (arXiv 2206.00364, table 1, with sigma_data = 1), as the latent upscaler's; and
    # the velocity eps - x0 of x / (1 + sigma) = (1 - t) x0 + t eps, where t = sigma / (1 + sigma), as Cosmos 2's.
    "EDM's F": Network(lambda sigma: (1 / (sigma**2 + 1), sigma / (sigma**2 + 1) ** 0.5)),
    "the rescaled sample's velocity": Network(lambda sigma: (1 - sigma / (sigma + 1), -(sigma / (sigma + 1)))),
}

SOLVED = "solved for"
"""The value of `mixed` if the sample is mixed in by numbers that are solved for at every step."""


class OfSample(NamedTuple):
    """A finish that multiplies each sample by a factor that all of it goes into.

    Args:
        factor: of (g, c, around).
        part: the part of g that is multiplied; the rest is added as it is.
    """

    factor: Callable[[Tensor, Tensor, Around], Tensor]
    part: Callable[[Around], float] = lambda around: 1.0

    def __call__(self, g: Tensor, c: Tensor, around: Around) -> Tensor:
        phi, factor = self.part(around), around.factor
        scaled = g * (self.factor(g, c, around) if factor is None else factor)
        return scaled if phi == 1 else phi * scaled + (1 - phi) * g  # in the pipelines' own order

    def times(self, factor: Tensor, around: Around) -> Tensor:
        """What all of g is multiplied by."""
        phi = self.part(around)
        return phi * factor + (1 - phi)

    def factor_of(self, times: Tensor, around: Around) -> Tensor:
        """The factor, where all of g is multiplied by that."""
        phi = self.part(around)
        return (times - (1 - phi)) / phi


def rescale(g: Tensor, c: Tensor, around: Around) -> Tensor:
    """The factor of the pipelines' `guidance_rescale` (arXiv 2305.08891, eq. 15-16)."""
    dim = list(range(1, c.ndim))
    return c.std(dim=dim, keepdim=True) / g.std(dim=dim, keepdim=True)


def cap_whole_norm(g: Tensor, c: Tensor, around: Around) -> Tensor:
    """To at most `cfg_normalization` times the conditional prediction's norm, of a sample as a whole (Z-Image)."""
    limit, norm = (torch.linalg.vector_norm(t, dim=list(range(1, t.ndim)), keepdim=True) for t in (c, g))
    return (limit * around.norm / norm).clamp(max=1.0)


def match_norm(g: Tensor, c: Tensor, around: Around) -> Tensor:
    """With the conditional prediction's norm along the last dimension (Qwen-Image, Lumina 2 and kin)."""
    return g * (torch.norm(c, dim=-1, keepdim=True) / torch.norm(g, dim=-1, keepdim=True))


def cap_norm(g: Tensor, c: Tensor, around: Around) -> Tensor:
    """The same, but only where that is the smaller one (LongCat-Image)."""
    cond_norm, norm = torch.norm(c, dim=-1, keepdim=True), torch.norm(g, dim=-1, keepdim=True)
    return g * (cond_norm / (norm + 1e-8)).clamp(min=0.0, max=1.0)


def leave(g: Tensor, c: Tensor, around: Around) -> Tensor:
    return g


FINISHES: dict[str, OfSample | Callable[[Tensor, Tensor, Around], Tensor]] = {
    # Where the call asks for it, before the plain combination, which is the same thing until the cap is reached.
    "at most the norm of c as a whole": OfSample(cap_whole_norm),
    "": leave,
    "guidance_rescale": OfSample(rescale, lambda around: around.rescale),
    "norm of c": match_norm,
    "at most the norm of c": cap_norm,
}
"""What is done to a combination g, given c: of a sample as a whole, or along the last dimension alone."""


def read(value: Any, output: Tensor) -> float | Tensor | None:
    """A number, whatever its type, or a tensor of them that can be multiplied with `output`; None: neither."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 1 and value.ndim == output.ndim:
        fitting = all(n in (1, m) for n, m in zip(value.shape, output.shape, strict=True))
        return value if fitting else None
    if getattr(value, "shape", None) is not None and math.prod(value.shape) == 1 and hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, float | Real) or isinstance(value, bool):
        return None
    return float(value) if math.isfinite(value) else None


def _lerp(c: Tensor, u: Tensor, s: Any) -> Tensor:
    return torch.lerp(u, c, s.to(u.dtype) if isinstance(s, Tensor) else s)


def _added(c: Tensor, u: Tensor, s: Any) -> Tensor:
    return u + s * (c - u) if isinstance(s, Tensor) else torch.add(u, c - u, alpha=s)


def _in_float32(c: Tensor, u: Tensor, s: Any) -> Tensor:
    working = torch.promote_types(c.dtype, torch.float32)
    return u.to(working) + s * (c.to(working) - u.to(working))


ANCHORS: dict[str, Callable[[Tensor, Tensor, Any], Tensor]] = {
    "u": lambda c, u, s: u + s * (c - u),
    "c": lambda c, u, s: c + s * (c - u),
    "lerp": _lerp,
    "denoised": lambda c, u, s: c + (s - 1) * (c - u),
    "difference": lambda c, u, s: c + (s - 1) * (c - u),
    "weighted": lambda c, u, s: s * c + (1 - s) * u,
    "weighted from c": lambda c, u, s: (1 + s) * c - s * u,
    "added": _added,
    "in float32": _in_float32,
}
"""Ways to write `u + w (c - u)`; each rounds in a way of its own."""

FUSED = ("lerp", "added")
"""Those whose product and sum some devices round at once, and others do not."""

FROM_C = ("c", "weighted from c")
"""Those whose scale counts from 0: w = 1 + s."""


@dataclass(frozen=True, kw_only=True)
class Combination:
    """model_output = finish(u + w (c - u)), in a pipeline's own order of operations.

    Args:
        anchor: how it is written, a line of ANCHORS: "u" for `u + s (c - u)`, where w = s; "c" for `c + s (c - u)`,
            where w = 1 + s; "denoised" for the first of denoised predictions, which is also where it is finished
            (LTX-2).
        upcast: whether c and u are taken to the scheduler's dtype before they are combined, or the result is.
        finish: what is done to the combination.
        scale: the name its scale is read by; None: solved for at every step.
        dtype: the scheduler's.
        mixed: what the network predicts, a line of NETWORKS; "": what the scheduler wants; or SOLVED.
        meets: what is combined then: "denoised" predictions, the network's "own", or what the scheduler "wants".
        widens: whether its scale is a tensor of one number in the scheduler's dtype, which products with it take.
    """

    anchor: str
    upcast: bool
    finish: str
    scale: str | None
    dtype: torch.dtype
    mixed: str = ""
    meets: str = "denoised"
    widens: bool = False

    def treated(self, y: Tensor, around: Around) -> Tensor:
        """As it is combined with the other one."""
        y = y.to(self.dtype) if self.upcast else y
        if self.mixed in NETWORKS and self.meets != "own":
            y = NETWORKS[self.mixed].denoised(y, around)
        return self._wanted(y, around) if self.meets == "wants" else y

    def handed(self, y: Tensor, around: Around) -> Tensor:
        """The same of what the view has been through; where the sample is mixed in, in float32 at least."""
        if self.mixed not in NETWORKS:
            return self.treated(y, around)
        x, space = around.known
        working = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        alpha, beta, _ = NETWORKS[self.mixed].mixing(space)
        return alpha * x.to(working) + beta * y.to(working)

    def _wanted(self, denoised: Tensor, around: Around) -> Tensor:
        return NETWORKS[self.mixed].predicted(denoised, around)

    def anchored(self, c: Tensor, u: Tensor, s: Any) -> Tensor:
        """The combination alone, of two halves as they are combined."""
        if self.widens and not isinstance(s, Tensor):
            s = torch.full((1,), s, dtype=self.dtype, device=c.device)
        return ANCHORS[self.anchor](c, u, s)

    def finished(self, g: Tensor, c: Tensor, around: Around) -> Tensor:
        """The pipeline's own treatment of a combined prediction."""
        if not self.finish:
            return g.to(self.dtype)
        return self._finished(self.compared(g, around), self.compared(c, around), around)

    def _finished(self, g: Tensor, c: Tensor, around: Around) -> Tensor:
        g = FINISHES[self.finish](g, c, around)
        return (around.predicted(g) if self.anchor == "denoised" else g).to(self.dtype)

    def compared(self, y: Tensor, around: Around) -> Tensor:
        """A prediction, or what it denoises to, whichever of them is finished."""
        return around.denoised(y) if self.anchor == "denoised" else y

    @cached_property
    def needs_space(self) -> bool:
        """Whether it can only be followed where sample and space are known."""
        return self.anchor == "denoised" or self.mixed in NETWORKS

    @cached_property
    def of_sample(self) -> OfSample | None:
        """Its finish, if all of a sample goes into that."""
        finish = FINISHES[self.finish]
        return finish if isinstance(finish, OfSample) else None

    @cached_property
    def is_stable(self) -> bool:
        """Whether the same numbers give the same bits in any layout: nothing is summed up, nothing fused."""
        return not self.finish and not self.needs_space and self.anchor not in FUSED

    def terms(self, y: Tensor, around: Around) -> Tensor:
        """`y`, one of `cut`, as large as what the pipeline computes with: so much may be lost to rounding."""
        if not self.needs_space:
            return y
        x, space = around.known
        times = NETWORKS[self.mixed].mixing(space)[2] if self.mixed else 2 * abs(space.a / space.b)
        return y.abs() + times * x.abs()

    def w(self, s: Scale) -> float:
        """The guidance scale that the pipeline's scale `s` amounts to, the largest where there are several."""
        largest = float(s.max() if isinstance(s, Tensor) else s)
        return 1 + largest if self.anchor in FROM_C else largest

    def by_sample(self, s: Scale) -> W:
        """The guidance scale of each sample, if the samples have scales of their own; else `w`."""
        if not isinstance(s, Tensor) or s[0].numel() > 1:
            return self.w(s)
        return tuple(map(self.w, s.flatten().tolist()))

    def apply(self, c: Tensor, u: Tensor, s: Scale, around: Around) -> Tensor:
        """What the pipeline hands to the scheduler for (c, u), which are `treated`, at its scale `s`."""
        if self.mixed in NETWORKS:
            g = self.anchored(c, u, s)
            g = NETWORKS[self.mixed].denoised(g, around) if self.meets == "own" else g
            return (g if self.meets == "wants" else self._wanted(g, around)).to(self.dtype)
        return self._finished(*self.summed(c, u, s, around), around)

    def summed(self, c: Tensor, u: Tensor, s: Scale, around: Around) -> tuple[Tensor, Tensor]:
        """(the combination before it is finished, c), of `treated` halves."""
        c, u = self.compared(c, around), self.compared(u, around)
        return self.anchored(c, u, s), c

    def invert(self, c: Tensor, u: Tensor, output: Tensor) -> float:
        """The scale that explains `output` best, by least squares; only where nothing is done to the combination."""
        c, u, output = (exact(t).nan_to_num(0, 0, 0) for t in (c, u, output))
        d = c - u
        origin = c if self.anchor in FROM_C else u
        return float(((output - origin) * d).sum() / (d * d).sum())

    @property
    def written(self) -> str:
        """The name of its scale, as it is told."""
        return self.scale or ""

    def __str__(self) -> str:
        finish = f", then {self.finish}" if self.finish else ""
        finish += ", mixed with the sample" if self.mixed else ""
        finish += f" to turn {self.mixed} into what the scheduler wants" if self.mixed in NETWORKS else ""
        s = self.written or "s"
        origin = "c" if self.anchor in FROM_C else "u"
        combination = f"lerp(u, c, {s})" if self.anchor == "lerp" else f"{origin} + {s} (c - u)"
        return f"{combination}{finish}"
