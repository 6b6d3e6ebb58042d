"""Policies: which predictions a step evaluates, and what replaces those it skips.

A policy is a frozen dataclass with one method, `plan`. From the next step and what the run has seen so far,
it chooses for each sample of the batch separately between

    both           evaluate the conditional and the unconditional prediction
    conditional    evaluate the conditional one only and use it unguided
    extrapolate    evaluate the conditional one only and guide with an estimate of the other
    neither        evaluate nothing and guide with estimates of both, or with a forecast of the guided prediction

(`steps.Action`). It keeps no state: all memory is in the `History`, which belongs to one run. The first step of a
denoiser in a run is always evaluated in full, because the pipeline's guidance is identified there. If the plan differs,
it decides only how the step's predictions are used. To add a policy, subclass `Policy` and write `plan`.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from diffusers_guidance import kernels
from diffusers_guidance.calibration import DELTAS, UNCONDS, Calibration, Fit, Moments
from diffusers_guidance.checks import is_number, is_whole, plain_fields
from diffusers_guidance.errors import CalibrationMismatch, UnsupportedScheduler
from diffusers_guidance.forecast import (
    UNMEASURED,
    Combination,
    at_scale,
    combined,
    denoised_gains,
    ending,
    forecast,
    missed,
    pattern,
    repayment,
    summed_error,
    weights,
)
from diffusers_guidance.motion import Known, far, known
from diffusers_guidance.spaces import Space
from diffusers_guidance.steps import Action, Decision, History, Plan, Step
from diffusers_guidance.variogram import Measured, PowerLaw


@dataclass(frozen=True)
class Policy:
    """Base of all policies."""

    needs_denoised = False
    """Whether `plan` uses similarities, and so needs a scheduler whose predictions can be denoised."""
    remembers = False
    """Whether `estimate` reads all predictions of the run; the history then keeps those that `reads` names."""
    estimates = True
    """Whether `plan` may say "extrapolate". If not, the history keeps no difference of both predictions."""
    hands = False
    """Whether the scheduler gets the result of `hand` in place of a step's guided prediction, under any rule. Such a
    policy does not need `predict` for steps that evaluate neither prediction."""
    calibration = None  # type: Calibration | None
    """What the policy is fitted to; a run of another setting is refused at its first step."""

    corrects = False
    """Whether the scheduler gets a step's guided prediction plus the policy's `correction`."""
    learns = False
    """Whether full runs under it are recorded, so that it can be `informed` of what they showed."""

    def __init_subclass__(cls) -> None:
        if "plan" in vars(cls) and "estimates" not in vars(cls):
            cls.estimates = True  # whatever the replaced plan says

    def __post_init__(self) -> None:
        plain_fields(self)

    def check(self, setting: dict[str, Any]) -> None:
        """Refuses a run whose `setting` is not the calibration's."""
        if self.calibration is not None:
            self.calibration.check(setting)

    def informed(self, calibration: Calibration | None, lack: str = "") -> "Policy":
        """The same policy with what is known by now. If runs cannot teach anything, `lack` says why."""
        return self

    def plan(self, step: Step, history: History) -> Plan:
        """One decision per sample for the next step; `planned` refuses anything else."""
        raise NotImplementedError

    def estimate(self, step: Step, history: History, cond: Tensor) -> Tensor:
        """(rows, ...) estimate of the unconditional prediction where `plan` said "extrapolate".

        It holds the last difference of each sample's predictions as a velocity. At low noise levels that is close to
        holding it as noise, and at high ones as a denoised sample.
        """
        assert history.delta is not None
        factors = [velocity / step.velocity for velocity in history.velocity]
        if len({*factors}) == 1:
            return kernels.mix([cond, history.delta], [1.0, -factors[0]], cond.dtype)
        rows = zip(cond.split(1), history.delta.split(1), factors, strict=True)
        return torch.cat([kernels.mix([c, d], [1.0, -factor], cond.dtype) for c, d, factor in rows])

    def reads(self, step: Step, history: History) -> tuple[Collection[int] | None, Collection[int] | None]:
        """The guided steps so far, this one included, whose conditional and unconditional predictions later estimates
        read, for a policy that `remembers`. None means all."""
        return None, None

    def predict(self, step: Step, history: History) -> tuple[Tensor, Tensor]:
        """(cond, uncond), (rows, ...) each, where `plan` said "neither"."""
        raise NotImplementedError(f"{type(self).__name__} has no estimate of both predictions")

    def correction(self, step: Step, history: History) -> Tensor | None:
        """What a policy that `corrects` adds to a step's guided prediction; None for nothing.

        Args:
            step: the one about to be taken.
            history: with the step's own predictions and action in it.
        """
        return None

    def hand(self, step: Step, history: History, guided: Tensor | None) -> "Handed":
        """What the scheduler gets from a policy that `hands`.

        Args:
            step: the one about to be taken.
            history: this method keeps its `guided` and `skipped`.
            guided: (rows, ...), the guided prediction; None if nothing was evaluated.
        """
        raise NotImplementedError(f"{type(self).__name__} hands on what was evaluated")


