"""What a run evaluated, step by step and sample by sample, and what that saved."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusers_guidance.checks import plain
from diffusers_guidance.observation import Arrival, Observation
from diffusers_guidance.steps import Action, Plan, Step


@dataclass
class StepReport:
    """One evaluation: what ran, how it was used, and why. Lists have one entry per sample."""

    index: int
    timestep: float | None
    sigma: float | None
    evaluated: list[str]
    """"both", "conditional" or "neither": which predictions the denoiser evaluated."""
    action: list[str]
    """"both", "conditional", "extrapolate" or "neither": how the sample was guided."""
    similarity: list[float | None]
    """Cosine between both denoised predictions; None if they were not both evaluated."""
    similarity_noise: list[float | None]
    """Cosine between both noise predictions."""
    nfe: int
    """Network evaluations made for all samples together."""
    nfe_full: int
    """Network evaluations that the pipeline would have made by itself."""
    guidance_scale: float | list[float] | None = None
    """The settled scale w, where 1 is the conditional prediction alone; a list if samples differ."""
    denoiser: str = ""
    note: str = ""
    off: float | None = None
    """The average error of the forecasts that this step repays, relative to the denoised prediction, over the whole
    batch."""
    repaid: float | None = None
    """The size of the repayment, in the same unit."""
    difference: list[float | None] = field(default_factory=list)
    """For each sample the norm of the difference of both noise predictions; None if they were not both evaluated.

    If the noise is not known, it is that of the predictions as they are.
    """
    branches: dict[str, int] = field(default_factory=dict)
    """The step's evaluations by branch: "cond", "uncond", and further terms by the names of their scales, such as
    "pag"."""

    def round_scale(self, eps: float) -> None:
        """Tells the scale to the digits that it is known to, if it was solved for from numbers rounded by `eps`."""

        def told(w: float) -> float:
            known = -math.log10(eps * max(abs(w), 1.0))
            return round(w, math.floor(known)) if math.isfinite(w) else w

        w = self.guidance_scale
        self.guidance_scale = [*map(told, w)] if isinstance(w, list) else w if w is None else told(w)

    def add_note(self, note: str) -> None:
        """Adds to the step's note."""
        self.note = "; ".join(filter(None, [self.note, note]))

    def doubt(self, why: str) -> None:
        """Takes the scale back, which could not be verified."""
        self.guidance_scale = None
        self.add_note(f"not verified: {why}")


