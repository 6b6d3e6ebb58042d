"""A step and what is known about it, as values for rules, policies, kernels, observers and the report.

Step         which evaluation of the run it is, and what its prediction means
Decision     what a policy does with one sample at a step: an `Action`, and why
Prediction   what was evaluated, with estimates for the rest
History      what a run has seen so far
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from diffusers_guidance.observation import Observation
from diffusers_guidance.spaces import Space

Value = TypeVar("Value")


class Action(str, Enum):
    """What a step does for one sample. Each action is equal to its name, a plain string."""

    BOTH = "both"
    """Evaluate the conditional and the unconditional prediction."""
    CONDITIONAL = "conditional"
    """Evaluate the conditional prediction only, and use it unguided."""
    EXTRAPOLATE = "extrapolate"
    """Evaluate the conditional prediction only, and guide with an estimate of the unconditional one."""
    NEITHER = "neither"
    """Evaluate nothing: guide with estimates of both, or with a forecast of the guided prediction."""

    @property
    def nfe(self) -> int:
        """Network evaluations of one sample."""
        return {"both": 2, "conditional": 1, "extrapolate": 1, "neither": 0}[self.value]

    @property
    def is_estimated(self) -> bool:
        """Whether it guides with an estimate."""
        return self in ESTIMATED

    def __repr__(self) -> str:
        return repr(self.value)

    __str__ = str.__str__


ESTIMATED = (Action.EXTRAPOLATE, Action.NEITHER)
"""The actions that guide with an estimate."""


class Decision(NamedTuple):
    """What to do for one sample at one step, and why (a few words for the report).

    "neither" applies to a whole batch or not at all: if other samples are evaluated, so is this one.
    """

    action: Action | str
    why: str = ""


Plan = list[Decision]
"""One decision for each sample of a batch."""


@dataclass(frozen=True, eq=False)
class Step:
    """One evaluation of a run. A two-stage solver such as Heun makes two evaluations a step; each counts.

    A policy's `plan` sees it before the evaluation. Then `sample` is not known yet, and `w` only if it is scheduled.
    """

    index: int = 0
    """Its number in the run, from 0."""
    count: int = 1
    """The number of evaluations in the run."""
    timestep: float | None = None
    """The scheduler's timestep; None if unknown."""
    space: Space | None = None
    """What sample and prediction mean; None if unknown."""
    sample: Tensor | None = None
    """(rows, ...): x_t as the scheduler has it; None if it cannot denoise the prediction."""
    w: float | tuple[float, ...] | None = None
    """The settled guidance scale, where 1 is the conditional prediction alone; one for each sample if they differ.

    A rule gets a number: samples with different scales are guided separately.
    """
    mean_w: float | None = None
    """The mean of `w` over the run if it follows a schedule; None if it does not."""
    rows: int = 1
    """Samples in the batch."""
    branches: int = 2
    """Network evaluations of a sample without a policy: 1 without guidance, more than 2 with further terms."""
    denoiser: str = ""
    """The name of the network in its pipeline, such as "unet"."""
    table: tuple[Space, ...] = ()
    """The spaces of all steps of the run; empty if unknown."""
    velocity: float = 1.0
    """The factor from the network's output to `v` (see `Space.velocity`); 1 if unknown."""

    @property
    def sigma(self) -> float | None:
        """The scheduler's noise level."""
        return None if self.space is None else self.space.sigma

    @property
    def typical_w(self) -> float | None:
        """The mean of the guidance scale over its schedule, or over the samples."""
        if self.mean_w is not None:
            return self.mean_w
        return sum(self.w) / len(self.w) if isinstance(self.w, tuple) else self.w

    def on(self, sample: Tensor | None, prediction: Tensor, space: Space | None) -> "Step":
        """The step with this sample and space if the sample can denoise the prediction; else without both."""
        known = space is not None and sample is not None and sample.shape == prediction.shape
        return changed(self, sample=sample if known else None, space=space if known else None)


class Apart(NamedTuple):
    """How a prediction of a further term differs from the one that it is subtracted from, or whose part it is."""

    difference: Tensor
    """(rows, ...), of predictions as the network returned them."""
    from_cond: bool
    """Whether from the conditional prediction; else from the unconditional one."""
    velocity: Sequence[float | None]
    """For each row, the factor from a prediction to `v` at the step of its difference; None if it was not evaluated."""

    def after(self, before: "Apart | None") -> "Apart":
        """With the rows of `before` where they were not evaluated again."""
        if before is None or before.from_cond != self.from_cond:
            return self
        new = [velocity is not None for velocity in self.velocity]
        velocity = [now if now is not None else was for now, was in zip(self.velocity, before.velocity, strict=True)]
        return Apart(pick(new, self.difference, before.difference), self.from_cond, velocity)