class Handed(NamedTuple):
    """What a scheduler gets, and what the report says about it."""

    prediction: Tensor
    note: str = ""
    sizes: Tensor | None = None
    """(3,) on the device: the norms of the average error of the forecasts before this step, of the repayment, and of
    the prediction, all as denoised samples."""
    basis: str = ""
    """What the run's forecasts rest on; see `Report.basis`."""


def planned(policy: Policy, step: Step, history: History) -> Plan:
    """The decisions of `policy.plan` for the next step, checked.

    Raises:
        TypeError: it is not a list of one `Decision` a sample.
        ValueError: its length is not the batch's, or a decision cannot be carried out.
    """
    plan, said = policy.plan(step, history), f"{type(policy).__name__}.plan, at step {step.index},"
    if not isinstance(plan, list | tuple) or isinstance(plan, Decision):
        raise TypeError(
            f"{said} returned {plan!r}: it must return a list of one Decision for each of {history.rows} samples"
        )
    if len(plan) != history.rows:
        raise ValueError(f"{said} returned {len(plan)} decisions for a batch of {history.rows}: give one a sample")
    for row, each in enumerate(plan):
        if not isinstance(each, Decision) or not isinstance(each.why, str):
            raise TypeError(
                f'{said} returned {each!r} for sample {row}: it must be a Decision, such as Decision("both", "why")'
            )
        if not isinstance(each.action, str) or each.action not in _ACTIONS:
            raise ValueError(f"{said} decided {each.action!r} for sample {row}: choose one of {', '.join(Action)}")
        if each.action == Action.NEITHER and not policy.hands and type(policy).predict is Policy.predict:
            raise ValueError(
                f'{said} decided "neither" for sample {row}, but {type(policy).__name__} has no estimate of both '
                "predictions: give it a method `predict`, or decide otherwise"
            )
    return [each if isinstance(each.action, Action) else Decision(Action(each.action), each.why) for each in plan]


_ACTIONS = frozenset(Action)


def estimated(policy: Policy, step: Step, history: History, cond: Tensor) -> Tensor:
    """The estimate of `policy.estimate`, checked against `cond`.

    Raises:
        TypeError: it is not a tensor.
        ValueError: it has another shape.
    """
    found = policy.estimate(step, history, cond)
    return _like(found, cond.shape, f"{type(policy).__name__}.estimate, at step {step.index},")


def predicted(policy: Policy, step: Step, history: History) -> tuple[Tensor, Tensor]:
    """The estimates of `policy.predict`, checked to be a pair of one shape; raises like `estimated`."""
    found, said = policy.predict(step, history), f"{type(policy).__name__}.predict, at step {step.index},"
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise TypeError(f"{said} returned a {type(found).__name__}: it must return a pair of tensors, (cond, uncond)")
    shape = torch.Size(getattr(history.delta, "shape", getattr(found[0], "shape", ())))
    return _like(found[0], shape, said), _like(found[1], shape, said)


def _like(found: Any, shape: torch.Size, said: str) -> Tensor:
    if not isinstance(found, Tensor):
        raise TypeError(f"{said} returned a {type(found).__name__}: it must be a tensor of shape {tuple(shape)}")
    if found.shape != shape:
        raise ValueError(f"{said} returned a tensor of shape {tuple(found.shape)}: it must be {tuple(shape)}")
    return found


def _everyone(history: History, action: Action | str, why: str = "") -> Plan:
    return [Decision(action, why)] * history.rows


@dataclass(frozen=True)
class EveryStep(Policy):
    """Both predictions at every step: ordinary classifier-free guidance."""

    estimates = False

    def plan(self, step: Step, history: History) -> Plan:
        return _everyone(history, Action.BOTH)


