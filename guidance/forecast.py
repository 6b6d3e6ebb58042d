"""Forecasts: what to hand the sampler at steps that evaluate nothing, and how to repay the error.

Let D_t be the guided prediction of step t as a denoised sample. Over a run it moves like fractional Brownian motion:
from step s to step t by about |t - s|^(p/2). Measured p is between 1.3 and 1.7, rougher than a polynomial and
smoother than a random walk. The best linear estimate of such a motion at t from steps E, with weights that sum to 1, is

    D~_t = sum over k in E of w_k D_k        [ |i - k|^p  1 ] [w]   [ |t - k|^p ]
                                             [     1      0 ] [m] = [     1     ]

so p = 1 holds the last prediction and interpolates on a line; p near 2 extrapolates along one. A skipped step j gets
such an estimate from the last two evaluated steps. The next evaluated step i gives a better estimate of it, from three
steps, and repays the difference. The picture depends on the sum of all errors, each times its step's gain, since
neighbouring steps move it the same way. So i gets

    D_i + sum over the skipped steps j since the last evaluated one of (gain_j / gain_i) (D~_j - handed_j)

Everything here is a linear combination of at most three evaluated predictions: no more are kept.

The same model says which steps to skip. If j lies a steps after one evaluated step and b before the next, D_j is known
up to a variance of about (a b / (a + b))^p. Such an error weighs in the picture by

    gain_j rho_j^(5/6) = (1 - rho' / rho) rho^(1/3)        (rho: noise over signal, a prime: at the next step)

This power of rho orders measured pictures. Errors of neighbours add up, those of different gaps do not. A shortest path
minimises the sum over all gaps of the squared sum within each.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from diffusers_guidance.calibration import gains
from diffusers_guidance.spaces import Space

ROUGHNESS = 1.4
"""p: over t steps a guided prediction moves by about t^(p/2)."""

_HOST: dict = {"dtype": torch.float64, "device": "cpu"}

Combination = dict[int, float]
"""Factors of evaluated steps' predictions, by step."""


@lru_cache(maxsize=4096)
def estimate(steps: tuple[int, ...], at: int, roughness: float = ROUGHNESS) -> Combination:
    """The best estimate of step `at` from the predictions of `steps`."""
    n, known = len(steps), torch.tensor(steps, **_HOST)
    system = torch.ones(n + 1, n + 1, **_HOST)
    system[:n, :n] = (known[:, None] - known).abs() ** roughness
    system[n, n] = 0
    wanted = torch.cat([(known - at).abs() ** roughness, torch.ones(1, **_HOST)])
    return dict(zip(steps, torch.linalg.solve(system, wanted)[:n].tolist(), strict=True))


def forecast(evaluated: Sequence[int], at: int) -> Combination:
    """What a skipped step gets: an estimate from the last two evaluated ones."""
    return estimate(tuple(evaluated[-2:]), at)


def repayment(evaluated: Sequence[int], skipped: Sequence[int], gain: Sequence[float]) -> Combination:
    """What the last of the `evaluated` steps gets in addition to its own prediction.

    Args:
        evaluated: the last three evaluated steps, fewer near the start.
        skipped: those since the last but one of them; each got its `forecast`.
        gain: of all steps, for errors of denoised predictions (`denoised_gains`).
    """
    now, before = evaluated[-1], evaluated[:-1]
    found = dict.fromkeys(evaluated, 0.0)
    if gain[now] == 0:  # it does not move the picture: too late
        return found
    for j in skipped:
        for sign, combination in ((1, estimate(tuple(evaluated[-3:]), j)), (-1, forecast(before, j))):
            for step, factor in combination.items():
                found[step] += sign * factor * gain[j] / gain[now]
    return found


def combined(predictions: dict[int, Tensor], combination: Combination) -> Tensor:
    """The combination of `predictions`, given by step; at least float32."""
    terms = [factor * predictions[step] for step, factor in combination.items()]
    return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]


@lru_cache(maxsize=16)
def denoised_gains(table: tuple[Space, ...]) -> tuple[float, ...]:
    """By step: how far an error of its denoised prediction moves the picture; see `calibration.gains`."""
    return tuple(gain / abs(space.b) if space.b else 0.0 for gain, space in zip(gains(table), table, strict=True))


@lru_cache(maxsize=64)
def pattern(count: int, evaluations: int, table: tuple[Space, ...] = ()) -> tuple[bool, ...]:
    """By step, whether it is evaluated: the first, the last two, and the others that are costliest to skip.

    Skips no more steps in a row than the budget requires: never two while a little more than half may be evaluated.

    Args:
        count: steps of the run.
        evaluations: how many of them to evaluate; at least the first and the last are.
        table: the steps' spaces. Without it, all steps weigh the same.
    """
    evaluations = max(min(evaluations, count), min(count, 2))
    if evaluations == count:
        return (True,) * count
    weight = _weights(table) if len(table) == count else [1.0] * count
    if evaluations < 4:
        return _cheapest(weight, evaluations)
    return (*_cheapest(weight[:-1], evaluations - 1), True)  # the last step can hardly repay an error just before it


def _cheapest(weight: Sequence[float], evaluations: int) -> tuple[bool, ...]:
    """Which steps to evaluate, including the first and the last, so that skipping the others costs the least."""
    count, weights = len(weight), torch.tensor(weight, **_HOST)
    furthest = math.ceil((count - 1) / (evaluations - 1))  # from one evaluated step to the next
    costs = torch.zeros(furthest + 1, count, **_HOST)  # [g, i]: of skipping the g - 1 steps before i
    for g in range(2, furthest + 1):
        for a in range(1, g):
            costs[g, g:] += weights[a : a + count - g].sqrt() * (a * (g - a) / g) ** (ROUGHNESS / 2)
    costs = costs.square()  # errors between two evaluated steps point the same way
    least = torch.full((count,), math.inf, **_HOST)  # [i]: cost to reach i with so many evaluations
    least[0] = 0
    gaps = []
    for _ in range(evaluations - 1):
        reached = torch.full((furthest + 1, count), math.inf, **_HOST)
        for g in range(1, furthest + 1):
            reached[g, g:] = least[: count - g] + costs[g, g:]
        least, gap = reached.min(0)
        gaps.append(gap.tolist())
    chosen, at = [False] * count, count - 1
    for gap in reversed(gaps):
        chosen[at] = True
        at -= gap[at]
    chosen[0] = True
    return tuple(chosen)


def _weights(table: tuple[Space, ...]) -> list[float]:
    """By step, the squared weight of an error of its denoised prediction, times how strongly that moves there."""
    rho = [space.noise / space.signal if space.signal else math.inf for space in table]
    found = [
        gain**2 * r ** (5 / 3) if 0 < r < math.inf else 0.0 for gain, r in zip(denoised_gains(table), rho, strict=True)
    ]
    # An unknown weight (pure noise) counts as the largest.
    return [weight if weight > 0 else max(found) or 1.0 for weight in found]
