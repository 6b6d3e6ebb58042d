"""Finding the terms behind a step of more than two branches: how its calls hold them, and what they weigh.

`terms.py` has the algebra. What is solved for here is verified by the caller, on all numbers.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor

from diffusers_guidance.pipelines.attach.combination import Around
from diffusers_guidance.pipelines.attach.formula import Formula
from diffusers_guidance.pipelines.attach.terms import Apart, Terms, Weights, candidates, trees, weigh

MOST = 5
"""Branches of a step."""
_DOUBT = 0.01
"""How far weights may be off, as a share of their size."""


@dataclass(frozen=True)
class Asked:
    """What tells how branches hang together; asked for only where there are more than two.

    Args:
        scales: every number of the pipeline or its call that is called a scale, by name.
        apart: how far the branches of a layout are apart by what they were made from.
        pair: (cond, uncond) of one that is known.
        alike: whether all branches of a layout were made from the same, so that none is unconditional.
    """

    scales: Callable[[], Mapping[str, float]] = dict
    apart: Callable[[Formula], Apart | None] = lambda formula: None
    pair: Callable[[Formula], tuple[int, int] | None] = lambda formula: None
    alike: Callable[[Formula], bool] = lambda formula: False

    def trees(self, formula: Formula, weights: Weights | None) -> list[Terms]:
        """How the branches of a layout may hang together, given what they weigh."""
        if weights is None:
            return []
        size = sum(abs(value) for value in weights.values if not math.isnan(value))
        if weights.doubt > _DOUBT * size:
            return []
        return trees(weights, self.scales(), self.apart(formula), self.pair(formula), self.alike(formula))

    def candidates(self, formula: Formula) -> list[Terms]:
        """How they may, at scales read by name."""
        told = self.apart(formula), self.pair(formula), self.alike(formula)
        return candidates(formula.evaluations, self.scales(), *told)


NOTHING = Asked()


def layouts(outputs: Sequence[Tensor]) -> Iterator[tuple[bool, int, list[Tensor]]]:
    """(batched, further calls, branches): how the step's calls may be split into branches."""
    first, *others = outputs
    rows = first.shape[0]
    if not others:
        yield from ((True, 0, list(first.chunk(n))) for n in range(2, MOST + 1) if rows % n == 0)
    elif len({y.shape for y in outputs}) == 1:
        if len(outputs) <= MOST:
            yield False, 0, list(outputs)
    elif len({y.shape for y in others}) == 1 and first.shape[1:] == others[0].shape[1:]:
        n, left = divmod(rows, others[0].shape[0])
        if not left and n > 1 and n + len(others) <= MOST:
            yield True, len(others), [*first.chunk(n), *others]


def sums(formula: Formula, around: Around) -> Iterator[Formula]:
    """The ways in which branches may be summed up, plain ones first."""
    yield formula
    yield replace(formula, anchor="denoised")
    if around.rescale > 0:
        yield replace(formula, finish="guidance_rescale")
        yield replace(formula, finish="guidance_rescale", anchor="denoised")


def weighed(formula: Formula, parts: Sequence[Tensor], target: Tensor, around: Around) -> Weights | None:
    """What the `treated` branches weigh in the scheduler's `target`; of a sample of numbers, all sampled alike.

    A finish multiplies each row by a factor of its own, so that rows are solved for apart.
    """
    ys = formula.as_weighed(parts, around)
    y = (around.denoised(target) if formula.anchor == "denoised" else target).to(ys[0].dtype)
    eps = max(torch.finfo(each.dtype).eps for each in (parts[0], target))
    if not formula.finish:
        return weigh(ys, y, eps=eps)
    found = [weigh([each[i] for each in ys], y[i], affine=False, eps=eps) for i in range(len(y))]
    known = [each for each in found if each is not None]
    if not known:
        return None
    # Where a row's unconditional branch was skipped, others tell more.
    same = max((each.same for each in known), key=lambda same: len({*same}))
    known = [each for each in known if each.same == same]
    values = [[v for v in column if not math.isnan(v)] for column in zip(*(each.values for each in known), strict=True)]
    mean = tuple(fmean(column) if column else math.nan for column in values)
    return Weights(mean, max(each.doubt for each in known), same)
