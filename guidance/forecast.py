"""Forecasts: what to hand the sampler at steps that evaluate nothing, and how to repay the error.

Let D_t be the guided prediction of step t as a denoised sample, and V(t, s) = E |D_t - D_s|^2 the variogram of a run.
The best linear estimate at t from steps E, with weights that sum to 1, is

    D~_t = sum over k in E of w_k D_k        [ V(i, k)  1 ] [w]   [ V(t, k) ]
                                             [    1     0 ] [m] = [    1    ]

If nothing was measured, V(t, s) = |t - s|^p: a run moves like fractional Brownian motion, rougher than a polynomial and
smoother than a random walk. With p = 1 the estimate holds the last prediction, and interpolates on a line; with p near
2 it extrapolates along a line. If runs were measured, V is the model's own (`variogram.py`, `motion.py`). A skipped
step j is handed such an estimate from the last two evaluated steps. At the next evaluated step i a better estimate
exists, from three steps, and the difference is repaid. Neighbouring steps move the picture the same way, so the sum of
all errors counts, each times its step's gain. So i is handed

    D_i + sum over the skipped steps j since the last evaluated one of (gain_j / gain_i) (D~_j - handed_j)

Everything here is a linear combination of at most three evaluated predictions, so no more are kept.

The same V says which steps to skip. If step j is skipped between two evaluated ones, D_j is known up to the variance of
its estimate from these two. The root of this variance moves the picture by gain_j. A power law is the same everywhere
in a run, so for it

    (1 - rho' / rho) (rho- rho)^(5/12) / (rho + 1/10)^(1/2)

stands for the gain, as in an Euler step, whatever the solver (rho: noise over signal; rho- at the step before, rho' at
the next one). Predictions move faster where there is more noise: from step to step, as at the mean of both levels. And
later steps correct more of an error there. These numbers order measured pictures best. Errors of neighbours add up, and
errors of different gaps do not. So the error to minimise is the sum over all gaps of the squared sum within each gap; a
shortest path finds its minimum. A run may end with a gap: there it keeps the last evaluated prediction.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from diffusers_guidance import kernels, scales
from diffusers_guidance.calibration import euler_gains, gains
from diffusers_guidance.spaces import Space
from diffusers_guidance.steps import History
from diffusers_guidance.variogram import Measured, PowerLaw, kriged

UNMEASURED = PowerLaw()

PAYS = 0.05
"""By which share the predicted error has to fall before a pattern skips one more step in a row than it must."""

CORRECTED = 0.1
"""The noise over signal below which later steps correct little of an error any more."""

_HOST: dict = {"dtype": torch.float64, "device": "cpu"}

Combination = dict[int, float]
"""The factor of each evaluated step's prediction."""


@lru_cache(maxsize=4096)
def estimate(steps: tuple[int, ...], at: int, variogram: PowerLaw | Measured = UNMEASURED) -> Combination:
    """The best estimate of step `at` from the predictions of `steps`."""
    known, wanted = torch.tensor(steps), torch.tensor([at])
    weights = kriged(variogram.between(known, known), variogram.between(known, wanted))
    return dict(zip(steps, weights[0].tolist(), strict=True))


def forecast(evaluated: Sequence[int], at: int, variogram: PowerLaw | Measured = UNMEASURED) -> Combination:
    """What a skipped step is handed: an estimate from the last two evaluated steps."""
    return estimate(tuple(evaluated[-2:]), at, variogram)


def ending(chosen: Sequence[bool], at: int, evaluated: Sequence[int]) -> Combination | None:
    """What a step after the last evaluated one is handed: its prediction as it is. None for other steps.

    Nothing repays what an estimate gets wrong there, and towards the end predictions settle.
    """
    return None if any(chosen[at:]) else {evaluated[-1]: 1.0}


