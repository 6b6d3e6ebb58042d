"""How a pipeline turns its denoiser's outputs into the prediction it hands to the scheduler.

Classifier-free guidance differs between pipelines in a handful of independent ways: one call on a batch of all
branches or one call for each, in any order; which part of the output counts, in which layout and with which sign
(`View`); how the combination is written (`ANCHORS`, `TRIOS`), since each way rounds in a way of its own; in which
precision; what the network predicts, where that is not what the scheduler wants (`NETWORKS`); and what is done to the
result (`FINISHES`). A `Formula` is one choice of all of these. `identify` finds the one that reproduces a pipeline's
own number, so no table of pipelines is needed.

A formula that gave the pipeline's number bit for bit must go on doing so; what rounding may do to any other is
measured where it is found. Checking a formula at a later step waits for nothing on the device: see `Residual`.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusers_guidance.spaces import Space

Scales = Mapping[str, Callable[[], Any]]
"""Where the pipeline's guidance scale may be read, by name."""


@dataclass(frozen=True)
class View:
    """Which part of a branch's output is the scheduler's prediction, and how the scheduler holds it.

    Guidance works on (rows, ...), one row per sample. `view(branch)` takes a branch of the denoiser's output
    there, `working(tensor)` a scheduler's tensor, and `emit` brings a prediction back to the scheduler.

    Args:
        dim, start, stop: the slice of the branch that counts; stop None: all of it.
        sign: -1 where the pipeline negates.
        shape: of the working tensor, but for its rows.
        tokens: the branch is (rows, tokens, C) of a (rows, C, frames, height, width), a leading frame perhaps
            left out.
        frames: the scheduler holds the frames of (rows, C, frames, ...) as rows of their own; 0: it does not.
        copies: the scheduler holds the batch that many times over.
        channels: only the first `channels` are guided, the others follow the conditional branch; 0: all.
    """

    shape: tuple[int, ...]
    dim: int = 0
    start: int = 0
    stop: int | None = None
    sign: int = 1
    tokens: bool = False
    frames: int = 0
    copies: int = 1
    channels: int = 0

    def __call__(self, y: Tensor) -> Tensor:
        y = self.part(y)
        return y if self.sign == 1 else -y

    def part(self, y: Tensor) -> Tensor:
        """The same, but for the sign."""
        if self.tokens:
            y = y.transpose(1, 2).unflatten(2, (-1, *self.shape[2:]))[:, :, -self.shape[1] :]
        if self.stop is not None:
            y = y.narrow(self.dim, self.start, self.stop - self.start)
        return y.reshape(-1, *self.shape)

    def working(self, t: Tensor) -> Tensor:
        """A tensor of the scheduler's, one row per sample."""
        if self.frames:
            return t.unflatten(0, (-1, self.frames)).transpose(1, 2)
        if self.copies > 1:
            t = t[: t.shape[0] // self.copies]
        return t[:, : self.channels] if self.channels else t

    def rest(self, t: Tensor, of: Tensor) -> Tensor:
        """The unguided channels of a branch or of the scheduler's tensor `t`, as many as `of`, the latter, has."""
        rest = t[:, self.channels : of.shape[1]].to(of.dtype)
        return rest if t is of or self.sign == 1 else -rest

    def holds(self, output: Tensor) -> bool:
        """Whether all of the scheduler's `output` is told by one row per sample: copies must be equal."""
        return self.copies == 1 or torch.equal(self.emit(self.working(output), output), output)

    def emit(self, prediction: Tensor, output: Tensor) -> Tensor:
        """A working prediction as the scheduler holds `output`."""
        if self.frames:
            return prediction.transpose(1, 2).flatten(0, 1)
        if self.channels:
            prediction = torch.cat([prediction, output[: prediction.shape[0], self.channels :]], 1)
        return torch.cat([prediction] * self.copies) if self.copies > 1 else prediction

    def __str__(self) -> str:
        part = "" if self.stop is None else f"[dim {self.dim}: {self.start}..{self.stop}]"
        layout = [
            *(["unpacked"] if self.tokens else []),
            *([f"{self.frames} frames apart"] if self.frames else []),
            *([f"{self.copies} times"] if self.copies > 1 else []),
            *([f"first {self.channels} channels"] if self.channels else []),
        ]
        return f"{'-' if self.sign < 0 else ''}output{part}{' ' if layout else ''}{', '.join(layout)}"


def views(branch: torch.Size, target: torch.Size, sample: torch.Size | None = None) -> Iterator[View]:
    """The views between a branch of shape `branch` and a scheduler's prediction of shape `target`, plain ones first."""
    parts: list[View] = []
    rows, shape = branch[0], tuple(target[1:])
    if target[0] == rows:
        parts = list(_parts(branch, target, sample))
    elif len(branch) == 5 and target[0] == rows * branch[2] and shape == (branch[1], *branch[3:]):
        parts = [View(tuple(branch[1:]), frames=branch[2])]
    elif target[0] == 2 * rows:
        parts = [replace(view, copies=2) for view in _parts(branch, torch.Size((rows, *shape)), sample)]
    for sign, part in itertools.product((1, -1), parts):
        yield replace(part, sign=sign)


def _parts(branch: torch.Size, target: torch.Size, sample: torch.Size | None) -> Iterator[View]:
    shape = tuple(target[1:])
    if branch.numel() == target.numel():
        yield View(shape)
    if len(branch) == len(target):
        differing = [i for i, (h, t) in enumerate(zip(branch, target, strict=True)) if h != t]
        if len(differing) == 1 and branch[differing[0]] > target[differing[0]]:
            dim, whole, kept = differing[0], branch[differing[0]], target[differing[0]]
            yield View(shape, dim, 0, kept)
            yield View(shape, dim, whole - kept, whole)
        if differing in ([], [1]) and len(shape) > 1 and branch[1] >= shape[0]:
            # Learned variance: the scheduler gets more channels than are guided.
            known = [sample[1]] if sample is not None and sample[1] < shape[0] else []
            for channels in dict.fromkeys([*known, *range(shape[0] - 1, 0, -1)]):
                yield View((channels, *shape[1:]), 1, 0, channels, channels=channels)
    if len(branch) == 3 and len(target) == 5 and branch[2] == target[1]:
        frame = target[3] * target[4]
        if branch[1] % frame == 0 and branch[1] // frame in (target[2], target[2] + 1):
            yield View(shape, tokens=True)


@dataclass(frozen=True)
class Around:
    """What a pipeline's treatment of its predictions at a step may depend on beside them.

    Args:
        sample: the scheduler's; None: not known.
        space: of the scheduler's predictions; None: not known.
        rescale: the call's `guidance_rescale`.
        norm: the call's `cfg_normalization`.
    """

    sample: Tensor | None = None
    space: Space | None = None
    rescale: float = 0.0
    norm: float = 0.0

    def through(self, view: View) -> "Around":
        """The same with a sample of the view's rows."""
        return self if self.sample is None else replace(self, sample=view.working(self.sample))

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
"""Of a mixture with the sample of which only the numbers are known, at every step anew."""


def rescale(g: Tensor, c: Tensor, around: Around) -> Tensor:
    """The pipelines' `guidance_rescale` (arXiv 2305.08891, eq. 15-16), in their own order of operations."""
    dim, phi = list(range(1, c.ndim)), around.rescale
    ratio = c.std(dim=dim, keepdim=True) / g.std(dim=dim, keepdim=True)
    return phi * (g * ratio) + (1 - phi) * g


def match_norm(g: Tensor, c: Tensor, around: Around) -> Tensor:
    """The conditional prediction's norm along the last dimension (Qwen-Image, Lumina 2 and kin)."""
    return g * (torch.norm(c, dim=-1, keepdim=True) / torch.norm(g, dim=-1, keepdim=True))


def cap_norm(g: Tensor, c: Tensor, around: Around) -> Tensor:
    """The same, but only where that is the smaller one (LongCat-Image)."""
    cond_norm, norm = torch.norm(c, dim=-1, keepdim=True), torch.norm(g, dim=-1, keepdim=True)
    return g * (cond_norm / (norm + 1e-8)).clamp(min=0.0, max=1.0)


def cap_whole_norm(g: Tensor, c: Tensor, around: Around) -> Tensor:
    """At most `cfg_normalization` times the conditional prediction's norm, of a sample as a whole (Z-Image)."""
    limit, norm = (torch.linalg.vector_norm(t, dim=list(range(1, t.ndim)), keepdim=True) for t in (c, g))
    return g * (limit * around.norm / norm).clamp(max=1.0)


def leave(g: Tensor, c: Tensor, around: Around) -> Tensor:
    return g


FINISHES: dict[str, Callable[[Tensor, Tensor, Around], Tensor]] = {
    # Where the call asks for it, before the plain combination, which is the same thing until the cap is reached.
    "at most the norm of c as a whole": cap_whole_norm,
    "": leave,
    "guidance_rescale": rescale,
    "norm of c": match_norm,
    "at most the norm of c": cap_norm,
}
"""What is done to a combination g, given c."""


def _finishes(around: Around) -> list[str]:
    """Those that a call like this may ask for."""
    asked = {"guidance_rescale": around.rescale > 0, "at most the norm of c as a whole": around.norm > 0}
    return [name for name in FINISHES if asked.get(name, True)]


Scale = float | Tensor | tuple[float, float]
"""A pipeline's guidance scale; a tensor where one prediction is guided at several, two where it has three branches."""


def read(value: Any, output: Tensor) -> float | Tensor | None:
    """A number, whatever its type, or a tensor of them that can be multiplied with `output`; None: neither."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 1 and value.ndim == output.ndim:
        fitting = all(n in (1, m) for n, m in zip(value.shape, output.shape, strict=True))
        return value if fitting else None
    if getattr(value, "shape", None) is not None and math.prod(value.shape) == 1 and hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    return float(value) if math.isfinite(value) else None


def from_u(c: Tensor, u: Tensor, s: Any) -> Tensor:
    return u + s * (c - u)


def from_c(c: Tensor, u: Tensor, s: Any) -> Tensor:
    return c + s * (c - u)


def weighted(c: Tensor, u: Tensor, s: Any) -> Tensor:
    return s * c + (1 - s) * u


def weighted_from_c(c: Tensor, u: Tensor, s: Any) -> Tensor:
    return (1 + s) * c - s * u


def added(c: Tensor, u: Tensor, s: Any) -> Tensor:
    return u + s * (c - u) if isinstance(s, Tensor) else torch.add(u, c - u, alpha=s)


def lerp(c: Tensor, u: Tensor, s: Any) -> Tensor:
    return torch.lerp(u, c, s.to(u.dtype) if isinstance(s, Tensor) else s)


def by_difference(c: Tensor, u: Tensor, s: Any) -> Tensor:
    return c + (s - 1) * (c - u)


def in_float32(c: Tensor, u: Tensor, s: Any) -> Tensor:
    working = torch.promote_types(c.dtype, torch.float32)
    return from_u(c.to(working), u.to(working), s)


ANCHORS: dict[str, Callable[[Tensor, Tensor, Any], Tensor]] = {
    "u": from_u,
    "c": from_c,
    "lerp": lerp,
    "denoised": by_difference,
    "difference": by_difference,
    "weighted": weighted,
    "weighted from c": weighted_from_c,
    "added": added,
    "in float32": in_float32,
}
"""Ways to write a combination; each rounds in a way of its own."""


FROM_C = ("c", "weighted from c")
"""Those whose scale counts from 0: w = 1 + s."""


class Trio(NamedTuple):
    """A way to write a combination of three branches, c and two others, at two scales.

    Args:
        combine: the combination of (c, a, b) at (s, t).
        weights: of (c, a, b) in it.
    """

    combine: Callable[[Tensor, Tensor, Tensor, float, float], Tensor]
    weights: Callable[[float, float], tuple[float, float, float]]


TRIOS = {
    # InstructPix2Pix: a is guided by the image alone, b by nothing.
    "image": Trio(lambda c, a, b, s, t: b + s * (c - a) + t * (a - b), lambda s, t: (s, t - s, 1 - t)),
    # Perturbed attention: a is guided by nothing, b is perturbed.
    "perturbed": Trio(lambda c, a, b, s, t: a + s * (c - a) + t * (c - b), lambda s, t: (s + t, 1 - s, -t)),
}


@dataclass(frozen=True)
class Formula:
    """model_output = finish(u + w (c - u)), with c and u cut out of the denoiser's outputs.

    Of more than two branches, u is the affine combination of the others that makes this so: any affine
    combination sum_k w_k y_k (sum_k w_k = 1) is c + (w_c - 1) (c - u) with u = sum_{k != c} w_k y_k / (1 - w_c).

    Args:
        batched: one call on all branches, else one call for each.
        branches: how many predictions of a sample a guided step evaluates.
        cond_index: which of them is the conditional one.
        view: from a branch to the scheduler's prediction and back.
        anchor: how it is written, a line of ANCHORS: "u" for `u + s (c - u)`, where w = s; "c" for `c + s (c - u)`,
            where w = 1 + s; "denoised" for the first of denoised predictions, which is also where it is finished
            (LTX-2). Of three branches, one of TRIOS.
        upcast: whether c and u are taken to the scheduler's dtype before they are combined, or the result is.
        finish: what is done to the combination.
        scale: the name its scale is read by; None: solved for at every step.
        rows: samples in the batch.
        dtype: the scheduler's.
        weights: of the other branches in u, in their order; they sum to 1.
        mixed: what the network predicts, a line of NETWORKS; "": what the scheduler wants; or SOLVED.
        meets: what is combined then: "denoised" predictions, the network's "own", or what the scheduler "wants".
        second: the name of a trio's second scale.
        trio: which branches are a trio's (c, a, b).
        value: its scale where it was found.
        noise: what rounding may do to it, as a share of the largest terms; 0: nothing, it holds bit for bit.
        exact: whether it gave the output bit for bit where it was found.
        widens: whether its scale is a tensor of one number in the scheduler's dtype, which products with it take.
    """

    batched: bool
    branches: int
    cond_index: int
    view: View
    anchor: str
    upcast: bool
    finish: str
    scale: str | None
    rows: int
    dtype: torch.dtype
    weights: tuple[float, ...] = (1.0,)
    mixed: str = ""
    meets: str = "denoised"
    second: str | None = None
    trio: tuple[int, ...] = ()
    value: Scale = 1.0
    noise: float = 0.0
    exact: bool = False
    widens: bool = False

    @property
    def calls(self) -> int:
        """Of the denoiser, at a guided step."""
        return 1 if self.batched else self.branches

    @property
    def others(self) -> list[int]:
        """Which branches a sample without guidance leaves out."""
        return [i for i in range(self.branches) if i != self.cond_index]

    @property
    def is_read(self) -> bool:
        """Whether its scale is read off the pipeline, so that nothing has to be solved for at each step."""
        return self.scale is not None and not self.mixed

    @property
    def is_direct(self) -> bool:
        """Whether the scheduler gets the combination itself, one row per sample."""
        view = self.view
        return not self.finish and not view.frames and view.copies == 1 and not view.channels

    def parts(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The branches of a step's outputs."""
        return outputs[0].chunk(self.branches) if self.batched else outputs

    def halves(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(cond, uncond) as the denoiser put them out, from a step's outputs."""
        parts = self.parts(outputs)
        cond = parts[self.cond_index]
        return cond, self.away(parts).to(cond.dtype)

    def away(self, parts: Sequence[Tensor]) -> Tensor:
        """u, of all branches; of more than two in float32 at least."""
        others = [parts[i] for i in self.others]
        if len(others) == 1:
            return others[0]
        working = torch.promote_types(others[0].dtype, torch.float32)
        uncond = sum(weight * part.to(working) for weight, part in zip(self.weights, others, strict=True))
        return uncond  # type: ignore[return-value]

    def seen(self, half: Tensor, around: Around) -> Tensor:
        """A half as the scheduler would get it, one row per sample."""
        return self.handed(self.view(half), around)

    def handed(self, y: Tensor, around: Around) -> Tensor:
        """The same of what the view has been through; where the sample is mixed in, in float32 at least."""
        if self.mixed not in NETWORKS:
            return self.treated(y, around)
        x, space = around.known
        working = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        alpha, beta, _ = NETWORKS[self.mixed].mixing(space)
        return alpha * x.to(working) + beta * y.to(working)

    def treated(self, y: Tensor, around: Around) -> Tensor:
        """As it is combined with the other one."""
        y = y.to(self.dtype) if self.upcast else y
        if self.mixed in NETWORKS and self.meets != "own":
            y = NETWORKS[self.mixed].denoised(y, around)
        return self._wanted(y, around) if self.meets == "wants" else y

    def _wanted(self, denoised: Tensor, around: Around) -> Tensor:
        return NETWORKS[self.mixed].predicted(denoised, around)

    def cut(self, outputs: Sequence[Tensor], around: Around) -> tuple[Tensor, Tensor]:
        """(c, u) as the scheduler would get them, from a step's outputs."""
        cond, uncond = self.halves(outputs)
        return self.seen(cond, around), self.seen(uncond, around)

    def at(self, s: Scale) -> "Formula":
        """This formula where its scale is `s`: that of a trio has a part in u."""
        if not isinstance(s, tuple):
            return self
        w, *weights = TRIOS[self.anchor].weights(*s)
        by_branch = dict(zip(self.trio[1:], weights, strict=True))
        # At w = 1 nothing of the others is left, and any u will do.
        return replace(self, weights=tuple(by_branch[i] / (1 - w) for i in self.others) if w != 1 else (0.5, 0.5))

    def read(self, scales: Scales, output: Tensor) -> Scale | None:
        """Its scale, as the pipeline has it now; None where that cannot be told."""
        found = [read(scales[name](), output) if name in scales else None for name in (self.scale, self.second) if name]
        if self.second is None:
            return found[0]
        s, t = found
        return (s, t) if isinstance(s, float) and isinstance(t, float) else None

    def reproduce(self, outputs: Sequence[Tensor], s: Scale, around: Around) -> Tensor:
        """What the pipeline hands to the scheduler at its scale `s`, one row per sample."""
        return self.combined([self.treated(self.view(part), around) for part in self.parts(outputs)], s, around)

    def combined(self, parts: Sequence[Tensor], s: Scale, around: Around) -> Tensor:
        """The same, of `treated` branches."""
        if isinstance(s, tuple):
            c, a, b = (parts[i] for i in self.trio)
            return TRIOS[self.anchor].combine(c, a, b, *s).to(self.dtype)
        c, u = parts[self.cond_index], self.away(parts)
        if self.mixed in NETWORKS:
            g = self.anchored(c, u, s)
            g = NETWORKS[self.mixed].denoised(g, around) if self.meets == "own" else g
            return (g if self.meets == "wants" else self._wanted(g, around)).to(self.dtype)
        if self.anchor == "denoised":
            c, u = around.denoised(c), around.denoised(u)
        return self._finished(self.anchored(c, u, s), c, around)

    def anchored(self, c: Tensor, u: Tensor, s: Any) -> Tensor:
        """The combination alone, of two halves as they are combined."""
        if self.widens and not isinstance(s, Tensor):
            s = torch.full((1,), s, dtype=self.dtype, device=c.device)
        return ANCHORS[self.anchor](c, u, s)

    def finished(self, g: Tensor, c: Tensor, around: Around) -> Tensor:
        """The pipeline's own treatment of a combined prediction."""
        if not self.finish:
            return g.to(self.dtype)
        if self.anchor == "denoised":
            g, c = around.denoised(g), around.denoised(c)
        return self._finished(g, c, around)

    def _finished(self, g: Tensor, c: Tensor, around: Around) -> Tensor:
        g = FINISHES[self.finish](g, c, around)
        return (around.predicted(g) if self.anchor == "denoised" else g).to(self.dtype)

    @property
    def needs_space(self) -> bool:
        """Whether it can only be followed where sample and space are known."""
        return self.anchor == "denoised" or self.mixed in NETWORKS

    @property
    def is_stable(self) -> bool:
        """Whether the same numbers give the same bits in any layout: nothing is summed up, nothing fused."""
        return not self.finish and not self.needs_space and self.anchor not in ("lerp", "added")

    def terms(self, y: Tensor, around: Around) -> Tensor:
        """`y`, one of `cut`, as large as what the pipeline computes with: so much may be lost to rounding."""
        if not self.needs_space:
            return y
        x, space = around.known
        times = NETWORKS[self.mixed].mixing(space)[2] if self.mixed else 2 * abs(space.a / space.b)
        return y.abs() + times * x.abs()

    def residual(
        self, expected: Tensor, output: Tensor, c: Tensor, u: Tensor, s: Scale, around: Around, is_strict: bool = True
    ) -> "Residual":
        """Compares what it makes of (c, u), of `cut`, with the pipeline's own; it allows what rounding may do.

        Args:
            is_strict: whether a formula that was exact must be so again; else it may be off in its last digits.
        """
        eps = max(torch.finfo(c.dtype).eps, torch.finfo(self.dtype).eps)
        if self.exact and self.is_stable and is_strict:
            noise, floor = 0.0, 0.0
        elif self.exact and self.is_stable:
            noise, floor = 0.0, eps / 16
        elif not self.needs_space and (self.finish or self.exact):  # it rounds nothing larger than what comes out
            noise, floor = 0.0, 4 * eps
        else:
            noise, floor = self.noise or torch.finfo(c.dtype).eps, 0.0
        return residual(expected, output, self.terms(c, around), self.terms(u, around), s, noise, floor)

    def w(self, s: Scale) -> float:
        """The guidance scale that the pipeline's scale `s` amounts to, the largest where there are several."""
        if isinstance(s, tuple):
            return TRIOS[self.anchor].weights(*s)[0]
        largest = float(s.max() if isinstance(s, Tensor) else s)
        return 1 + largest if self.anchor in FROM_C else largest

    def __str__(self) -> str:
        names = ["cond" if i == self.cond_index else "uncond" for i in range(self.branches)]
        calls = (
            f"one call on [{', '.join(names)}]" if self.batched else f"{self.branches} calls, {' then '.join(names)}"
        )
        finish = f", then {self.finish}" if self.finish else ""
        finish += ", mixed with the sample" if self.mixed else ""
        finish += f" to turn {self.mixed} into what the scheduler wants" if self.mixed in NETWORKS else ""
        s = self.scale if self.scale and not self.second else "s"
        combination = {
            "lerp": f"lerp(u, c, {s})",
        }.get(self.anchor, f"{'c' if self.anchor in FROM_C else 'u'} + {s} (c - u)")
        return f"{calls}; {self.view}; {combination}{finish}"


class Fit(NamedTuple):
    """How far a reproduction is off: the error's norm, and the norm rounding allows."""

    error: float
    allowed: float

    @property
    def equal(self) -> bool:
        return self.error == 0

    @property
    def fits(self) -> bool:
        return self.error <= self.allowed


class Residual(NamedTuple):
    """What a `Fit` is made of, still on the device: nobody waits for it until `norms` is read."""

    norms: Tensor
    """(4,): of the error, of the output, of c and of u."""
    s: Scale
    noise: float
    """What rounding may do, as a share of the largest terms."""
    floor: float = 0.0
    """And of the output alone."""

    def fit(self, norms: Sequence[float]) -> Fit:
        """The fit, from `norms` as they have been read."""
        error, output, c, u = norms
        s = self.s
        largest = (
            float(s.abs().max()) if isinstance(s, Tensor) else max(map(abs, s)) if isinstance(s, tuple) else abs(s)
        )
        # Every order of operations rounds terms no larger than these, each by less than eps.
        return Fit(error, self.noise * (output + largest * (c + u)) + self.floor * output)


def exact(x: Tensor) -> Tensor:
    """In float64 on the host: not every device has it."""
    return x.detach().cpu().double()


def norm(x: Tensor) -> float:
    """Over everything, in float32 where that is more."""
    return float(_norm(x))


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.detach(), dtype=torch.promote_types(x.dtype, torch.float32))


def residual(
    expected: Tensor, output: Tensor, c: Tensor, u: Tensor, s: Scale, noise: float | None = None, floor: float = 0.0
) -> Residual:
    """Compares a reproduced model output with the pipeline's own, as computed from c and u in their dtype.

    What is not finite counts as zero, so that the same numbers must be broken in both, and the others agree.

    Args:
        noise: what rounding may do. Default: all that it can in the dtype of c.
    """
    noise = torch.finfo(c.dtype).eps if noise is None else noise
    if expected.shape != output.shape:
        return Residual(torch.tensor([float("inf"), 0, 0, 0]), s, noise, floor)
    expected, output = (t.nan_to_num(0, 0, 0) for t in (expected, output))
    # Each in a pass of its own: what is large is not copied to be compared.
    norms = torch.stack([_norm(t) for t in (expected - output, output, c.nan_to_num(0, 0, 0), u.nan_to_num(0, 0, 0))])
    return Residual(norms, s, noise, floor)


def mixture(output: Tensor, *vectors: Tensor) -> tuple[list[float], Fit]:
    """Least squares of `output` on `vectors`, and how well that explains it.

    Numbers that are not finite must be so in both, and have no say in the rest.
    """
    basis = torch.stack([exact(v).flatten() for v in vectors], 1)
    y = exact(output).flatten()
    finite = torch.isfinite(basis).all(1)
    if not (torch.equal(finite, torch.isfinite(y)) and finite.any()):
        return [float("nan")] * len(vectors), Fit(float("inf"), 0.0)
    basis, y = basis[finite], y[finite]
    factors = torch.linalg.lstsq(basis, y).solution
    terms = float((factors.abs() * basis.norm(dim=0)).sum())
    eps = torch.finfo(output.dtype).eps
    error = float((basis @ factors - y).norm())
    return factors.tolist(), Fit(error, 2 * eps * (float(y.norm()) + terms))