@dataclass(frozen=True)
class AdaptiveGuidance(Policy):
    """AG (arXiv 2312.12487, section 4): only the conditional prediction, once both predictions of a sample agree.

    The step at which a sample's similarity reaches the threshold is still guided, since both predictions exist already.
    For the rest of the run the sample's unconditional prediction is skipped.

    Args:
        threshold: gamma-bar in (0, 1]. A higher value keeps guidance longer.
        space: the predictions to compare, "denoised" or "noise". The paper compares noise predictions, with 0.991. On
            SDXL their similarity was seen to be 0.999 from the first step on, so "denoised" is the default.
        patience: how many steps in a row the similarity must reach the threshold.
    """

    threshold: float = 0.99
    space: Literal["denoised", "noise"] = "denoised"
    patience: int = 1

    needs_denoised = True
    estimates = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.threshold, 0, 1) and self.threshold > 0):
            raise ValueError(f"threshold={self.threshold!r}: a number above 0, up to 1")
        if self.space not in ("denoised", "noise"):
            raise ValueError(f'space={self.space!r}: "denoised" or "noise"')
        if not is_whole(self.patience, 1):
            raise ValueError(f"patience={self.patience!r}: a whole number from 1 up")

    @classmethod
    def from_calibration(
        cls, calibration: Calibration, save: float = 0.25, space: Literal["denoised", "noise"] | None = None
    ) -> "AdaptiveGuidance":
        """The threshold that saves this share of the NFEs, on average over the calibration's trajectories.

        Args:
            calibration: for the pipeline, scheduler and number of steps to be used.
            save: the share of a run's NFEs, from 0 to below 0.5.
            space: where to compare the predictions. Default: where the similarity rises most steadily.
        """
        threshold, chosen = calibration.threshold(save, space)
        return cls(threshold, chosen)  # type: ignore[arg-type]

    def plan(self, step: Step, history: History) -> Plan:
        """Uses the similarities that have arrived, and waits for the last one only if a sample is near the threshold.

        If a similarity jumps past the threshold from out of reach, its sample is guided for one step more.
        """
        seen = history.agreement(self.space, arrived=True)
        stopped = self._stopped(seen)
        if any(i is None and self._is_near(row) for i, row in zip(stopped, seen.unbind(1), strict=True)):
            stopped = self._stopped(history.agreement(self.space))
        why = f"similarity reached {self.threshold:g} at step"
        return [Decision(Action.BOTH) if i is None else Decision(Action.CONDITIONAL, f"{why} {i}") for i in stopped]

    def _stopped(self, seen: Tensor) -> list[int | None]:
        """The step at which each sample reached the threshold `patience` times in a row; `seen` is (steps, rows)."""
        agree = seen >= self.threshold  # False for NaN
        if len(agree) < self.patience:
            return [None] * seen.shape[1]
        crossed = agree.unfold(0, self.patience, 1).all(-1)  # (steps - patience + 1, rows)
        first = (crossed.int().argmax(0) + self.patience - 1).tolist()
        return [i if done else None for i, done in zip(first, crossed.any(0).tolist(), strict=True)]

    def _is_near(self, seen: Tensor) -> bool:
        """Whether a sample's similarity, known for the steps so far, may reach the threshold at the next one."""
        known = [value for value in seen.tolist() if value == value]
        return bool(known) and 1 - known[-1] <= REACH * (1 - self.threshold) + 1e-6


@dataclass(frozen=True)
class Interval(Policy):
    """Guidance in a limited interval (arXiv 2404.07724), and only the conditional prediction outside it.

    `Interval(0.1, 0.6)` guides from 10 % of the steps, included, to 60 %, excluded. `Interval.sigma(low, high)`
    guides where low < sigma <= high, with sigma as in the scheduler's own `sigmas`.
    """

    start: float = 0.0
    stop: float = 1.0
    by: Literal["fraction", "sigma"] = "fraction"

    estimates = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by not in ("fraction", "sigma"):
            raise ValueError(f'by={self.by!r}: "fraction" or "sigma"')
        top = 1.0 if self.by == "fraction" else float("inf")
        numbers = all(is_number(each, 0) or each == top for each in (self.start, self.stop))
        if not (numbers and self.start < self.stop <= top):
            raise ValueError(
                f"start={self.start!r}, stop={self.stop!r}: start must be below stop, and both from 0 to {top:g}"
            )

    @classmethod
    def sigma(cls, low: float, high: float) -> "Interval":
        """Guidance where low < sigma <= high. The paper's best interval for SDXL is (0.28, 5.42]."""
        return cls(low, high, by="sigma")

    def plan(self, step: Step, history: History) -> Plan:
        if self.by == "fraction":
            inside = self.start <= step.index / step.count < self.stop
            where = f"{step.index}/{step.count} is outside [{self.start:g}, {self.stop:g})"
        elif step.sigma is None:
            raise ValueError("Interval.sigma needs a scheduler whose noise levels are known; use fractions of steps")
        else:
            inside = self.start < step.sigma <= self.stop
            where = f"sigma {step.sigma:.3g} is outside ({self.start:g}, {self.stop:g}]"
        return _everyone(history, Action.BOTH) if inside else _everyone(history, Action.CONDITIONAL, where)


