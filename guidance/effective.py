"""How strong a rule's guidance is, in a measure that all rules share: the scale at which CFG would push as far.

Rules differ in how far they go along the direction of guidance, and in what they do perpendicular to it. To go further
raises most scores by itself, so rules are compared at equal strength too (GA-Eval, arXiv 2602.22570). As there,
strength is the projection of g - u onto d = c - u, in units of d, averaged over steps and samples; g is the guided
prediction:

    w_eff = <g - u, d> / <d, d> = 1 + <g - c, d> / <d, d>,     which is w for CFG at w

The authors' code takes its absolute value. Here guidance away from the prompt counts as negative.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffusers_guidance.kernels.reference import dims_of
from diffusers_guidance.steps import Prediction, Step


@dataclass
class Strength:
    """An observer that appends the effective guidance scale of every step to `scales`."""

    scales: list[Tensor] = field(default_factory=list)
    """(rows,) for each step."""

    def __call__(self, step: Step, prediction: Prediction | None, guided: Tensor) -> None:
        if prediction is None:
            return
        working = torch.promote_types(prediction.cond.dtype, torch.float32)
        c, u, g = (t.to(working) for t in (prediction.cond, prediction.uncond, guided))
        d, dims = c - u, dims_of(c, None)
        self.scales.append((1 + ((g - c) * d).sum(dims) / (d * d).sum(dims)).cpu())

    @property
    def mean(self) -> float:
        """The mean over all steps and samples so far, without those where both predictions are equal."""
        values = [value for step in self.scales for value in step.tolist() if math.isfinite(value)]
        if not values:
            raise ValueError("no guided step was seen: run the pipeline with this observer first")
        return sum(values) / len(values)
