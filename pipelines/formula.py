"""Finding out how a pipeline turns its denoiser's outputs into the prediction it hands to the scheduler.

Classifier-free guidance differs between pipelines in a handful of independent ways: one call on a doubled
batch or two calls, in either order; which part of the output counts, and with which sign; `u + s (c - u)` or
`c + s (c - u)`; in which precision; and what is done to the result (`finish`). `identify` searches their
product for the one that reproduces the pipeline's own number, so no table of pipelines is needed and a wrong
guess cannot pass: exact equality with the pipeline's live scale first, equality up to rounding next, and last
a scale solved for by least squares. Residuals are measured against c - u, not against the prediction.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

Scales = Mapping[str, Callable[[], Any]]
"""Where the pipeline's guidance scale may be read, by name."""


@dataclass(frozen=True)
class View:
    """From a half of the denoiser's output to the scheduler's prediction: `sign * y[dim: start..stop]`, reshaped."""

    shape: tuple[int, ...]
    dim: int = 0
    start: int = 0
    stop: int | None = None
    sign: int = 1

    def __call__(self, y: Tensor) -> Tensor:
        if self.stop is not None:
            y = y.narrow(self.dim, self.start, self.stop - self.start)
        y = y.reshape(-1, *self.shape[1:])
        return y if self.sign == 1 else -y

    def __str__(self) -> str:
        part = "" if self.stop is None else f"[dim {self.dim}: {self.start}..{self.stop}]"
        return f"{'-' if self.sign < 0 else ''}output{part}"


def views(half: torch.Size, target: torch.Size) -> Iterator[View]:
    """The views that take a tensor of shape `half` to one of shape `target`, the plain one first."""
    shape = tuple(target)
    parts: list[View] = []
    if half.numel() == target.numel() and half[0] == target[0]:
        parts = [View(shape)]
    elif len(half) == len(target) and half[0] == target[0]:
        differing = [i for i, (h, t) in enumerate(zip(half, target, strict=True)) if h != t]
        if len(differing) == 1 and half[differing[0]] > target[differing[0]]:
            dim, whole, kept = differing[0], half[differing[0]], target[differing[0]]
            parts = [View(shape, dim, 0, kept), View(shape, dim, whole - kept, whole)]
    for sign in (1, -1):
        for part in parts:
            yield View(part.shape, part.dim, part.start, part.stop, sign)


def rescale(g: Tensor, c: Tensor, phi: float) -> Tensor:
    """The pipelines' `guidance_rescale` (arXiv 2305.08891, eq. 15-16), in their own order of operations."""
    dim = list(range(1, c.ndim))
    ratio = c.std(dim=dim, keepdim=True) / g.std(dim=dim, keepdim=True)
    return phi * (g * ratio) + (1 - phi) * g


def match_norm(g: Tensor, c: Tensor, phi: float) -> Tensor:
    """The conditional prediction's norm along the last dimension (Qwen-Image, Lumina 2 and kin)."""
    return g * (torch.norm(c, dim=-1, keepdim=True) / torch.norm(g, dim=-1, keepdim=True))


def leave(g: Tensor, c: Tensor, phi: float) -> Tensor:
    return g


FINISHES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "": leave,
    "guidance_rescale": rescale,
    "norm of c": match_norm,
}