@dataclass(frozen=True)
class StepAG(Policy):
    """Guidance in the first share `p` of the steps, and none afterwards (Step AG, arXiv 2506.08351)."""

    p: float = 0.5

    estimates = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.p, 0, 1) and self.p > 0):
            raise ValueError(f"p={self.p!r}: a share of the steps above 0, up to 1")

    def plan(self, step: Step, history: History) -> Plan:
        if step.index / step.count < self.p:  # p * count may lie just above a whole number
            return _everyone(history, Action.BOTH)
        return _everyone(history, "conditional", f"after the first {self.p:.0%} of the steps")


@dataclass(frozen=True)
class Hold(Policy):
    """Evaluates both predictions every `period` steps and holds their difference in between.

    Args:
        period: steps from one full evaluation to the next; 1 is every step.
        warmup: how many steps to evaluate in full at the start, whatever the period.
        last: whether to count periods back from the last step, so that it is evaluated in full too.
    """

    period: int = 2
    warmup: int = 1
    last: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_whole(self.period, 1):
            raise ValueError(f"period={self.period!r}: a whole number from 1 up")
        if not is_whole(self.warmup, 1):
            raise ValueError(f"warmup={self.warmup!r}: a whole number from 1 up (it needs something to hold)")

    def plan(self, step: Step, history: History) -> Plan:
        along = step.count - 1 - step.index if self.last else step.index
        if step.index < self.warmup or along % self.period == 0:
            return _everyone(history, Action.BOTH)
        return _everyone(history, "extrapolate", f"held between every {self.period} steps")


