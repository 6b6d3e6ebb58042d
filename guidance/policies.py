"""Policies: which predictions a step evaluates, and what stands in for the one it leaves out.

A policy is a frozen dataclass with one method, `plan`: from the coming step and what the run has seen so far
it decides for every sample of the batch, on its own, between

    both           evaluate the conditional and the unconditional prediction
    conditional    evaluate the conditional one alone and use it unguided
    extrapolate    evaluate the conditional one alone and guide with an estimate of the other

It keeps no state: all memory is in the `History`, which belongs to one run. The first step a denoiser takes
in a run is always evaluated in full, because the pipeline's guidance is identified there; a plan for
anything else then decides only how the step is used. To add a policy, subclass `Policy` and write `plan`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Action = Literal["both", "conditional", "extrapolate"]
ACTIONS: tuple[Action, ...] = ("both", "conditional", "extrapolate")


class Decision(NamedTuple):
    """What to do for one sample at one step, and why (a few words for the report)."""

    action: Action
    why: str = ""


@dataclass(frozen=True)
class Step:
    """The coming evaluation: its number in this run, how many there are, and the scheduler's noise level.

    A two-stage solver such as Heun makes two evaluations a step; each counts. `velocity` is the prediction's
    factor in `v` (see `Space.velocity`), 1 where it is not known.
    """

    index: int
    count: int
    sigma: float | None
    velocity: float = 1.0


@dataclass
class History:
    """What one run has seen so far of one denoiser, for a batch of `rows` samples."""

    rows: int
    similarity: dict[str, list[Tensor]] = field(default_factory=lambda: {"denoised": [], "noise": []})
    """By space: one (rows,) tensor a step, NaN for samples whose halves were not both evaluated."""
    delta: Tensor | None = None
    """(rows, ...): each sample's last evaluated `cond - uncond`, as the denoiser put it out."""
    velocity: Tensor | None = None
    """(rows,): the factor that made `v` of a prediction at the step `delta` is from."""
    cond: list[Tensor] = field(default_factory=list)
    """By step, (rows, ...) each: the conditional predictions, kept only for a policy that `remembers`."""
    uncond: list[Tensor] = field(default_factory=list)
    """Likewise the unconditional ones; where a sample's was left out, what stood in for it."""

    def agreement(self, space: str) -> Tensor:
        """(steps so far, rows) similarities on the host, NaN where unknown."""
        seen = self.similarity[space]
        seen[:] = [values.float().cpu() for values in seen]  # what has been fetched stays: only the last is waited for
        return torch.stack(seen) if seen else torch.empty(0, self.rows)


@dataclass(frozen=True)
class Policy:
    """Base of all policies."""

    needs_denoised = False
    """Whether `plan` looks at similarities, and so needs a scheduler whose predictions can be denoised."""
    remembers = False
    """Whether `estimate` looks back on all predictions of the run, which then are kept in the history."""

    def plan(self, step: Step, history: History) -> list[Decision]:
        """One decision per sample for the coming step."""
        raise NotImplementedError

    def estimate(self, step: Step, history: History, cond: Tensor) -> Tensor:
        """(rows, ...) stand-in for the unconditional prediction where `plan` said "extrapolate".

        It holds each sample's last difference of the two as a velocity: of all spaces the one in which it
        changes least from step to step, as noise at low noise levels and as denoised sample at high ones.
        """
        assert history.delta is not None and history.velocity is not None
        factor = history.velocity / step.velocity
        return cond - history.delta * factor.to(cond.dtype).view(-1, *[1] * (cond.ndim - 1))


def _everyone(history: History, action: Action, why: str = "") -> list[Decision]:
    return [Decision(action, why)] * history.rows


@dataclass(frozen=True)
class EveryStep(Policy):
    """Both predictions at every step: classifier-free guidance as everyone runs it."""

    def plan(self, step: Step, history: History) -> list[Decision]:
        return _everyone(history, "both")


@dataclass(frozen=True)
class AdaptiveGuidance(Policy):
    """AG (arXiv 2312.12487, section 4): conditional only, once both predictions of a sample agree.

    The step at which a sample's similarity reaches the threshold is still guided, both of its predictions
    being there already; for the rest of the run that sample's unconditional prediction is not evaluated.

    Args:
        threshold: gamma-bar in (0, 1]. Higher keeps guidance longer.
        space: the predictions compared, "denoised" or "noise". The paper compares noise predictions, with
            0.991; on many models those agree to 0.999 from the first step, so denoised is the default.
        patience: how many steps in a row the similarity must reach the threshold.
    """

    threshold: float = 0.99
    space: Literal["denoised", "noise"] = "denoised"
    patience: int = 1

    needs_denoised = True

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold!r}: a number above 0, up to 1")
        if self.space not in ("denoised", "noise"):
            raise ValueError(f'space={self.space!r}: "denoised" or "noise"')
        if self.patience < 1:
            raise ValueError(f"patience={self.patience!r}: a whole number from 1 up")

    def plan(self, step: Step, history: History) -> list[Decision]:
        agree = history.agreement(self.space) >= self.threshold  # (steps, rows), False for NaN
        if len(agree) < self.patience:
            return _everyone(history, "both")
        crossed = agree.unfold(0, self.patience, 1).all(-1)  # (steps - patience + 1, rows)
        first = crossed.int().argmax(0) + self.patience - 1
        return [
            Decision("conditional", f"similarity reached {self.threshold:g} at step {i}") if done else Decision("both")
            for done, i in zip(crossed.any(0).tolist(), first.tolist(), strict=True)
        ]