def repayment(
    evaluated: Sequence[int], skipped: Sequence[int], gain: Sequence[float], variogram: PowerLaw | Measured = UNMEASURED
) -> Combination:
    """What the last of the `evaluated` steps is handed in addition to its own prediction.

    Args:
        evaluated: the last three evaluated steps, or fewer near the start.
        skipped: the steps skipped since the last but one of these; each got its `forecast`.
        gain: the gains of all steps for errors of denoised predictions (`denoised_gains`).
    """
    now, before = evaluated[-1], evaluated[:-1]
    found = dict.fromkeys(evaluated, 0.0)
    if gain[now] == 0:  # it does not move the picture: too late
        return found
    for j in skipped:
        known, handed = estimate(tuple(evaluated[-3:]), j, variogram), forecast(before, j, variogram)
        for sign, combination in ((1, known), (-1, handed)):
            for step, factor in combination.items():
                found[step] += sign * factor * gain[j] / gain[now]
    return found


@lru_cache(maxsize=64)
def summed_error(
    chosen: tuple[bool, ...], table: tuple[Space, ...], by: PowerLaw | Measured, measured: Measured
) -> float:
    """The mean square of the sum of errors times gains. Estimates use the variogram `by`, errors `measured`."""
    gain, total = denoised_gains(table), torch.zeros(len(table), **_HOST)
    evaluated: list[int] = []
    skipped: list[int] = []
    for t, is_evaluated in enumerate(chosen):
        if is_evaluated:
            evaluated.append(t)
            handed = repayment(evaluated[-3:], skipped, gain, by) if skipped else {}
            skipped = []
        else:
            skipped.append(t)
            handed = ending(chosen, t, evaluated) or forecast(evaluated, t, by)
            total[t] -= gain[t]
        for step, factor in handed.items():
            total[step] += gain[t] * factor
    return float(-total @ measured.values @ total) / 2  # the factors of all steps sum to 0


def combined(predictions: dict[int, Tensor], combination: Combination) -> Tensor:
    """The combination of `predictions`, given by step; at least float32."""
    terms = [predictions[step] for step in combination]
    return kernels.mix(terms, [*combination.values()], terms[0].dtype)


def at_scale(w: scales.W | None, history: History) -> dict[int, Tensor]:
    """The history's guided predictions by step, each taken to the scale w.

    A guided prediction is D = X + (w - 1) B. If the scale changes, D_k of step k is not what it would be at the scale
    w. But D_k + (w - w_k) B_k is, and the history keeps B beside D. So forecasts estimate only the motion of the
    predictions, and not that of the schedule, which is known.
    """
    found = dict(history.guided)
    for step, guided in history.guided.items():
        slope, there = history.slopes.get(step), history.scales.get(step)
        if slope is not None and there is not None and w is not None and w != there:
            found[step] = guided + (scales.column(w, slope) - scales.column(there, slope)) * slope
    return found


@lru_cache(maxsize=16)
def denoised_gains(table: tuple[Space, ...]) -> tuple[float, ...]:
    """For each step, how far an error of its denoised prediction moves the picture; see `calibration.gains`."""
    return _of_denoised(gains(table), table)


def _of_denoised(found: Sequence[float], table: Sequence[Space]) -> tuple[float, ...]:
    return tuple(gain / abs(space.b) if space.b else 0.0 for gain, space in zip(found, table, strict=True))


@lru_cache(maxsize=64)
def pattern(
    count: int, evaluations: int, table: tuple[Space, ...] = (), variogram: PowerLaw | Measured = UNMEASURED
) -> tuple[bool, ...]:
    """Whether each step is evaluated: the first, the last but one, and of the others those that cost most to skip.

    It skips no more steps in a row than the budget requires: never two if a little more than half may be evaluated.
    Only if that lowers the predicted error by more than `PAYS`, it skips one more in a row: where the first steps move
    much more than the others, a budget is better spent there. Likewise for the last step. Nothing repays it, so it is
    skipped only where the run ends so clean that its error hardly counts (DDIM, flow matching).

    Args:
        count: steps of the run.
        evaluations: how many of them to evaluate; at least the first and one of the last two are.
        table: the steps' spaces. Without it, all steps weigh the same, and the last one is evaluated.
    """
    evaluations = max(min(evaluations, count), min(count, 2))
    if evaluations == count:
        return (True,) * count
    weight = weights(table, variogram) if len(table) == count else torch.ones(count, **_HOST)
    if evaluations < 4:
        return _cheapest(weight, evaluations, variogram)
    # The last step can hardly repay the errors before it: the path leads to the one before.
    ends = [(*_cheapest(weight[:-1], evaluations - 1, variogram), True)]
    if len(table) == count:
        ends.append((*_cheapest(weight[:-1], evaluations, variogram), False))
    return _simplest(ends, weight, variogram)


