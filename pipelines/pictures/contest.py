"""Policies against NFEs: ways to save them, each measured against the same pictures of full guidance, and their plot.

A `Way` is measured into a `Row`. `frontier` plans its own ways; `contestants` are those that any pipeline has.
"""

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from diffusers_guidance.pipelines.pictures.columns import Column
from diffusers_guidance.pipelines.pictures.fidelity import Fidelity
from diffusers_guidance.pipelines.pictures.measures import EQUAL
from diffusers_guidance.pipelines.support.progress import Progress, silent
from diffusers_guidance.policies import Policy

FEWER = "CFG, fewer steps"
COLOURS = ("#6366f1", "#f59e0b", "#10b981", "#ec4899", "#0ea5e9", "#84652c", "#ef4444", "#86198f")
MARKERS = "XosD^*vP<>ph"


@dataclass(frozen=True)
class Row:
    """One measured way; `nfe` is for one sample, averaged if samples differ. Fidelity is to full guidance."""

    series: str
    label: str
    nfe: float
    psnr: float
    ssim: float
    lpips: float | None = None
    seconds: float | None = None


class Way(NamedTuple):
    """A way to save NFEs: its policy or column, which may need a search, and its steps if they differ."""

    series: str
    label: str
    make: Callable[[], Policy | Column]
    steps: int | None = None

    def measured(self, fidelity: Fidelity, progress: Progress = silent) -> Row:
        """Its row; a default pair is called by what it chose for the pipeline."""
        made = fidelity.run(self.make(), self.steps, progress)
        return Row(self.series, made.label if made.is_default else self.label, *fidelity.score(made))


def contestants(steps: int, calibration: str | None = None) -> list[Way]:
    """The ways that any pipeline has to save NFEs at so many steps, fewer steps among them.

    Args:
        calibration: the name of one that fits; without it LinearAG holds, and `search` is not possible.
    """

    def way(series: str, column: str, label: str = "", fewer: int | None = None) -> Way:
        return Way(series, label or column, partial(Column.parse, column), fewer)

    named = f"calibration={calibration!r}"
    searched = [f"search({round(share * 2 * steps)}, {named})" for share in (0.5, 0.625, 0.75)]
    few = sorted({max(2, round(share * steps)) for share in (0.5, 0.65, 0.8)} - {steps})
    return [
        *(way(FEWER, "CFG", f"CFG, {fewer} steps", fewer) for fewer in few),
        *(way("AdaptiveGuidance", f"AdaptiveGuidance(threshold={t})") for t in (0.95, 0.98, 0.99, 0.995)),
        *(way("Interval", f"Interval(0.0, {stop})") for stop in (0.3, 0.5, 0.7)),
        *(way("Hold", f"Hold({period})") for period in (2, 3, 4)),
        *(way("Forecast", f"Forecast({save})") for save in (0.35, 0.5)),
        way("LinearAG", f"LinearAG({named})") if calibration else way("LinearAG, held", "LinearAG"),
        *(way("search", column) for column in searched if calibration),
        way("attach(pipe)", "default"),
    ]


def plane(figure: Any) -> Any:
    """The axes on which policies meet: further up is closer to full guidance, further left is cheaper."""
    axes = figure.add_subplot(xlabel="network evaluations of one picture", ylabel="mean PSNR to full guidance, dB")
    axes.grid(alpha=0.25)
    return axes


def draw(axes: Any, rows: Sequence[Row], rivals: Collection[str] = ()) -> None:
    """A line for each series, in a look of its own; those of `rivals` are thin and dashed."""
    sizes = itertools.chain(range(10, 4, -1), itertools.repeat(4))  # so that points that coincide are all seen
    looks = zip(itertools.cycle(MARKERS), itertools.cycle(COLOURS), sizes, strict=False)
    for name, (marker, colour, size) in zip(dict.fromkeys(row.series for row in rows), looks, strict=False):
        line = sorted((row.nfe, row.psnr) for row in rows if row.series == name and row.psnr < EQUAL)
        if line:
            style = {"lw": 1.2, "ls": "--"} if name in rivals else {"lw": 2.0, "ls": "-"}
            axes.plot(*zip(*line, strict=True), marker=marker, ms=size, color=colour, label=name, **style)