@dataclass(frozen=True)
class Forecast(Policy):
    """Skips whole evaluations, forecasts their guided predictions, and repays the forecasts' errors.

    The noise levels and the budget decide which steps are evaluated: the first, the last unless it hardly moves the
    picture, and those that would cost most to skip (`forecast.pattern`). It seldom skips two steps in a row while the
    budget allows. A skipped step is handed an estimate from the last two evaluated guided predictions, as denoised
    samples; after the last evaluated step, that step's prediction. The next evaluated step is handed its own prediction
    and a repayment (`forecast.repayment`). It forecasts the guided prediction itself, so it works with any rule and any
    pipeline's own formula.

    Without a calibration, estimates follow a power law. With one, they follow this model's own motion, at any
    scheduler, number of steps, scale and size.

    If a scheduler's predictions cannot be denoised, they are forecast as they are, and nothing is repaid.

    Args:
        save: the least share of the NFEs to save, from 0 to below 1; at least two steps are evaluated.
        nfe: instead of `save`, the largest number of NFEs for one sample, 4 or more. An evaluated step takes two (one
            without guidance, one more for each further term). Steps that a run must evaluate are not counted: a second
            denoiser's first step, and the next step after steps without guidance.
        calibration: this model's calibration (from `calibrate`, or a handle's `calibration`), or its file, its folder,
            or the name of its repository on the Hub, from which it is then downloaded.
        learn: make a run in full if too little is known about such runs, and use what it shows from the next one on.
    """

    save: float = 0.25
    _: KW_ONLY
    nfe: int | None = None
    calibration: Calibration | None = None
    learn: bool = False

    hands = True
    estimates = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.save, 0) and self.save < 1):
            raise ValueError(f"save={self.save!r}: a share of the NFEs from 0 to below 1")
        if self.nfe is not None and not is_whole(self.nfe, 4):
            raise ValueError(f"nfe={self.nfe!r}: a whole number from 4 up (two steps), or None")
        if not isinstance(self.learn, bool):
            raise ValueError(f"learn={self.learn!r}: True or False")
        if isinstance(self.calibration, str | Path):
            object.__setattr__(self, "calibration", Calibration.from_pretrained(self.calibration))
        _check_calibration(self.calibration)
        if self.calibration is not None and not self.calibration.motions:
            raise CalibrationMismatch(
                f"{self.calibration!r} does not say how predictions move, which Forecast needs: calibrate anew"
            )

    @property
    def learns(self) -> bool:  # type: ignore[override]
        return self.learn

    def check(self, setting: dict[str, Any]) -> None:
        if self.calibration is not None:
            self.calibration.check({"denoisers": setting["denoisers"]})

    def informed(self, calibration: Calibration | None, lack: str = "") -> "Forecast":
        return replace(self, calibration=calibration, learn=self.learn and not lack)

    def pattern(self, count: int, table: tuple[Space, ...] = (), branches: int = 2) -> tuple[bool, ...]:
        """Whether each step of a run of `count` steps is evaluated, if an evaluated step takes `branches` NFEs.

        It follows the power law, whatever is known: schedules from recorded runs measured worse (docs/forecast.md).
        """
        return pattern(count, self._evaluations(count, branches), table)

    def _evaluations(self, count: int, branches: int) -> int:
        return math.floor((1 - self.save) * count + 1e-9) if self.nfe is None else self.nfe // branches

    def _known(self, table: tuple[Space, ...], scale: float | None) -> Known | None:
        return None if self.calibration is None else known(self.calibration.motions, table, scale)

    def _by(self, table: tuple[Space, ...], scale: float | None, branches: int = 2) -> PowerLaw | Measured:
        """The variogram for estimates: the power law or the measured one, whichever has the smaller measured error.

        The measured one estimates single predictions best, but does not always win: over few steps far apart the law
        repays more evenly.
        """
        found = self._known(table, scale)
        if found is None:
            return UNMEASURED
        chosen, measured = self.pattern(len(table), table, branches), found.variogram
        by_measured, by_law = (summed_error(chosen, table, by, measured) for by in (measured, UNMEASURED))
        return measured if by_measured * (1 + OPTIMISM / found.motion.runs) < by_law else UNMEASURED

    def _learning(self, table: tuple[Space, ...], scale: float | None, branches: int = 2) -> str:
        """Why a run of these steps is made in full, to be learned; empty if it is not."""
        if not self.learn or len(table) < 3:
            return ""
        found = self._known(table, scale)
        if found is None:
            return "nothing is known yet"
        if scale is not None and far(found.motion, scale) > math.log(2) + 1e-6:
            return f"scale {scale:g} is far from {found.motion.scale:g}"
        chosen, weight = self.pattern(len(table), table, branches), weights(table, found.variogram)
        share = missed(chosen, weight, found.doubt) / (missed(chosen, weight, found.variogram) or 1.0)
        return f"{share:.0%} of the predicted error was not measured" if share > MOST_DOUBT else ""

    def _basis(self, step: Step, scale: float | None) -> str:
        """What a run's forecasts rest on, for the report."""
        found = self._known(step.table, scale)
        if found is None:
            return ""
        motion = found.motion
        at = f"{len(motion.levels)} noise levels, scale {motion.scale:g}"
        favour = (
            "" if self._by(step.table, scale, step.branches).is_measured else ", which make a power law as good here"
        )
        return f"{motion.runs} run{'s' * (motion.runs > 1)} at {at}{favour}"

    def plan(self, step: Step, history: History) -> Plan:
        if not history.guided or history.is_denoised != bool(step.table):
            return _everyone(history, Action.BOTH)
        if self._learning(step.table, history.scale, step.branches):
            return _everyone(history, Action.BOTH)
        chosen = self.pattern(step.count, step.table, step.branches)[step.index]
        return _everyone(history, Action.BOTH if chosen else Action.NEITHER)

    def hand(self, step: Step, history: History, guided: Tensor | None) -> Handed:
        sample = step.sample
        space = step.space if step.table and sample is not None else None
        known = history.guided
        if guided is None and history.is_denoised != (space is not None):
            raise UnsupportedScheduler(
                f"step {step.index} cannot be forecast: the scheduler was replaced just before, and only one of the "
                "two has predictions that can be denoised. Replace it before the run, or use another policy"
            )
        note = basis = ""
        if history.scale is None:
            history.begin(step.typical_w)
            if learning := self._learning(step.table, history.scale, step.branches):
                note = f"evaluated in full, to learn: {learning}"
            elif basis := self._basis(step, history.scale):
                note = f"later steps go by {basis}"
        by = UNMEASURED if space is None else self._by(step.table, history.scale, step.branches)
        if guided is not None and (
            history.is_denoised != (space is not None) or any(each.shape != guided.shape for each in known.values())
        ):
            history.lapse()  # from another scheduler or other samples
        if step.w is not None:
            history.scales[step.index] = step.w
        if guided is None:
            history.skipped.append(step.index)
            chosen = self.pattern(step.count, step.table, step.branches)
            combination = ending(chosen, step.index, [*known]) or forecast([*known], step.index, by)
            made = _predicted(at_scale(step.w, history), combination, sample, space)
            return Handed(made, f"forecast from {_named(combination)}")
        now = _denoised(guided, sample, space)
        skipped = history.keep_guided(step.index, now, space is not None, 1.0 if space is None else space.b)
        found = Handed(guided, note, basis=basis) if not skipped or space is None or space.b == 0 else None
        if found is None:
            assert space is not None
            gain = denoised_gains(step.table)
            repaid = _missing(history, skipped, gain, by)
            sizes = [self._off(history, skipped, gain, by, repaid), repaid.norm(), now.norm()]
            handed = kernels.mix([guided, repaid], [1.0, 1 / space.b], guided.dtype)
            found = Handed(handed, f"repays {_named(skipped)}", torch.stack(sizes))
        history.keep_last(2)  # a later estimate reads these and its own
        return found

    def _off(
        self,
        history: History,
        skipped: Sequence[int],
        gain: Sequence[float],
        by: PowerLaw | Measured,
        repaid: Tensor,
    ) -> Tensor:
        """The norm of the average error of the forecasts since the step before the last evaluated one.

        With equal gains, a repayment is the sum of the errors as now known.
        """
        now = max(history.guided)
        if len(skipped) == 1 and gain[skipped[0]] and gain[now]:  # the repayment without its gain
            return repaid.norm() * (gain[now] / gain[skipped[0]])
        return _missing(history, skipped, [1.0] * len(gain), by).norm() / len(skipped)