@dataclass(frozen=True, eq=False)
class Prediction:
    """A step's predictions for all rows, each (rows, ...), with substitutes for those that were not evaluated."""

    cond: Tensor
    uncond: Tensor
    """For rows that were not evaluated, an estimate, or the conditional prediction if no estimate is needed."""
    evaluated: Sequence[bool]
    """By row, whether both are the network's own."""
    put_out: tuple[Tensor, Tensor] | None = None
    """(cond, uncond) as the network returned them, in their own memory, if the scheduler takes them in another form."""
    nfe: int = -1
    """Network evaluations made for all samples together. Default: two for each evaluated sample, one for each other."""
    nfe_full: int = -1
    """Network evaluations that plain guidance would have made. Default: two for each sample."""
    observation: Observation | None = None
    """The step's measures, if they are known already."""
    note: str = ""
    """The report's note on the step."""
    further: Tensor | None = None
    """(rows, ...): what further terms add to the guided prediction, such as s (c - p) with a perturbed prediction p."""
    apart: Mapping[int, Apart] = field(default_factory=dict)
    """How the further predictions differ from these two, by a number that the host gives them."""

    def __post_init__(self) -> None:
        rows = len(self.evaluated)
        if self.nfe < 0:
            object.__setattr__(self, "nfe", rows + sum(self.evaluated))
        if self.nfe_full < 0:
            object.__setattr__(self, "nfe_full", 2 * rows)

    @property
    def own(self) -> tuple[Tensor, Tensor]:
        """(cond, uncond) as the network returned them."""
        return (self.cond, self.uncond) if self.put_out is None else self.put_out

    @property
    def similarity(self) -> Tensor | None:
        """(2, rows): of the denoised predictions and of the noise, NaN where unknown. None before observers are told.

        This waits for the device.
        """
        return None if self.observation is None else self.observation.similarity


