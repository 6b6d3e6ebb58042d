"""A step and what is known of it, as values for rules, policies, kernels, observers and the report.

Step         which evaluation of the run it is, and what its prediction means
Decision     what a policy does with one sample at a step: an `Action`, and why
Prediction   what was evaluated, with estimates for the rest
History      what a run has seen so far
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from diffusers_guidance.observation import Observation
from diffusers_guidance.spaces import Space


class Action(str, Enum):
    """What a step does for one sample. Each action equals its name, a plain string."""

    BOTH = "both"
    """Evaluate the conditional and the unconditional prediction."""
    CONDITIONAL = "conditional"
    """Evaluate the conditional one alone, and use it unguided."""
    EXTRAPOLATE = "extrapolate"
    """Evaluate the conditional one alone, and guide with an estimate of the other."""
    NEITHER = "neither"
    """Evaluate nothing: guide with estimates of both, or with a forecast of the guided prediction."""

    @property
    def nfe(self) -> int:
        """Network evaluations of one sample."""
        return {"both": 2, "conditional": 1, "extrapolate": 1, "neither": 0}[self.value]

    @property
    def is_estimated(self) -> bool:
        """Whether it guides with an estimate."""
        return self in (Action.EXTRAPOLATE, Action.NEITHER)

    def __repr__(self) -> str:
        return repr(self.value)

    __str__ = str.__str__


class Decision(NamedTuple):
    """What to do for one sample at one step, and why (a few words for the report).

    "neither" holds for a whole batch or not at all: if other samples are evaluated, so is this one.
    """

    action: Action | str
    why: str = ""


Plan = list[Decision]
"""One decision for each sample of a batch."""


@dataclass(frozen=True, eq=False)
class Step:
    """One evaluation of a run. A two-stage solver such as Heun makes two evaluations a step; each counts.

    A policy's `plan` sees it before the evaluation, when `sample` is not known yet, and `w` only if it is scheduled.
    """

    index: int = 0
    """Its number in the run, from 0."""
    count: int = 1
    """How many evaluations the run makes."""
    timestep: float | None = None
    """The scheduler's; None if unknown."""
    space: Space | None = None
    """What sample and prediction mean; None if unknown."""
    sample: Tensor | None = None
    """(rows, ...): x_t as the scheduler has it; None if it cannot denoise the prediction."""
    w: float | tuple[float, ...] | None = None
    """The settled guidance scale, where 1 is the conditional prediction alone; or one for each sample.

    A rule gets a number: samples that differ are guided apart.
    """
    mean_w: float | None = None
    """Its mean over the run where it follows a schedule; None: it is `w`, as far as is known."""
    rows: int = 1
    """Samples in the batch."""
    branches: int = 2
    """Network evaluations of a sample without a policy: 1 where nothing is guided, more than 2 with further terms."""
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


@dataclass(frozen=True, eq=False)
class Prediction:
    """A step's predictions for all rows, each (rows, ...); substitutes replace what was not evaluated."""

    cond: Tensor
    uncond: Tensor
    """For rows that were not evaluated, an estimate, or the conditional prediction if no estimate is needed."""
    evaluated: Sequence[bool]
    """By row, whether both are the network's own."""
    put_out: tuple[Tensor, Tensor] | None = None
    """(cond, uncond) as the network put them out, in their own memory, if the scheduler takes them in another form."""
    nfe: int = -1
    """Network evaluations made, of all samples together. Default: two for each evaluated sample, one for others."""
    nfe_full: int = -1
    """Those that plain guidance would have made. Default: two for each sample."""
    observation: Observation | None = None
    """What the step showed of itself, if that is known already."""
    note: str = ""
    """The report's note on it."""
    further: Tensor | None = None
    """(rows, ...): what terms beside guidance add to the guided prediction, such as s (c - p) of a perturbed one."""

    def __post_init__(self) -> None:
        rows = len(self.evaluated)
        if self.nfe < 0:
            object.__setattr__(self, "nfe", rows + sum(self.evaluated))
        if self.nfe_full < 0:
            object.__setattr__(self, "nfe_full", 2 * rows)

    @property
    def own(self) -> tuple[Tensor, Tensor]:
        """(cond, uncond) as the network put them out."""
        return (self.cond, self.uncond) if self.put_out is None else self.put_out

    @property
    def similarity(self) -> Tensor | None:
        """(2, rows) of the denoised predictions and of the noise, NaN where unknown; None before an observer is told.

        It waits for the device.
        """
        return None if self.observation is None else self.observation.similarity