REACH = 3.0
"""The factor by which a similarity's distance from 1 may fall in a step. It falls by less at 99 of 100 steps of the
bundled model's runs."""
OPTIMISM = 0.12
"""The share by which the summed error of one run's estimates is larger in other runs than in that run; for two runs it
is half."""
MOST_DOUBT = 0.5
"""The share of a forecast's predicted error that may be unmeasured before a run is learned anew."""


def _named(steps: Iterable[int]) -> str:
    steps = [*steps]
    return f"step{'s' * (len(steps) > 1)} {', '.join(map(str, steps))}"


def _denoised(guided: Tensor, sample: Tensor | None, space: Space | None) -> Tensor:
    """A guided prediction to remember: denoised where possible; always a copy, at least float32."""
    working = torch.promote_types(guided.dtype, torch.float32)
    if space is None or sample is None:
        return guided.to(working, copy=True)
    return kernels.mix([sample, guided], [space.a, space.b], torch.promote_types(working, sample.dtype))


def _missing(history: History, skipped: Sequence[int], gain: Sequence[float], by: PowerLaw | Measured) -> Tensor:
    """What to add to the last evaluated denoised prediction to repay the steps skipped before it."""
    known = history.guided
    if not history.slopes:
        return combined(known, repayment([*known], skipped, gain, by))
    return torch.stack(
        [combined(at_scale(history.scales.get(j), history), repayment([*known], [j], gain, by)) for j in skipped]
    ).sum(0)


def _predicted(
    known: dict[int, Tensor], combination: Combination, sample: Tensor | None, space: Space | None
) -> Tensor:
    """The prediction that denoises to a combination of those in `known`."""
    if space is None or sample is None:
        return combined(known, combination)
    b = space.b or 1.0  # with b = 0, any prediction denoises alike
    terms = [*(known[step] for step in combination), sample]
    return kernels.mix(terms, [*(factor / b for factor in combination.values()), -space.a / b], terms[0].dtype)


