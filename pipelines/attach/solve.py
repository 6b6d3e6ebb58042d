"""The scale at which a plain formula gives a pipeline's number bit for bit, where nobody can read it."""

import math
from collections.abc import Callable, Iterable
from functools import partial

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
    search = _bisected if formula.anchor in _MONOTONE else _narrowed
    for _ in range(4):
        c, u, target = few
        found = search(partial(_made, formula), c, u, target, near, span)
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


def _narrowed(
    made: Callable[[Tensor, Tensor, float], Tensor], c: Tensor, u: Tensor, target: Tensor, near: float, span: float
) -> float | None:
    """A scale at which a sum of two terms gives `target`, if none further than `span` of itself away does too.

    Between two scales each term lies between what it is at both, and so does the rounded sum: where that excludes
    one number of the target, none of the scales between fits.
    """
    zero = torch.zeros_like(c)

    def fits(s: float) -> bool:
        return torch.equal(made(c, u, s), target)

    def may_fit(low: float, high: float) -> bool:
        ends = [(made(c, zero, s), made(zero, u, s)) for s in (low, high)]
        least, most = (
            torch.stack([pick(*terms) for terms in zip(*ends, strict=True)]).sum(0)
            for pick in (torch.minimum, torch.maximum)
        )
        least, most, there = (t.to(c.dtype) for t in (least, most, target))  # rounded where the sum may be
        return bool(((least <= there) & (there <= most)).all())

    def is_telling(s: float) -> bool:
        off = span * max(abs(s), 0.1)
        return not (fits(s - off) or fits(s + off))

    for s in dict.fromkeys(float(f"{near:.{digits}g}") for digits in range(1, 7)):
        if fits(s):
            return s if is_telling(s) else None
    reach = 0.1 * max(abs(near), 1.0)
    waiting = [(near - reach, near + reach)]
    for _ in range(400):
        if not waiting:
            return None
        low, high = waiting.pop()
        middle = (low + high) / 2
        if fits(middle):
            return middle if is_telling(middle) else None
        if may_fit(low, high):
            halves = [(low, middle), (middle, high)]
            waiting += halves[::-1] if near < middle else halves  # the last is searched first
    return None


def _bisected(
    made: Callable[[Tensor, Tensor, float], Tensor], c: Tensor, u: Tensor, target: Tensor, near: float, span: float
) -> float | None:
    """The middle of all scales that give `target`, if they are less than `span` of themselves apart."""
    along = (c.float() - u.float()).sign()

    def side(s: float) -> int | None:
        """1: s is too large, -1: too small, 0: it fits; None: both, for different numbers."""
        off = (made(c, u, s).float() - target.float()) * along
        high, low = bool((off > 0).any()), bool((off < 0).any())
        return None if high and low else int(high) - int(low)

    if not torch.equal(made(c, u, near)[along == 0], target[along == 0]):
        return None
    reach = 0.1 * max(abs(near), 1.0)
    low, high, fitting = near - reach, near + reach, None
    while high - low > 1e-9 * reach:
        middle = (low + high) / 2
        found = side(middle)
        if found is None:
            return None
        if found == 0:
            fitting = middle
            break
        low, high = (low, middle) if found > 0 else (middle, high)
    if fitting is None:
        return None
    least, most = fitting, fitting
    for _ in range(12):
        middle = (low + least) / 2
        low, least = (low, middle) if side(middle) == 0 else (middle, least)
        middle = (most + high) / 2
        most, high = (middle, high) if side(middle) == 0 else (most, middle)
    if most - least > span * max(abs(fitting), 0.1):
        return None
    middle = (least + most) / 2
    rounded = (float(f"{middle:.{digits}g}") for digits in range(1, 8))
    return next((s for s in rounded if least <= s <= most), middle)