@dataclass(frozen=True)
class Interval(Policy):
    """Guidance in a limited interval (arXiv 2404.07724); conditional only outside.

    `Interval(0.1, 0.6)` guides from 10 % of the steps, included, to 60 %, excluded. `Interval.sigma(low, high)`
    guides where low < sigma <= high, with sigma as the scheduler's own `sigmas` have it.
    """

    start: float = 0.0
    stop: float = 1.0
    by: Literal["fraction", "sigma"] = "fraction"

    def __post_init__(self) -> None:
        if self.by not in ("fraction", "sigma"):
            raise ValueError(f'by={self.by!r}: "fraction" or "sigma"')
        top = 1.0 if self.by == "fraction" else float("inf")
        if not 0 <= self.start < self.stop <= top:
            raise ValueError(f"start={self.start!r}, stop={self.stop!r}: 0 <= start < stop <= {top:g}")

    @classmethod
    def sigma(cls, low: float, high: float) -> "Interval":
        """Guidance where low < sigma <= high. The paper's best for SDXL is (0.28, 5.42]."""
        return cls(low, high, by="sigma")

    def plan(self, step: Step, history: History) -> list[Decision]:
        if self.by == "fraction":
            inside = self.start <= step.index / step.count < self.stop
            where = f"{step.index}/{step.count} is outside [{self.start:g}, {self.stop:g})"
        elif step.sigma is None:
            raise ValueError("Interval.sigma needs a scheduler whose noise levels are known; use fractions of steps")
        else:
            inside = self.start < step.sigma <= self.stop
            where = f"sigma {step.sigma:.3g} is outside ({self.start:g}, {self.stop:g}]"
        return _everyone(history, "both") if inside else _everyone(history, "conditional", where)


@dataclass(frozen=True)
class StepAG(Policy):
    """Guidance in the first `p` of the steps, conditional only afterwards (Step AG, arXiv 2506.08351)."""

    p: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise ValueError(f"p={self.p!r}: a share of the steps above 0, up to 1")

    def plan(self, step: Step, history: History) -> list[Decision]:
        if step.index < self.p * step.count:
            return _everyone(history, "both")
        return _everyone(history, "conditional", f"after the first {self.p:.0%} of the steps")


@dataclass(frozen=True)
class Hold(Policy):
    """Evaluates both predictions every `period` steps and holds their difference in between.

    Args:
        period: steps from one full evaluation to the next; 1 is every step.
        warmup: how many steps to evaluate in full at the start, whatever the period.
        last: count the periods back from the last step, so that it is evaluated in full too.
    """

    period: int = 2
    warmup: int = 1
    last: bool = False

    def __post_init__(self) -> None:
        if self.period < 1:
            raise ValueError(f"period={self.period!r}: a whole number from 1 up")
        if self.warmup < 1:
            raise ValueError(f"warmup={self.warmup!r}: a whole number from 1 up (there must be something to hold)")

    def plan(self, step: Step, history: History) -> list[Decision]:
        along = step.count - 1 - step.index if self.last else step.index
        if step.index < self.warmup or along % self.period == 0:
            return _everyone(history, "both")
        return _everyone(history, "extrapolate", f"held between every {self.period} steps")


@dataclass(frozen=True)
class Schedule(Policy):
    """A fixed action for every step of the run, such as a policy search returns.

    Args:
        actions: one of "both", "conditional", "extrapolate" per step. Its length must be the run's number of
            steps; "extrapolate" needs a "both" before it.
    """

    actions: Sequence[Action]

    def __post_init__(self) -> None:
        object.__setattr__(self, "actions", tuple(self.actions))
        for i, action in enumerate(self.actions):
            if action not in ACTIONS:
                raise ValueError(f"actions[{i}]={action!r}: one of {', '.join(ACTIONS)}")
            if action == "extrapolate" and "both" not in self.actions[:i]:
                raise ValueError(f'actions[{i}]="extrapolate" has no "both" before it to extrapolate from')

    def plan(self, step: Step, history: History) -> list[Decision]:
        if len(self.actions) != step.count:
            raise ValueError(f"the schedule has {len(self.actions)} steps, the run {step.count}: they must agree")
        return _everyone(history, self.actions[step.index], "scheduled")


@dataclass(frozen=True)
class LinearAG(Policy):
    """LinearAG (arXiv 2312.12487, section 5) on its published schedule.

    In the first half of the steps full and estimated evaluations alternate, in the second half the conditional
    prediction is used alone: 25 NFEs at 20 steps. Without a calibration the estimate holds the last
    difference of the two predictions.
    """

    def plan(self, step: Step, history: History) -> list[Decision]:
        if step.index >= step.count / 2:
            return _everyone(history, "conditional", "second half")
        if step.index % 2 == 0:
            return _everyone(history, "both")
        return _everyone(history, "extrapolate", "every other step of the first half")
