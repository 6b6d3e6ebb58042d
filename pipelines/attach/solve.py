"""The scale at which a plain formula gives a pipeline's number bit for bit, where nobody can read it."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from diffusers_guidance.pipelines.attach.formula import Formula
from diffusers_guidance.pipelines.attach.sample import SIZE, Sample, pieces

_MONOTONE = ("u", "c", "lerp", "added", "in float32")
"""Anchors of which each number rises or falls with the scale, however it is rounded."""
_SUMS = ("weighted",)
"""Those of which only both terms do, `s c` and `(1 - s) u`. All others are one of these at another scale."""
SOLVABLE = _MONOTONE + _SUMS

Triple = tuple[Tensor, ...]
"""(c, u, target)."""


def best(formula: Formula, c: Tensor, u: Tensor, target: Tensor) -> float:
    """The scale that explains a sample of the `target` best; see `Combination.invert`."""
    return formula.invert(*map(Sample(target.shape), (c, u, target)))


def solve(formula: Formula, c: Tensor, u: Tensor, target: Tensor) -> float | None:
    """The scale at which the formula gives `target` bit for bit, from c and u of `cut`; None: there is none.

    The scale at which it did so before is tried first.
    """
    before = formula.value
    if formula.exact and isinstance(before, float) and not _missed(formula, before, pieces(c, u, target)):
        return before
    few = [*map(Sample(target.shape), (c, u, target))]
    return solved(formula, (few[0], few[1], few[2]), lambda: pieces(c, u, target))


def solved(formula: Formula, few: Triple, whole: Callable[[], Iterable[Triple]]) -> float | None:
    """The same, decided on a `few` of the numbers and confirmed on the `whole`.

    Rounding is monotone, so that a scale too small for one number and too large for another never fits.
    """
    near, span = formula.invert(*few), 0.02
    finite = torch.stack([t.isfinite() for t in few]).all(0)
    few = tuple(t[finite] for t in few)
    if not math.isfinite(near) or not len(few[0]):
        return None
    for _ in range(4):
        found = _searched(formula, few, near, span)
        if found is None:
            return None
        missed = _missed(formula, found, whole())
        if not missed:
            return found
        few = tuple(torch.cat(each) for each in zip(few, *missed, strict=True))
    return None


def _made(formula: Formula, c: Tensor, u: Tensor, s: float) -> Tensor:
    return formula.anchored(c, u, s).to(formula.dtype)


def _missed(formula: Formula, s: float, whole: Iterable[Triple]) -> list[Triple]:
    """The first numbers, on the host, that the scale `s` does not give; what is not finite has no say."""
    missed: list[Triple] = []
    for c, u, target in whole:
        made = _made(formula, c, u, s)
        if not torch.equal(made, target):
            places = ((made != target) & target.isfinite()).flatten().nonzero().flatten()[:SIZE]
            missed += [tuple(t.flatten()[places].cpu() for t in (c, u, target))] * bool(len(places))
        if sum(len(each[0]) for each in missed) >= SIZE:
            break
    return missed


def _searched(formula: Formula, few: Triple, near: float, span: float) -> float | None:
    """A scale at which the formula gives a `few` numbers, if none further than `span` of itself away does too.

    Between two scales each term lies between what it is at both, and so does the rounded sum: where that excludes
    one number of the target, none of the scales between fits.
    """
    c, u, target = few
    zero, is_sum = torch.zeros_like(c), formula.anchor in _SUMS

    def fits(s: float) -> bool:
        return torch.equal(_made(formula, c, u, s), target)

    def terms(s: float) -> list[Tensor]:
        halves = [(c, zero), (zero, u)] if is_sum else [(c, u)]
        return [_made(formula, *each, s) for each in halves]

    def may_fit(low: float, high: float) -> bool:
        ends = [*zip(terms(low), terms(high), strict=True)]
        least, most = (torch.stack([pick(*each) for each in ends]).sum(0) for pick in (torch.minimum, torch.maximum))
        there = target
        if is_sum:  # rounded where the sum may be
            least, most, there = (t.to(c.dtype) for t in (least, most, target))
        return bool(((least <= there) & (there <= most)).all())

    def told(s: float) -> float | None:
        off = span * max(abs(s), 0.1)
        return None if fits(s - off) or fits(s + off) else s

    for s in dict.fromkeys(float(f"{near:.{digits}g}") for digits in range(1, 7)):
        if fits(s):
            return told(s)
    reach = 0.1 * max(abs(near), 1.0)
    precision = torch.finfo(torch.promote_types(c.dtype, torch.float32)).eps / 4
    waiting = [(near - reach, near + reach)]
    for _ in range(400):
        if not waiting:
            return None
        low, high = waiting.pop()
        middle = (low + high) / 2
        if high - low < precision * abs(middle):  # between these the arithmetic knows no other scale
            continue
        if fits(middle):
            return told(middle)
        if may_fit(low, high):
            halves = [(low, middle), (middle, high)]
            waiting += halves[::-1] if near < middle else halves  # the last is searched first
    return None
