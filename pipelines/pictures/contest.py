"""Ways to save NFEs, each measured against the same pictures of full guidance, and their plot.

A `Way` is measured into a `Row`. `frontier` plans its own ways; `contestants` are those for any pipeline.
"""

import itertools
import textwrap
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from diffusers_guidance.pipelines.attach.attach import DEFAULT_POLICY
from diffusers_guidance.pipelines.pictures.columns import Column
from diffusers_guidance.pipelines.pictures.fidelity import Fidelity
from diffusers_guidance.pipelines.pictures.measures import EQUAL
from diffusers_guidance.pipelines.pictures.rivals import EasyCache, Rival, Spectrum, TaylorSeer
from diffusers_guidance.pipelines.support.progress import Progress, silent
from diffusers_guidance.policies import Policy

FORECAST, SEARCH, FEWER = "Forecast", "search", "CFG, fewer steps"
DEFAULT = f"attach(pipe): Forecast({DEFAULT_POLICY.save})"
COLOURS = (
    "#6366f1", "#f59e0b", "#10b981", "#ec4899", "#0ea5e9", "#84652c", "#ef4444", "#86198f",
    "#64748b", "#84cc16", "#14532d", "#1e3a8a", "#f9a8d4", "#5eead4", "#facc15", "#fdba74",
)  # fmt: skip
MARKERS = "osXD^*vP<>ph"


@dataclass(frozen=True)
class Row:
    """One measured way; `nfe` is for one sample, the mean if samples differ. Fidelity is to full guidance."""

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
        """Its row."""
        made = fidelity.run(self.make(), self.steps, progress)
        return Row(self.series, self.label, *fidelity.score(made))


def contestants(steps: int, calibration: str | None = None, own: Sequence[str] = ()) -> list[Way]:
    """The ways to save NFEs that any pipeline has at so many steps: the default first, CFG in fewer steps among them.

    Other people's forecasts save as much as the default, and half. Their steps are spaced evenly, as in their papers.

    Args:
        calibration: the name of one that fits; without it LinearAG holds, and `search` is not possible.
        own: further columns, each a series of its own.
    """

    def way(series: str, column: str, label: str = "", fewer: int | None = None) -> Way:
        return Way(series, label or column, partial(Column.parse, column), fewer)

    named = f"calibration={calibration!r}"
    searched = [f"search({round(share * 2 * steps)}, {named})" for share in (0.5, 0.625, 0.75)]
    shares = (DEFAULT_POLICY.save, 0.5)
    rivals: tuple[type[Rival], ...] = (TaylorSeer, EasyCache, Spectrum)
    few = sorted({max(2, round(share * steps)) for share in (0.5, 0.65, 0.75)} - {steps})
    return [
        way(FORECAST, "default", DEFAULT),
        *(way(FEWER, "CFG", f"CFG, {fewer} steps", fewer) for fewer in reversed(few)),
        *(way(FORECAST, f"Forecast({save})") for save in (0.15, 0.35, 0.5)),
        *(way(SEARCH, column) for column in searched if calibration),
        *(way("AdaptiveGuidance", f"AdaptiveGuidance(threshold={t})") for t in (0.95, 0.99, 0.995)),
        *(way("Interval", f"Interval(0.0, {stop})") for stop in (0.5, 0.7)),
        *(way("Hold", f"Hold({period})") for period in (2, 3)),
        *(
            Way(kind.__name__, f"{kind.__name__}, {share:.0%} saved", partial(kind, share, is_even=True))
            for kind in rivals
            for share in shares
        ),
        way("LinearAG", f"LinearAG({named})") if calibration else way("LinearAG, held", "LinearAG"),
        *(way(column, column) for column in own),
    ]


def plane(figure: Any, title: str = "") -> Any:
    """The axes for all policies: further up is closer to full guidance, further left is cheaper."""
    from matplotlib.ticker import MaxNLocator

    if title:
        figure.suptitle(textwrap.fill(title, 110), fontsize="medium")
    axes = figure.add_subplot(xlabel="network evaluations of one picture", ylabel="mean PSNR to full guidance, dB")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    return axes


def draw(
    axes: Any, rows: Sequence[Row], rivals: Collection[str] = (), series: Sequence[str] = (), full: float | None = None
) -> None:
    """A line for each series, in a look of its own, and a legend beside the axes.

    Args:
        rivals: series whose lines are thin and dashed.
        series: all possible series, so that each looks the same in every plot; by default those of `rows`.
        full: the NFEs of full guidance, which get a mark.
    """
    names = series or list(dict.fromkeys(row.series for row in rows))
    looks = zip(itertools.cycle(MARKERS), itertools.cycle(COLOURS), itertools.count(10, -0.5), strict=False)
    for name, (marker, colour, size) in zip(names, looks, strict=False):
        line = sorted((row.nfe, row.psnr) for row in rows if row.series == name and row.psnr < EQUAL)
        if line:
            style = {"lw": 1.1, "ls": "--"} if name in rivals else {"lw": 2.6, "ls": "-"}
            look = {
                "marker": marker,
                "color": colour,
                "ms": max(size, 4),
            }  # so that points at the same place can all be seen
            axes.plot(*zip(*line, strict=True), label=name, **look, **style)
    if full is not None:
        axes.axvline(full, color="#94a3b8", ls=":", lw=1.5, label="full guidance")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