@dataclass(frozen=True)
class Schedule(Policy):
    """A fixed action for every step of the run, for example as `search` returns them.

    Args:
        actions: one of "both", "conditional", "extrapolate", "neither" per step. Its length must be the run's
            number of steps. Estimates need a "both" before them, and "neither" needs a calibration.
        calibration: the calibration to fit estimates to. None: holds the last difference of both predictions.
        fit: how to fit them.
        repay: whether a step that evaluates both repays the estimates before it, as in schedules of `search`
            (`calibration.repayments`). It needs a calibration.
    """

    actions: Sequence[Action | str]
    calibration: Calibration | None = None
    fit: Fit = DELTAS
    repay: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "actions", tuple(self.actions))
        if not self.actions:
            raise ValueError(f"actions={self.actions!r}: one of {', '.join(Action)} for each step, at least one")
        _check_calibration(self.calibration)
        for i, action in enumerate(self.actions):
            if action not in {*Action}:
                raise ValueError(f"actions[{i}]={action!r}: one of {', '.join(Action)}")
            if action in (Action.EXTRAPOLATE, Action.NEITHER) and Action.BOTH not in self.actions[:i]:
                raise ValueError(f'actions[{i}]={action!r} has no "both" before it to extrapolate from')
            if action == Action.NEITHER and self.calibration is None:
                raise ValueError(f'actions[{i}]="neither" needs a calibration: nothing else estimates both predictions')
        object.__setattr__(self, "actions", tuple(map(Action, self.actions)))
        if not isinstance(self.repay, bool) or (self.repay and self.calibration is None):
            raise ValueError(
                f"repay={self.repay!r}: True or False, and True only with a calibration, which says how much"
            )
        if self.calibration is not None and len(self.actions) != self.calibration.steps:
            raise CalibrationMismatch(
                f"the schedule has {len(self.actions)} steps, unlike {self.calibration!r}: they must agree"
            )

    @property
    def remembers(self) -> bool:  # type: ignore[override]
        return self.calibration is not None

    @property
    def corrects(self) -> bool:  # type: ignore[override]
        return self.repay

    @property
    def nfe(self) -> int:
        """Network evaluations of one sample. A denoiser's first step is always evaluated in full."""
        firsts = {0} if self.calibration is None else {m.first for m in self.calibration.denoisers.values()}
        return sum(2 if t in firsts else Action(action).nfe for t, action in enumerate(self.actions))

    def plan(self, step: Step, history: History) -> Plan:
        if len(self.actions) != step.count:
            raise ValueError(f"the schedule has {len(self.actions)} steps, the run {step.count}: they must agree")
        return _everyone(history, self.actions[step.index], "scheduled")

    def estimate(self, step: Step, history: History, cond: Tensor) -> Tensor:
        if self.calibration is None:
            return super().estimate(step, history, cond)
        here = len(history.cond)
        _, delta = self._rows(step, history)
        return _mixed([*history.cond, cond], history.uncond, _one(here, delta) - delta)

    def predict(self, step: Step, history: History) -> tuple[Tensor, Tensor]:
        cond, delta = self._rows(step, history)
        found = [_mixed(history.cond, history.uncond, factors) for factors in (cond, cond - delta)]
        return found[0], found[1]

    def reads(self, step: Step, history: History) -> tuple[Collection[int] | None, Collection[int] | None]:
        if self.calibration is None or history.denoiser not in self.calibration.denoisers:
            return None, None
        actions = tuple(map(Action, self.actions))
        conds, deltas = _read_later(self.calibration, history.denoiser, actions, self.fit, len(history.cond))
        if self.repay:  # from the last three steps evaluated in full, planned or not
            full = [t for t, action in enumerate(history.actions) if action == Action.BOTH]
            recent = {*range(full[-3] if len(full) > 2 else 0, len(history.cond) + 1)}
            return conds | recent, deltas | recent
        return conds, deltas

    def correction(self, step: Step, history: History) -> Tensor | None:
        assert self.calibration is not None
        moments, seen = self._moments(step, history, len(history.cond) - 1), len(history.cond)
        # A step planned as skipped may have been evaluated after all: repay what was done, not what was planned.
        done = (*self.actions[: moments.first], *history.actions, *self.actions[moments.first + seen :])
        added, _ = self.calibration.repayments(history.denoiser, done, self.fit)
        factors = added[:, seen - 1]
        return _mixed(history.cond, history.uncond, factors.T) if bool(factors.any()) else None

    def _rows(self, step: Step, history: History) -> tuple[Tensor, Tensor]:
        """(2T, C) each: the factors of the step's cond and delta, for conditional predictions and then for deltas."""
        assert self.calibration is not None
        moments, seen = self._moments(step, history, len(history.cond)), len(history.cond)
        table = self.calibration.coefficients(history.denoiser, self.actions, self.fit)  # (C, 2T, 2T)
        return table[:, seen].T, table[:, moments.steps + seen].T

    def _moments(self, step: Step, history: History, before: int) -> Moments:
        """The denoiser's moments, for a run that began at the same step; `before` counts its earlier guided steps."""
        assert self.calibration is not None
        moments = self.calibration.moments(history.denoiser)
        if step.index - before != moments.first:
            raise CalibrationMismatch(
                f"this run's first guided step is {step.index - before}; {self.calibration!r} began at {moments.first}"
            )
        return moments


