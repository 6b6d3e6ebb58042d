"""Steps that evaluate one prediction of each sample: how the scheduler gets it.

Without guidance (at a scale of 1, in a distilled model) a step's output is the network's, as it is, or mixed with the
sample by two numbers, alpha x + beta y (Sana Sprint turns what its network predicts into what its scheduler wants).
That is a formula of one branch: no rule can act on it, but a policy may skip it as a whole.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusers_guidance.pipelines.attach.combination import SOLVED, Around
from diffusers_guidance.pipelines.attach.formula import Formula
from diffusers_guidance.pipelines.attach.layout import Layout, views
from diffusers_guidance.pipelines.attach.residual import mixture, norm
from diffusers_guidance.pipelines.attach.sample import Sample


def single(outputs: Sequence[Tensor], output: Tensor, around: Around, shows: bool = True) -> Formula | None:
    """How the scheduler's `output` follows from the step's only prediction; None: it does not, as far as is seen.

    Args:
        shows: whether the prediction must show in it: an output of zeros follows from anything.
    """
    if len(outputs) != 1 or outputs[0].shape[0] > output.shape[0]:
        return None
    (y,) = outputs
    for mixed in ("", SOLVED):
        for view in views(y.shape, output.shape):
            if not view.holds(output):
                continue
            layout = Layout(batched=True, branches=1, cond_index=0, view=view, rows=y.shape[0])
            formula = Formula(
                layout=layout, weights=(), anchor="u", upcast=y.dtype != output.dtype, finish="", scale=None,
                dtype=output.dtype, mixed=mixed,
            )  # fmt: skip
            if holds(formula, y, output, around, shows):
                return formula
    return None


def holds(formula: Formula, y: Tensor, output: Tensor, around: Around, shows: bool = True) -> bool:
    """Whether the formula gives the scheduler's `output`, as it is or mixed with the sample."""
    view = formula.view
    alone, target = view(y), view.working(output)
    if alone.shape != target.shape:
        return False
    if formula.mixed != SOLVED:
        return _same(alone, target)
    if around.sample is None or around.sample.shape != output.shape:
        return False
    few, x = Sample(target.shape), view.working(around.sample)
    (_, beta), fit = mixture(*map(few, (target, x, alone)))
    return fit.fits and (not shows or abs(beta) * float(few(alone).double().norm()) > 100 * fit.allowed)


def rounded(alone: Tensor, target: Tensor) -> float:
    """By what share of it the target may be off, to the rounding of the coarser one."""
    return 4 * max(torch.finfo(t.dtype).eps for t in (alone, target))


def _same(alone: Tensor, target: Tensor) -> bool:
    """Whether both are equal to the rounding of the coarser one; what is not finite must be so in both."""
    if torch.equal(alone, target):
        return True
    if not torch.equal(torch.isfinite(alone), torch.isfinite(target)):
        return False
    alone, target = (t.nan_to_num(0, 0, 0) for t in (alone, target))
    return norm(alone - target) <= rounded(alone, target) * norm(target)
