"""The search for a schedule: which steps to evaluate in full for a budget of NFEs.

Errors of neighbouring skipped steps move the picture the same way, and the next step evaluated in full repays them
(`calibration.repayments`). So a schedule's predicted error is

    E^2 = sum over its gaps of |sum over the gap's steps t of gain_t (error of g_t), less what is repaid|^2

with g_t = c_t + (w - 1) d_t. The guidance scale w and the Gram matrix for least squares are the calibration's; the
`gains` come from the scheduler. The search fits estimates on the last two evaluated steps, and repayments on these and
the next one (nearly as good as on all: docs/policies.md). Then a gap's term depends only on the two steps before it and
the one after it, and a shortest path gives the best schedule for every budget at once. Its choice has the least error
under that fit, and nearly the least under others.

A skipped step evaluates neither prediction, unless `skip=False` keeps the conditional one. Schedules have no unguided
steps: an estimate costs no extra evaluation, and its squared residual is at most |d|^2.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from diffusers_guidance.calibration import RECENT, Calibration, Fit, Moments
from diffusers_guidance.checks import is_whole
from diffusers_guidance.policies import Schedule, published
from diffusers_guidance.steps import Action


def closed_form(
    calibration: Calibration,
    nfe: int | None = None,
    *,
    error: float | None = None,
    skip: bool = True,
    fit: Fit = RECENT,
) -> Schedule:
    """The schedule with the least predicted error for a budget, or the cheapest within a predicted error.

    "Least" is over all choices of full evaluations, with the fit on two steps (see the head of this module). A spare
    evaluation goes to the step where it lowers `predicted_error` most.

    Args:
        nfe: network evaluations of one sample, from two for each denoiser to twice the steps.
        error: instead of `nfe`, the largest `predicted_error` allowed.
        skip: whether a step may evaluate nothing. If not, every step evaluates at least the conditional prediction, and
            `nfe` must be at least one for each step and one more for each denoiser.
        fit: how the schedule's skipped predictions are estimated.

    Returns:
        A `Schedule` with the calibration in it.

    Raises:
        ValueError: neither or both of `nfe` and `error`, or one out of range; or a calibration without guidance.
        CalibrationMismatch: `fit` needs channels that the calibration does not tell apart.
    """
    if nfe is not None and not is_whole(nfe, 0):
        raise ValueError(f"nfe={nfe!r}: a whole number of network evaluations")
    by_network = calibration.setting.get("guidance_scale", {}).values()
    if by_network and all(w == 1 for w in by_network):
        raise ValueError(
            f"{calibration!r} is of runs without guidance, and a schedule is of two predictions a step: "
            "use Forecast(calibration=...), which skips evaluations of one"
        )
    for name in calibration.denoisers:
        calibration.weights(name, fit)
    if (nfe is None) == (error is None):
        raise ValueError("give either nfe=, the evaluations allowed, or error=, the largest predicted error")
    best = optima(calibration, skip)
    if error is not None:
        if not error >= 0:
            raise ValueError(f"error={error!r}: a share of what guidance does, 0 or more")
        schedules = [Schedule(actions, calibration, fit, repay=True) for actions in best]
        found = next((schedule for schedule in schedules if predicted_error(schedule) <= error), schedules[-1])
        if found is schedules[0]:
            return found
        between = _within(best, found.nfe - 1, calibration, fit)
        return between if predicted_error(between) <= error else found
    assert nfe is not None
    return _within(best, nfe, calibration, fit)


def predicted_error(schedule: Schedule) -> float:
    """The error E of any schedule, relative to the error without guidance after the first step.

    Without repayment every skipped step counts alone: E^2 is the sum of their squared errors times gains.
    """
    if schedule.calibration is None:
        raise ValueError("predicted_error needs a schedule with a calibration: Schedule(actions, calibration)")
    calibration, total, reference = schedule.calibration, 0.0, 0.0
    unguided: Sequence[str] = [Action.CONDITIONAL] * calibration.steps
    for name, _, gain, w in _parts(calibration):
        gram = calibration.weights(name, schedule.fit)
        made, none = (calibration.coefficients(name, each, schedule.fit) for each in (schedule.actions, unguided))
        if schedule.repay:
            _, left = calibration.repayments(name, schedule.actions, schedule.fit)
            total += float(((left @ gram) * left).sum().clamp(min=0))
        else:
            total += float((gain * errors_of(gram, w, made)).square().sum())
        reference += float((gain * errors_of(gram, w, none)).square().sum())
    return (total / reference) ** 0.5 if reference else 0.0


def optima(calibration: Calibration, skip: bool = True, tilt: float = 0.0) -> list[tuple[Action, ...]]:
    """The best actions for each number of full evaluations, starting with one for each denoiser.

    `tilt` multiplies the gains by exp(tilt * elapsed share of the run). Above 0 it gives late steps more weight.
    """
    left: Action = Action.NEITHER if skip else Action.EXTRAPOLATE
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    covered: set[int] = set()
    for _, moments, gain, w in _parts(calibration, tilt):
        steps, unit = moments.steps, torch.eye(2 * moments.steps, dtype=torch.float64)
        c, d = unit[:steps], unit[steps:]
        if skip:
            costs = gap_costs(moments.total, torch.stack([c, d], 1), c + (w - 1) * d, gain)
        else:  # fitted on past d alone: with c_t and past c too, the choice is no better
            costs = gap_costs(moments.total, d[:, None], (w - 1) * d, gain)
        paths = shortest(costs)
        # With several denoisers, try every split of the budget between them.
        merged: dict[int, tuple[float, tuple[int, ...]]] = {}
        for i, (cost, chosen) in enumerate(best):
            for j, (more, path) in enumerate(paths):
                joined = (cost + more, (*chosen, *(moments.first + t for t in path)))
                merged[i + j] = min(merged.get(i + j, joined), joined)
        best = [merged[i] for i in sorted(merged)]
        covered |= {*range(moments.first, moments.first + steps)}
    outside = {*range(calibration.steps)} - covered
    return [_actions(calibration.steps, {*chosen} | outside, left) for _, chosen in best]


def gap_costs(gram: Tensor, regressors: Tensor, targets: Tensor, gain: Tensor, ridge: float = 1e-6) -> Tensor:
    """(T + 1, T, T + 1): [i + 1, j, k] is the squared norm of the error that a gap leaves. That is the sum of the
    targets times gains between the evaluated steps j and k, less what the steps i, j and k explain of it. i = -1 means
    no step; k = T is the end of the run.

    Args:
        gram: (2T, 2T)
        regressors: (T, K, 2T), the K predictions of each step.
        targets: (T, 2T)
        gain: (T,); a step of gain 0 cannot repay.
    """
    steps, n = len(regressors), regressors.shape[1]
    targets, repays = gain[:, None] * targets, torch.nn.functional.pad(gain > 0, (0, 1))
    # Beyond both ends of the run there is no step: its predictions are zero.
    padded = torch.cat([regressors, torch.zeros_like(regressors[:1])]).flatten(0, 1)  # ((T + 1) K, 2T)
    products = padded @ gram @ padded.T
    wanted = torch.nn.functional.pad((padded @ gram @ targets.T).cumsum(1), (1, 0))  # up to, and without, t
    squares = torch.nn.functional.pad((targets @ gram @ targets.T).cumsum(0).cumsum(1), (1, 0, 1, 0))
    found = torch.full((steps + 1, steps, steps + 1), torch.inf, dtype=gram.dtype)
    own = torch.arange(n)
    for j in range(steps):
        i = torch.tensor([-1, *range(j)]) if j else torch.tensor([-1])
        i, k = (each.flatten() for each in torch.meshgrid(i, torch.arange(j + 1, steps + 1), indexing="ij"))
        near = torch.stack([i % (steps + 1), torch.full_like(i, j), torch.where(repays[k], k, steps)])  # -1, T: none
        index = (n * near.T[:, :, None] + own).flatten(1)  # (N, 3K)
        normal = products[index[:, :, None], index[:, None, :]]
        right = wanted[index, k[:, None]] - wanted[index, j + 1]
        scale = normal.diagonal(dim1=1, dim2=2)
        scale = torch.where(scale > 0, scale, 1).rsqrt()
        scaled = (right * scale)[..., None]
        eye = max(ridge, 1e-12) * torch.eye(3 * n, dtype=gram.dtype)
        solved = torch.linalg.solve(normal * scale[:, None] * scale[..., None] + eye, scaled)
        square = squares[k, k] - squares[j + 1, k] - squares[k, j + 1] + squares[j + 1, j + 1]
        found[i + 1, j, k] = torch.where(k > j + 1, (square - (solved * scaled).sum((1, 2))).clamp(min=0), 0.0)
    return found


def shortest(cost: Tensor) -> list[tuple[float, tuple[int, ...]]]:
    """For n = 1 .. T evaluated steps, the first always among them: the least sum over gaps, and the steps."""
    steps = cost.shape[1]
    before, k = torch.arange(steps)[:, None], torch.arange(steps)
    value = torch.full((steps + 1, steps), torch.inf, dtype=cost.dtype)  # (i + 1, j): the last two evaluated
    value[0, 0] = 0.0
    came: list[Tensor] = []
    found = []
    for _ in range(steps):
        ended = value + cost[:, :, steps]
        i, j = divmod(int(ended.argmin()), steps)
        chosen = [j]
        for back in reversed(came):
            i, j = int(back[i, j]), i - 1
            chosen.append(j)
        found.append((float(ended.min()), tuple(reversed(chosen))))
        onward = value[:, :, None] + torch.where(k > before, cost[:, :, :steps], torch.inf)  # (i + 1, j, k)
        least, which = onward.min(0)
        value = torch.full_like(value, torch.inf)
        value[1:] = least  # (j + 1, k)
        came.append(torch.nn.functional.pad(which, (0, 0, 1, 0)))
    return found


def even(steps: int, evaluated: int, left: Action = Action.EXTRAPOLATE) -> tuple[Action, ...]:
    """Full evaluations at evenly spaced steps, the first and the last among them; `left` at the others."""
    spread = torch.linspace(0, steps - 1, evaluated).round().int().tolist() if evaluated > 1 else [0]
    return _actions(steps, set(spread), left)


def shortlist(calibration: Calibration, nfe: int, skip: bool = True, fit: Fit = RECENT) -> list[Schedule]:
    """Candidates for a budget; the closed form's best comes first."""
    found = [_within(optima(calibration, skip, tilt), nfe, calibration, fit) for tilt in (0.0, -1.0, 1.0, -2.0, 2.0)]
    steps, firsts = calibration.steps, _firsts(calibration)

    def spread(left: Action) -> list[Schedule]:
        for n in range(steps, 0, -1):
            full = {t for t, action in enumerate(even(steps, n)) if action == Action.BOTH}
            made = Schedule(_actions(steps, full | firsts, left), calibration, fit, repay=True)
            if made.nfe <= nfe:
                return [made]
        return []

    usual = Schedule(published(steps), calibration, fit, repay=True)
    found += (
        spread(Action.EXTRAPOLATE) + (spread(Action.NEITHER) if skip else []) + ([usual] if usual.nfe <= nfe else [])
    )
    return list({schedule.actions: schedule for schedule in found}.values())