@dataclass(frozen=True)
class Formula:
    """model_output = finish(u + w (c - u)), with c and u cut out of the denoiser's outputs.

    Args:
        batched: one call on both halves, else one call for each.
        cond_index: which half, or which call, is the conditional one.
        view: from a half to the scheduler's prediction.
        anchor: "u" for `u + s (c - u)`, where w = s; "c" for `c + s (c - u)`, where w = 1 + s.
        upcast: whether c and u are taken to the scheduler's dtype before they are combined, or the result is.
        finish: what is done to the combination.
        scale: the name its scale is read by; None: solved for at every step.
        rows: samples in the batch.
    """

    batched: bool
    cond_index: int
    view: View
    anchor: str
    upcast: bool
    finish: str
    scale: str | None
    rows: int
    dtype: torch.dtype

    @property
    def uncond_index(self) -> int:
        return 1 - self.cond_index

    def halves(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(cond, uncond) as the denoiser put them out, from a step's outputs."""
        pair = outputs[0].chunk(2) if self.batched else outputs
        return pair[self.cond_index], pair[self.uncond_index]

    def seen(self, half: Tensor) -> Tensor:
        """A half as the scheduler would get it."""
        y = self.view(half)
        return y.to(self.dtype) if self.upcast else y

    def combine(self, c: Tensor, u: Tensor, s: float, phi: float) -> Tensor:
        """What the pipeline hands to the scheduler for (c, u) at its scale `s`."""
        return self.finished((u if self.anchor == "u" else c) + s * (c - u), c, phi)

    def finished(self, g: Tensor, c: Tensor, phi: float) -> Tensor:
        """The pipeline's own treatment of a combined prediction."""
        return FINISHES[self.finish](g, c, phi).to(self.dtype)

    def w(self, s: float) -> float:
        """The guidance scale that the pipeline's scale `s` amounts to."""
        return float(s) if self.anchor == "u" else 1 + float(s)

    def solve(self, c: Tensor, u: Tensor, output: Tensor) -> float:
        """The scale that explains `output` best; only where the combination is handed on as it is."""
        c, u, output = c.double(), u.double(), output.double()
        d = c - u
        origin = u if self.anchor == "u" else c
        return float(((output - origin) * d).sum() / (d * d).sum())

    def __str__(self) -> str:
        order = ["cond", "uncond"] if self.cond_index == 0 else ["uncond", "cond"]
        calls = "one call on [{}, {}]" if self.batched else "two calls, {} then {}"
        finish = f", then {self.finish}" if self.finish else ""
        scale = self.scale or "s"
        return f"{calls.format(*order)}; {self.view}; {self.anchor} + {scale} (c - u){finish}"


class Residual(NamedTuple):
    """How far a reproduction is off: exactly equal or not, the error's norm, and the norm rounding allows."""

    equal: bool
    error: float
    allowed: float

    @property
    def fits(self) -> bool:
        return self.equal or self.error <= self.allowed


def norm(x: Tensor) -> float:
    return float(x.double().norm())


def residual(expected: Tensor, output: Tensor, c: Tensor, u: Tensor, s: float) -> Residual:
    """Compares a reproduced model output with the pipeline's own, as computed from c and u in their dtype."""
    if torch.equal(expected, output):
        return Residual(True, 0.0, 0.0)
    # Every order of operations rounds terms no larger than these, each by less than eps.
    allowed = torch.finfo(c.dtype).eps * (norm(output) + abs(s) * (norm(c) + norm(u)))
    return Residual(False, norm(expected - output), allowed)


class Identified(NamedTuple):
    """`formula` None: the halves agree so far, and any formula would fit; or nothing fits (see `tried`)."""

    formula: Formula | None
    undetermined: bool
    tried: str


def identify(outputs: Sequence[Tensor], output: Tensor, scales: Scales, phi: float) -> Identified:
    """Searches for the formula behind `output`, given the outputs of the step's one or two denoiser calls."""
    if len(outputs) == 1 and outputs[0].shape[0] == 2 * output.shape[0]:
        batched, pair = True, outputs[0].chunk(2)
    elif len(outputs) == 2 and outputs[0].shape == outputs[1].shape:
        batched, pair = False, tuple(outputs)
    else:
        return Identified(None, False, "the calls are not two halves of a batch")

    live = {name: value for name, get in scales.items() if (value := _number(get())) is not None}
    finishes = [name for name in FINISHES if phi > 0 or name != "guidance_rescale"]
    formulas = [
        Formula(batched, cond, view, anchor, upcast, finish, None, output.shape[0], output.dtype)
        for view in views(pair[0].shape, output.shape)
        for finish, upcast, cond, anchor in itertools.product(
            finishes, (False, True) if pair[0].dtype != output.dtype else (False,), (0, 1), ("u", "c")
        )
    ]
    best: tuple[float, str] = (float("inf"), "no part of the denoiser's output has the scheduler's shape")
    close: Formula | None = None
    undetermined = False
    for formula in formulas:
        c, u = formula.seen(pair[formula.cond_index]), formula.seen(pair[formula.uncond_index])
        d = c - u
        size = norm(d)
        if size <= 2 * torch.finfo(d.dtype).eps * norm(c):
            undetermined = True
            continue
        candidates: list[tuple[str | None, float]] = list(live.items())
        if not formula.finish:
            candidates.append((None, formula.solve(c, u, output)))
        for name, s in candidates:
            found = residual(formula.combine(c, u, s, phi), output, c, u, s)
            named = replace(formula, scale=name)
            if found.equal and formula.w(s) > 0:
                return Identified(named, False, "")
            # Rounding must not hide a wrong formula; and a solved scale fits either order of the halves, of
            # which the one that guides towards c is meant.
            if found.fits and found.allowed < 0.1 * abs(s) * size and formula.w(s) >= 1 and close is None:
                close = named
            best = min(
                best,
                (found.error / size, f"{named}, with s = {s:g}, is off by {found.error / size:.2g} |c - u|"),
            )
    if close is not None:
        return Identified(close, False, "")
    return Identified(None, undetermined and best[0] == float("inf"), best[1])


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)