@dataclass
class History:
    """What one run has seen of one denoiser so far, for a batch of `rows` samples."""

    rows: int
    denoiser: str = ""
    """Its name in the pipeline, such as "unet"."""
    seen: list[Observation] = field(default_factory=list)
    """The measures of each step.

    If another denoiser ran before this one in the run (Wan 2.2's first expert), its steps come first.
    """
    delta: Tensor | None = None
    """(rows, ...): each sample's last evaluated `cond - uncond`, as the denoiser returned it, for policies that
    `estimates`."""
    apart: Mapping[int, Apart] = field(default_factory=dict)
    """Likewise of the predictions of further terms; see `Prediction.apart`."""
    velocity: list[float] = field(default_factory=list)
    """For each row, the factor from a prediction to `v` at the step of `delta`."""
    cond: list[Tensor] = field(default_factory=list)
    """The conditional prediction of each step, (rows, ...), kept only for a policy that `remembers`. A prediction that
    no later estimate reads is an empty tensor."""
    uncond: list[Tensor] = field(default_factory=list)
    """Likewise the unconditional predictions; skipped samples have their substitutes."""
    actions: list[Action] = field(default_factory=list)
    """The action of each step for the first sample."""
    guided: dict[int, Tensor] = field(default_factory=dict)
    """The last guided predictions by step, in the form in which a policy that `hands` keeps them."""
    is_denoised: bool = False
    """Whether `guided` holds denoised samples; if not, predictions in the scheduler's form."""
    skipped: list[int] = field(default_factory=list)
    """The steps since the last one in `guided`."""
    scale: float | None = None
    """The settled guidance scale of the run's first step, or the mean of a schedule, for policies that `hands`."""
    direction: Tensor | None = None
    """What a scale larger by 1 would add to the last guided prediction; None if the scale does not change."""
    scales: dict[int, float | tuple[float, ...]] = field(default_factory=dict)
    """The scales of the steps in `guided` and `skipped`, if they change."""
    slopes: dict[int, Tensor] = field(default_factory=dict)
    """What a scale larger by 1 would add to each of `guided`, if the scale changes."""

    @classmethod
    def following(cls, others: Iterable["History"], steps: int, rows: int, denoiser: str) -> "History":
        """A new history, with similarities and forecasts from the loop's earlier denoiser (Wan 2.2's first).

        Args:
            others: the loop's histories. One with more steps than the loop's `steps` so far is from an earlier loop.
        """
        made = cls(rows, denoiser)
        for other in others:
            if other.rows == rows and len(other.seen) <= steps:
                made.seen = [*other.seen]
                made.guided, made.skipped = dict(other.guided), list(other.skipped)
                made.is_denoised, made.scale = other.is_denoised, other.scale
                made.scales, made.slopes = dict(other.scales), dict(other.slopes)
        return made

    def agreement(self, space: str, arrived: bool = False) -> Tensor:
        """(steps so far, rows) similarities on the host, NaN where unknown.

        Args:
            space: "denoised" or "noise".
            arrived: skip the last step's if they are still on the device; otherwise this waits for them.
        """
        seen = self.seen[:-1] if arrived and self.seen and not self.seen[-1].is_here else self.seen
        row = ("denoised", "noise").index(space)
        return torch.stack([each.similarity for each in seen])[:, row] if seen else torch.empty(0, self.rows)

    def keep_difference(self, prediction: Prediction, velocity: float) -> None:
        """Keeps the differences of a step's predictions, for the rows that evaluated them."""
        self.apart = {k: found.after(self.apart.get(k)) for k, found in prediction.apart.items()}
        evaluated = prediction.evaluated
        if any(evaluated):
            cond, uncond = prediction.own
            before, was = self.delta, self.velocity or [velocity] * self.rows
            self.delta = cond - uncond if before is None else pick(evaluated, cond - uncond, before)
            self.velocity = [velocity if new else old for new, old in zip(evaluated, was, strict=True)]

    def keep(self, prediction: Prediction, conds: Collection[int] | None, unconds: Collection[int] | None) -> None:
        """Keeps a step's predictions.

        Args:
            conds: the steps whose conditional predictions later estimates read; None means all. Others are dropped.
            unconds: likewise for the unconditional predictions.
        """
        cond, uncond = prediction.own
        self.cond.append(cond)
        self.uncond.append(uncond)
        for kept, others, read in ((self.cond, self.uncond, conds), (self.uncond, self.cond, unconds)):
            for i in range(len(kept)):
                if read is not None and i not in read and kept[i].numel():
                    shared = kept[i].untyped_storage().data_ptr() == others[i].untyped_storage().data_ptr()
                    kept[i] = kept[i].new_empty(0)
                    if shared:  # both are parts of one output
                        others[i] = others[i].clone()

    def begin(self, scale: float | None) -> None:
        """Takes in the scale of the run's first step, of a policy that `hands`."""
        self.scale = scale

    def turn(self, direction: Tensor | None) -> None:
        """Takes in what a scale larger by 1 would add to the step's guided prediction."""
        self.direction = direction

    def keep_guided(self, step: int, guided: Tensor, is_denoised: bool, factor: float = 1.0) -> list[int]:
        """Keeps a step's guided prediction, in the policy's form; returns the steps that were skipped before it.

        Args:
            factor: from a prediction to that form, for what is added to one.
        """
        self.guided[step], self.is_denoised = guided, is_denoised
        if self.direction is not None:
            self.slopes[step] = factor * self.direction
        skipped, self.skipped = self.skipped, []
        return skipped

    def keep_last(self, count: int) -> None:
        """Forgets all guided predictions but the last ones."""
        for step in sorted(self.guided)[:-count]:
            del self.guided[step]
            self.slopes.pop(step, None)

    def lapse(self) -> None:
        """Forgets the predictions that forecasts are made from, since this step was not guided."""
        for each in (self.guided, self.skipped, self.scales, self.slopes):
            each.clear()


def changed(value: Value, **fields: Any) -> Value:
    """`dataclasses.replace` for values that check nothing; it takes a tenth of the time."""
    made = object.__new__(type(value))
    vars(made).update(vars(value) | fields)
    return made


def pick(chosen: Sequence[bool], there: Tensor, otherwise: Tensor) -> Tensor:
    """Row by row: `there` where chosen, else `otherwise`."""
    if all(chosen):
        return there
    if not any(chosen):
        return otherwise
    return torch.stack([(there if was else otherwise)[i] for i, was in enumerate(chosen)])