def _simplest(patterns: Sequence[tuple[bool, ...]], weight: Tensor, variogram: PowerLaw | Measured) -> tuple[bool, ...]:
    """The first pattern, or a later one if its predicted error is smaller by more than `PAYS`."""
    best, *others = patterns
    for other in others:
        if missed(other, weight, variogram) < (1 - PAYS) * missed(best, weight, variogram):
            best = other
    return best


def missed(chosen: Sequence[bool], weight: Tensor, variogram: PowerLaw | Measured) -> float:
    """The predicted error of a pattern: the sum over its gaps, which `pattern` minimises.

    Steps after the last evaluated one are handed its prediction, and never repaid.
    """
    evaluated = [i for i, was in enumerate(chosen) if was]
    costs = _costs(weight, max((k - i for i, k in pairwise(evaluated)), default=1), variogram)
    found = sum(float(costs[k - i, k]) for i, k in pairwise(evaluated))
    rest = torch.arange(evaluated[-1] + 1, len(chosen))
    apart = variogram.between(torch.tensor(evaluated[-1:]), rest)[0]
    return found + float((weight[rest] * apart).sqrt().sum().square())


def _costs(weight: Tensor, furthest: int, variogram: PowerLaw | Measured) -> Tensor:
    """(furthest + 1, T): [g, i] is the cost of skipping the g - 1 steps before i, if i - g and i are evaluated."""
    count = len(weight)
    costs = torch.zeros(furthest + 1, count, **_HOST)
    steps = torch.arange(count)
    # The variance of step j about its best estimate from i and k, with the weights w and 1 - w.
    apart = variogram.between(steps, steps)
    for g in range(2, furthest + 1):
        i, k = steps[: count - g, None], steps[g:, None]
        j = i + steps[1:g]  # (T - g, g - 1)
        whole, left, right = apart[i, k], apart[i, j], apart[k, j]
        w = 0.5 + (right - left) / (2 * whole)
        variance = w * left + (1 - w) * right - w * (1 - w) * whole
        costs[g, g:] = (weight[j] * variance.clamp(min=0)).sqrt().sum(1)
    return costs.square()  # errors between two evaluated steps point the same way


def _cheapest(weight: Tensor, evaluations: int, variogram: PowerLaw | Measured) -> tuple[bool, ...]:
    """Which steps to evaluate, the first and the last among them, so that skipping the others costs the least.

    From one evaluated step to the next it is no further than it must be, or one step further where that pays.
    """
    if evaluations >= len(weight):
        return (True,) * len(weight)
    furthest = math.ceil((len(weight) - 1) / (evaluations - 1))
    return _simplest([_shortest(weight, evaluations, variogram, furthest + more) for more in (0, 1)], weight, variogram)


def _shortest(weight: Tensor, evaluations: int, variogram: PowerLaw | Measured, furthest: int) -> tuple[bool, ...]:
    """The shortest path of so many evaluations, if from one to the next it is `furthest` steps at most."""
    count = len(weight)
    costs = _costs(weight, furthest, variogram)
    least = torch.full((count,), math.inf, **_HOST)  # [i]: of reaching i with so many evaluations
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


def weights(table: tuple[Space, ...], variogram: PowerLaw | Measured = UNMEASURED) -> Tensor:
    """(T,): for each step the squared gain of an error of its denoised prediction. If the variogram does not know how
    fast predictions move there, it is multiplied by a guess of that."""
    gain = torch.tensor(_of_denoised(euler_gains(table), table), **_HOST)
    if variogram.is_measured:
        return gain.square()
    rho = torch.tensor([space.noise / space.signal if space.signal else math.inf for space in table], **_HOST)
    speed = (torch.cat([rho[:1], rho[:-1]]) * rho) ** (5 / 12)
    found = (gain * speed).square() * rho / (rho + CORRECTED)  # the gain has rho^(-1/2)
    # Next to pure noise the weight is unknown: it is the largest one.
    known = found.isfinite()
    return torch.where(known, found, float(found[known].amax()) if known.any() else 1.0)
