"""A Gaussian mixture whose predictions are known in closed form, and a loop that samples from it: no network.

Two classes of points in the plane, each a mixture of two Gaussians, in float64.
"""

import math
from dataclasses import dataclass, field

import torch

from diffusers_guidance import Action
from diffusers_guidance.engine import Engine, advance
from diffusers_guidance.spaces import Space
from diffusers_guidance.steps import Prediction, Step

MEANS = torch.tensor([[2.0, 0.0], [2.4, 0.6], [-2.0, 0.3], [-1.8, -0.5]], dtype=torch.float64)
OF_CLASS = torch.tensor([True, True, False, False])
SPREAD = 0.3
W = 3.0


def noise_of(x, sigma, means):
    """(rows, 2): the noise in x = x0 + sigma eps as a perfect network predicts it, where x0 is of these Gaussians."""
    variance = SPREAD**2 + sigma**2
    weights = (-((x[:, None] - means) ** 2).sum(-1) / (2 * variance)).softmax(-1)  # (rows, means)
    denoised = means + (x[:, None] - means) * SPREAD**2 / variance
    return (x - (weights[..., None] * denoised).sum(1)) / sigma


def sigmas(count):
    return torch.cat([torch.logspace(math.log10(10), math.log10(0.05), count, dtype=torch.float64), torch.zeros(1)])


@dataclass
class Loop:
    """A host: Euler steps of the probability flow, from noise to points."""

    engine: Engine
    x: torch.Tensor
    count: int
    evaluations: list = field(default_factory=list)
    """Rows of each evaluation."""

    def predict(self, step, plan):
        if all(each.action == Action.NEITHER for each in plan):
            held = torch.full_like(self.x, torch.nan)  # nobody is to look at it
            if not self.engine.policy.hands:
                held = None
            c, u = (held, held) if held is not None else self.engine.both(step)
            return Prediction(c, u, [False] * len(plan), nfe=0)
        c = self._evaluated(self.x, step, MEANS[OF_CLASS])
        both = [each.action in (Action.BOTH, Action.NEITHER) for each in plan]
        u = None
        if any(both):
            u = torch.full_like(c, torch.nan)
            u[both] = self._evaluated(self.x[both], step, MEANS)
        return Prediction(c, self.engine.fill(step, plan, c, u, both), both)

    def _evaluated(self, x, step, means):
        self.evaluations.append(len(x))
        return noise_of(x, step.sigma, means)

    def resume(self, step, guided):
        following = sigmas(self.count)[step.index + 1]
        self.x = self.x + (following - step.sigma) * guided

    def run(self):
        table = tuple(Space(1.0, -s, 0.0, 1.0, 1.0, s, s, True) for s in sigmas(self.count)[:-1].tolist())
        for i, space in enumerate(table):
            step = Step(i, self.count, space=space, sample=self.x, w=W, rows=len(self.x), table=table)
            advance(self.engine, self, step)
        return self.x