@dataclass
class Report:
    """One run of a pipeline under a rule and a policy. Prints as a table."""

    pipeline: str = ""
    rule: str = ""
    policy: str = ""
    formula: str = ""
    """The pipeline's own guidance as identified; empty before that."""
    steps: list[StepReport] = field(default_factory=list)
    note: str = ""
    basis: str = ""
    """What the run's forecasts rest on, such as "1 run at 20 noise levels, scale 5"; empty for a power law, and without
    forecasts."""

    def conclude(self, note: str) -> None:
        """Says this of the run as a whole, if it is anything."""
        self.note = note or self.note

    @property
    def nfe(self) -> int:
        """Network evaluations, counted per sample: a guided step of a batch of 4 counts 8."""
        return sum(step.nfe for step in self.steps)

    @property
    def nfe_full(self) -> int:
        """Network evaluations that plain classifier-free guidance would have made."""
        return sum(step.nfe_full for step in self.steps)

    @property
    def is_guided(self) -> bool:
        """Whether both predictions of any sample were evaluated at any step: else there was no guidance to be seen."""
        return any(Action.BOTH in step.evaluated for step in self.steps)

    @property
    def nfe_by_branch(self) -> dict[str, int]:
        """Evaluations by branch, without trials: "cond", "uncond", and further terms by the names of their scales."""
        names = dict.fromkeys(name for step in self.steps for name in step.branches)
        return {name: sum(step.branches.get(name, 0) for step in self.steps) for name in names}

    @property
    def nfe_by_sample(self) -> list[float]:
        """Evaluations for each sample. Trials on the whole batch are shared out, so the sum is `nfe`."""
        found = [0.0] * max((len(step.evaluated) for step in self.steps), default=0)
        for step in self.steps:
            rows = len(step.evaluated)
            cost = {"both": step.nfe_full / rows, "conditional": 1.0, "neither": 0.0}
            shared = (step.nfe - sum(cost[what] for what in step.evaluated)) / rows
            for i, what in enumerate(step.evaluated):
                found[i] += cost[what] + shared
        return found

    @property
    def difference(self) -> list[float]:
        """For each sample `||cond - uncond||` of the noise predictions, summed over the steps that evaluated both.

        Among several seeds for one prompt, those with a larger sum tend to be better (CFG-Rejection, arXiv 2505.23343),
        and the first steps already show it: see `generate --best-of`.
        """
        found = [0.0] * max((len(step.difference) for step in self.steps), default=0)
        for step in self.steps:
            for i, value in enumerate(step.difference):
                found[i] += value or 0.0
        return found

    @property
    def saved(self) -> float:
        """Share of the network evaluations saved, 0 to 1 (negative if a check cost one and nothing was saved)."""
        return 1 - self.nfe / self.nfe_full if self.nfe_full else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON types; values that are not finite become None."""
        totals: dict[str, Any] = {"nfe": self.nfe, "nfe_full": self.nfe_full, "saved": self.saved}
        totals |= {"difference": self.difference, "nfe_by_branch": self.nfe_by_branch}
        return vars(self) | totals | {"steps": [_plain(vars(step)) for step in self.steps]}

    @classmethod
    def from_dict(cls, told: dict[str, Any]) -> "Report":
        """The report that `to_dict` told; values that were not finite stay None."""
        own = {each.name: told[each.name] for each in fields(cls)}
        return cls(**own | {"steps": [StepReport(**step) for step in told["steps"]]})

    def to_json(self, **options: Any) -> str:
        """`to_dict` as JSON text; options go to `json.dumps`."""
        return json.dumps(self.to_dict(), allow_nan=False, **options)

    def summary(self) -> str:
        """One line: "75 of 100 NFEs, 25 % saved"."""
        return f"{self.nfe} of {self.nfe_full} NFEs, {self.saved:.0%} saved"

    def __str__(self) -> str:
        lines = [f"{self.pipeline}: {self.rule} with {self.policy}", self.summary()]
        lines += [self.note] if self.note else []
        if len(by_branch := self.nfe_by_branch) > 2:
            lines.append(", ".join(f"{nfe} {name}" for name, nfe in by_branch.items()))
        changes = len({str(step.guidance_scale) for step in self.steps} - {"None"}) > 1
        scale = "  scale   " if changes else ""
        lines.append(f"step  timestep     sigma{scale}  NFEs  evaluated      similarity         why")
        for step in self.steps:
            known = [value for value in step.similarity if value is not None]
            spread = f"{min(known):.4f}..{max(known):.4f}" if len(known) > 1 else "".join(f"{v:.4f}" for v in known)
            ran = "/".join(f"{step.evaluated.count(kind)} {kind}" for kind in dict.fromkeys(step.evaluated))
            lines.append(
                f"{step.index:4d}  {_short(step.timestep):>8}  {_short(step.sigma):>8}"
                f"{f'  {_spread(step.guidance_scale):<8}' if changes else ''}  {step.nfe:4d}"
                f"  {ran:<13}  {spread:<17}  {step.note}".rstrip()
            )
        return "\n".join(lines)

    def plot(self, path: str | Path | None = None) -> Any:
        """Plots similarity over steps, skipped steps marked; returns the matplotlib figure, and saves it to `path`."""
        try:
            from matplotlib.figure import Figure
            from matplotlib.ticker import MaxNLocator
        except ImportError as error:
            raise ImportError("Report.plot needs matplotlib: pip install 'diffusers-guidance[cli]'") from error

        figure = Figure(figsize=(7, 3.6), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel="similarity of both predictions", title=self.summary())
        samples = max((len(step.similarity) for step in self.steps), default=0)
        for i in range(samples):
            label = "similarity" if samples == 1 else f"sample {i}"
            rows = [step for step in self.steps if i < len(step.similarity)]
            points = [(step.index, step.similarity[i]) for step in rows if step.similarity[i] is not None]
            (line,) = axes.plot(*zip(*points, strict=True), ".-", label=label) if points else axes.plot([], [])
            skipped = [step.index for step in rows if step.evaluated[i] != "both"]
            # One row of marks per sample along the foot of the plot, in the sample's colour.
            axes.plot(
                skipped, [0.03 + 0.04 * i] * len(skipped), "x", color=line.get_color(), ms=5,
                transform=axes.get_xaxis_transform(), label="skipped" if i == samples - 1 else None,
            )  # fmt: skip
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if samples:
            axes.legend(loc="best", fontsize="small")
        axes.grid(alpha=0.3)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


class Recording:
    """A report that is still being made: its steps, counted from `first`, and numbers that are still on the device."""

    def __init__(self, report: Report, first: int = 0):
        self.report, self.first = report, first
        self._unread: list[Callable[[], None]] = []
        self._formulas: dict[str, None] = {}

    def add(
        self,
        step: Step,
        plan: Plan,
        evaluated: Sequence[bool],
        nfe: int,
        nfe_full: int,
        seen: Observation | None = None,
        note: str = "",
    ) -> None:
        """Adds a step.

        Args:
            plan: how each sample was used.
            evaluated: by sample, whether both of its predictions were evaluated.
            seen: the step's measures.
        """
        alone = [Action.NEITHER if each.action == Action.NEITHER else Action.CONDITIONAL for each in plan]
        reasons = dict.fromkeys(filter(None, [note, *(each.why for each in plan)]))
        self.report.steps.append(
            StepReport(
                index=self.first + len(self.report.steps),
                timestep=step.timestep,
                sigma=step.sigma,
                evaluated=[str(Action.BOTH if was else a) for was, a in zip(evaluated, alone, strict=True)],
                action=[str(each.action) for each in plan],
                similarity=[None] * len(plan),
                similarity_noise=[None] * len(plan),
                nfe=nfe,
                nfe_full=nfe_full,
                guidance_scale=list(step.w) if isinstance(step.w, tuple) else step.w,
                denoiser=step.denoiser,
                note="; ".join(reasons),
                difference=[None] * len(plan),
            )
        )
        added = self.report.steps[-1]

        if seen is not None:
            arriving = seen  # not None

            def tell() -> None:
                added.similarity, added.similarity_noise = map(to_list, arriving.similarity.tolist())
                added.difference = to_list(arriving.difference.tolist())

            self.read_later(tell)

    def add_formula(self, formula: str) -> None:
        """Adds what was identified; the same again is told once."""
        self._formulas[formula] = None
        self.report.formula = "; ".join(self._formulas)

    def read_later(self, tell: Callable[[], None]) -> None:
        """Calls `tell` at the next `read`; it reads numbers that are on their way to the host."""
        self._unread.append(tell)

    def read(self) -> None:
        """Reads all numbers sent since the last time; waits for those that have not arrived yet."""
        while self._unread:
            self._unread.pop(0)()

    def add_to_last(self, note: str, sizes: Tensor | None = None, basis: str = "") -> None:
        """Adds a policy's note on the last step's forecast, its error, and what it rests on; see `Handed`."""
        step = self.report.steps[-1]
        step.add_note(note)
        self.report.basis = basis or self.report.basis

        if sizes is None:
            return
        sent = Arrival(sizes)

        def tell() -> None:
            *norms, whole = sent.read()
            step.off, step.repaid = to_list((torch.stack(norms) / whole).tolist())
            off, repaid = (math.nan if each is None else each for each in (step.off, step.repaid))
            step.note += f": off by {off:.2g}, repaid {repaid:.2g}, of the denoised prediction"

        self.read_later(tell)

    def finish(self) -> Report:
        """The report, once all its numbers have arrived."""
        self.read()
        return self.report


def to_list(values: Sequence[float]) -> list[float | None]:
    """The same with None for NaN."""
    return [None if math.isnan(value) else value for value in values]


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    numbers = {name: plain(value) for name, value in fields.items()}
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in numbers.items()
    }


def _spread(scale: float | list[float] | None) -> str:
    if not isinstance(scale, list):
        return _short(scale)
    return "..".join(_short(end) for end in dict.fromkeys([min(scale), max(scale)]))


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