@dataclass
class History:
    """What one run has seen so far of one denoiser, for a batch of `rows` samples."""

    rows: int
    denoiser: str = ""
    """Its name in the pipeline, such as "unet"."""
    seen: list[Observation] = field(default_factory=list)
    """By step, what it showed of itself.

    They begin with those of the denoiser it took over from in this run, as Wan 2.2's second expert does.
    """
    delta: Tensor | None = None
    """(rows, ...): each sample's last evaluated `cond - uncond`, as the denoiser put it out; of a policy that
    `estimates`."""
    velocity: list[float] = field(default_factory=list)
    """By row, the factor from a prediction to `v` at the step of `delta`."""
    cond: list[Tensor] = field(default_factory=list)
    """By step, (rows, ...) each: the conditional predictions, kept only for a policy that `remembers`; where no later
    estimate reads one, an empty tensor."""
    uncond: list[Tensor] = field(default_factory=list)
    """Likewise the unconditional ones; for skipped samples, the substitute."""
    actions: list[Action] = field(default_factory=list)
    """By step: what was done with the first sample."""
    guided: dict[int, Tensor] = field(default_factory=dict)
    """By step: the last guided predictions, as a policy that `hands` keeps them."""
    is_denoised: bool = False
    """Whether these are denoised samples, or else in the scheduler's form."""
    skipped: list[int] = field(default_factory=list)
    """The steps since the last of these."""
    scale: float | None = None
    """The settled guidance scale of the run's first step, or the mean of a schedule, of a policy that `hands`."""
    direction: Tensor | None = None
    """Of the step just guided, what one more of the scale adds to its guided prediction; None where it stays."""
    scales: dict[int, float | tuple[float, ...]] = field(default_factory=dict)
    """By step, the scales of `guided` and `skipped`, where they change."""
    slopes: dict[int, Tensor] = field(default_factory=dict)
    """By step, what one more of the scale adds to `guided`, where it changes."""

    @classmethod
    def following(cls, others: Iterable["History"], steps: int, rows: int, denoiser: str) -> "History":
        """A new history that takes over similarities and forecasts from the loop's earlier denoiser (Wan 2.2's first).

        Args:
            others: the loop's. One with more than the loop's `steps` so far belongs to an earlier loop.
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
            arrived: without the last step's where a device still has them; else this waits for it.
        """
        seen = self.seen[:-1] if arrived and self.seen and not self.seen[-1].is_here else self.seen
        row = ("denoised", "noise").index(space)
        return torch.stack([each.similarity[row] for each in seen]) if seen else torch.empty(0, self.rows)

    def keep_difference(self, prediction: Prediction, velocity: float) -> None:
        """Keeps the difference of a step's predictions, of rows that evaluated both."""
        evaluated = prediction.evaluated
        if any(evaluated):
            cond, uncond = prediction.own
            before, was = self.delta, self.velocity or [velocity] * self.rows
            self.delta = cond - uncond if before is None else pick(evaluated, cond - uncond, before)
            self.velocity = [velocity if new else old for new, old in zip(evaluated, was, strict=True)]

    def keep(self, prediction: Prediction, conds: Collection[int] | None, unconds: Collection[int] | None) -> None:
        """Keeps a step's predictions.

        Args:
            conds: the steps whose conditional predictions later estimates read, and no others; None: all.
            unconds: likewise the unconditional ones.
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

    def lapse(self) -> None:
        """Forgets what forecasts are made from, since this step was not guided."""
        for each in (self.guided, self.skipped, self.scales, self.slopes):
            each.clear()


def pick(chosen: Sequence[bool], there: Tensor, otherwise: Tensor) -> Tensor:
    """Row by row: `there` where chosen, else `otherwise`."""
    if all(chosen):
        return there
    if not any(chosen):
        return otherwise
    return torch.stack([(there if was else otherwise)[i] for i, was in enumerate(chosen)])