def climb(candidates: Sequence[Schedule], measure: Callable[[Schedule], float], runs: int) -> Schedule:
    """The best measured schedule among all candidates, and then among neighbours of the best while runs remain.

    Args:
        candidates: schedules with the same calibration and fit; all are measured.
        measure: returns the quality of a schedule in real runs; higher is better (such as PSNR in dB).
        runs: how many schedules to measure in all. Neighbours have one full evaluation a step earlier or later.
    """
    quality = {schedule.actions: measure(schedule) for schedule in candidates}
    calibration = candidates[0].calibration
    firsts = {0} if calibration is None else _firsts(calibration)
    best = max(quality, key=lambda actions: quality[actions])
    while len(quality) < runs:
        untried = (actions for actions in _neighbours(best, firsts) if actions not in quality)
        actions = next(untried, None)
        if actions is None:
            break
        quality[actions] = measure(replace(candidates[0], actions=actions))
        best = max(best, actions, key=lambda actions: quality[actions])
    return replace(candidates[0], actions=best)


def _within(best: Sequence[tuple[Action, ...]], nfe: int, calibration: Calibration, fit: Fit) -> Schedule:
    """The last of `best` within a budget. A spare NFE evaluates a conditional prediction where it helps most."""
    least, most = _nfe(best[0]), _nfe(best[-1])
    if not least <= nfe <= most:
        raise ValueError(f"nfe={nfe!r}: from {least} to {most} for such schedules of {calibration!r}")
    actions = max((each for each in best if _nfe(each) <= nfe), key=_nfe)
    if _nfe(actions) < nfe:
        left = [t for t, action in enumerate(actions) if action == Action.NEITHER]
        tried = [(*actions[:t], Action.EXTRAPOLATE, *actions[t + 1 :]) for t in left]
        return min((Schedule(each, calibration, fit, repay=True) for each in tried), key=predicted_error)
    return Schedule(actions, calibration, fit, repay=True)