def _one(step: int, like: Tensor) -> Tensor:
    """The factors of a step's conditional prediction itself."""
    found = torch.zeros_like(like)
    found[step] = 1.0
    return found


def _mixed(conds: Sequence[Tensor], unconds: Sequence[Tensor], factors: Tensor) -> Tensor:
    """The sum of (2T, C) factors times conditional predictions, then times deltas, with delta = cond - uncond."""
    of_cond, of_delta = factors.chunk(2)
    tensors = [*zip(conds, of_cond + of_delta, strict=False), *zip(unconds, -of_delta, strict=False)]
    used = [(tensor, each) for tensor, each in tensors if each.any()]
    dtype = conds[-1].dtype
    if factors.shape[1] == 1:
        return kernels.mix([tensor for tensor, _ in used], [float(each) for _, each in used], dtype)
    total = torch.zeros_like(used[0][0], dtype=torch.promote_types(dtype, torch.float32))
    for tensor, each in used:
        by_channel = each.to(total.dtype).view(-1, *[1] * (tensor.ndim - 2))
        by_channel = by_channel.pin_memory() if tensor.is_cuda else by_channel
        total.addcmul_(tensor.to(total.dtype), by_channel.to(tensor.device, non_blocking=True))
    return total.to(dtype)


@lru_cache(maxsize=1024)
def _read_later(
    calibration: Calibration, denoiser: str, actions: tuple[Action, ...], fit: Fit, seen: int
) -> tuple[frozenset[int], frozenset[int]]:
    """Which predictions of the first `seen` + 1 steps later estimates read: the conditional, the unconditional."""
    moments = calibration.moments(denoiser)
    own = actions[moments.first : moments.first + moments.steps]
    used = calibration.coefficients(denoiser, actions, fit).any(0)  # (2T, 2T)
    later = torch.zeros(2 * moments.steps, dtype=torch.bool)
    for t in range(seen + 1, len(own)):
        if own[t].is_estimated:
            later |= used[moments.steps + t]
        if own[t] == Action.NEITHER:
            later |= used[t]
    conds, deltas = ({*each.nonzero().flatten().tolist()} for each in later.chunk(2))
    return frozenset(conds | deltas), frozenset(deltas)


@dataclass(frozen=True)
class LinearAG(Policy):
    """LinearAG (arXiv 2312.12487, section 5): a linear combination of past predictions replaces a skipped one.

    Its published schedule alternates full and estimated evaluations in the first half of the steps, and uses the
    conditional prediction alone in the second half: 25 NFEs at 20 steps. `search` finds better ones.

    Args:
        calibration: the calibration to fit the combination to. None: holds the last difference of both predictions.
        actions: for each step, as in `Schedule`. Default: the published ones.
        fit: how to fit the combination. Default: as published.
    """

    calibration: Calibration | None = None
    actions: Sequence[Action | str] | None = None
    fit: Fit = UNCONDS

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_calibration(self.calibration)
        if self.actions is not None:
            object.__setattr__(self, "actions", Schedule(self.actions, self.calibration, self.fit).actions)

    @property
    def remembers(self) -> bool:  # type: ignore[override]
        return self.calibration is not None

    def schedule(self, steps: int) -> Schedule:
        """Its actions in a run of `steps` steps."""
        return Schedule(self.actions or published(steps), self.calibration, self.fit)

    def plan(self, step: Step, history: History) -> Plan:
        decisions = self.schedule(step.count).plan(step, history)
        return decisions if self.actions else [Decision(action, "published schedule") for action, _ in decisions]

    def estimate(self, step: Step, history: History, cond: Tensor) -> Tensor:
        return self.schedule(step.count).estimate(step, history, cond)

    def predict(self, step: Step, history: History) -> tuple[Tensor, Tensor]:
        return self.schedule(step.count).predict(step, history)

    def reads(self, step: Step, history: History) -> tuple[Collection[int] | None, Collection[int] | None]:
        return self.schedule(step.count).reads(step, history)


def _check_calibration(calibration: Any) -> None:
    if not isinstance(calibration, Calibration | None):
        raise TypeError(f"calibration={calibration!r}: give a Calibration, such as Calibration.load(file)")


def published(steps: int) -> tuple[Action, ...]:
    """LinearAG's schedule: every other step of the first half evaluates both; the second half is unguided."""
    guided = (Action.BOTH, Action.EXTRAPOLATE)
    return tuple(guided[i % 2] if i < steps / 2 else Action.CONDITIONAL for i in range(steps))