def errors_of(gram: Tensor, w: float | Tensor, made: Tensor) -> Tensor:
    """(T,) norms of the errors of c_t + (w - 1) d_t, for the combinations `made` that replace the predictions.

    Args:
        gram: (C, 2T, 2T), whose channels add up.
        w: the guidance scale, or (T, 1), that of each step.
        made: (C, 2T, 2T)
    """
    steps = gram.shape[-1] // 2
    off = made - torch.eye(2 * steps, dtype=made.dtype)
    off = off[:, :steps] + (w - 1) * off[:, steps:]
    return ((off @ gram) * off).sum((0, -1)).clamp(min=0).sqrt()


def _firsts(calibration: Calibration) -> set[int]:
    """The first step of each denoiser, which is evaluated in full."""
    return {moments.first for moments in calibration.denoisers.values()}


def _parts(calibration: Calibration, tilt: float = 0.0) -> list[tuple[str, Moments, Tensor, float | Tensor]]:
    """For each denoiser its name, moments, the gains (T,) of its steps, and its guidance scale, (T, 1) if scheduled."""
    gain = calibration.gains * torch.exp(tilt * torch.linspace(0, 1, calibration.steps, dtype=torch.float64))
    found = []
    for name, each in calibration.denoisers.items():
        own, w = slice(each.first, each.first + each.steps), calibration.setting["guidance_scale"][name]
        by_step = torch.tensor(w[own], dtype=torch.float64)[:, None] if isinstance(w, list) else w
        found.append((name, each, gain[own], by_step))
    return found


def _neighbours(actions: Sequence[Action | str], firsts: set[int]) -> list[tuple[Action | str, ...]]:
    """All schedules with one full evaluation moved to the step before or after it, except those at `firsts`."""
    found = []
    free = {*range(len(actions))} - firsts
    for t in sorted(free):
        for other in (t - 1, t + 1):
            if other in free and actions[t] == Action.BOTH != actions[other]:
                swapped = list(actions)
                swapped[t], swapped[other] = swapped[other], swapped[t]
                found.append(tuple(swapped))
    return found


def _nfe(actions: Sequence[Action]) -> int:
    return sum(Action(action).nfe for action in actions)


def _actions(steps: int, evaluated: set[int], left: Action) -> tuple[Action, ...]:
    return tuple(Action.BOTH if t in evaluated else left for t in range(steps))
