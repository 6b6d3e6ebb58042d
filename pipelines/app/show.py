"""What the app shows: numbers, plots and grids as HTML, and the same grids and plots as PNG."""

import base64
import functools
import inspect
import io
import re
import textwrap
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from diffusers_guidance.pipelines.app.settings import Grid
from diffusers_guidance.pipelines.app.work import News, Outcome, estimates
from diffusers_guidance.pipelines.pictures.compare import Comparison
from diffusers_guidance.pipelines.pictures.contest import COLOURS, Row, draw, plane
from diffusers_guidance.pipelines.pictures.fonts import lettering
from diffusers_guidance.pipelines.pictures.make import Result
from diffusers_guidance.pipelines.pictures.measures import EQUAL
from diffusers_guidance.pipelines.pictures.texts import counted
from diffusers_guidance.pipelines.support.templates import template
from diffusers_guidance.policies import LinearAG
from diffusers_guidance.report import Report

INK = "#123457"
"""Represents the colour of the page's text; no other colour may equal it."""


@functools.cache
def _parts() -> Any:
    """The macros of `parts.html`, which escape their arguments."""
    filters = {"counted": counted, "data_uri": data_uri, "decibels": _decibels, "breakable": _breakable}
    return template(__package__, "parts.html", **filters).module


def head(results: Sequence[Result]) -> str:
    """The page's opening text, beside small pictures, each over its scale and guidance."""
    return str(_parts().head(results))


def progress_bar(news: News) -> str:
    """A job's progress."""
    return str(_parts().progress_bar(news))


def is_progress(html: str) -> bool:
    """Whether it is a `progress_bar`, so that something is running."""
    return "<progress" in (html or "")


def note(text: str) -> str:
    """One quiet line."""
    return str(_parts().note(text))


def numbers(outcome: Outcome) -> str:
    """A picture's cost, beside that of plain CFG."""
    return str(_parts().numbers(outcome.guided, outcome.plain))


def about(part: type) -> str:
    """What a rule or policy is: the first sentence of its documentation."""
    sentence = re.split(r"(?<=\.)\s", inspect.getdoc(part) or "")[0]
    if part is LinearAG:
        sentence += (
            " It is fitted where the bundled model has a calibration for the scheduler, steps and scale (DDIM or "
            "DPM++ 2M, 20 or 50 steps, scale 5); otherwise it holds the last difference. The result says which."
        )
    return str(_parts().about(re.split("`([^`]+)`", sentence)))


def empty(words: str) -> str:
    """A placeholder."""
    return str(_parts().place(words))


# Plots


def similarity_plot(report: Report) -> str:
    """How the two predictions come to agree over the steps; steps that skipped one are shaded."""
    if not any(step.nfe_full > len(step.evaluated) for step in report.steps):
        return empty("No guidance at scale 1: every step makes one prediction, so there are no two to compare.")
    figure = report.plot()
    figure.set_size_inches(6.6, 2.1)
    axes = figure.axes[0]
    axes.set(title="", ylabel="similarity", xlim=(-0.5, max(len(report.steps), 1) - 0.5))
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    if (legend := axes.get_legend()) is not None and len(axes.lines) == 2:
        legend.remove()
    for line in axes.lines if len(axes.lines) == 2 else ():
        line.set_color(COLOURS[0])
    for step in report.steps:
        share = sum(each != "both" for each in step.evaluated) / len(step.evaluated)
        if share:
            axes.axvspan(step.index - 0.5, step.index + 0.5, color=COLOURS[0], alpha=0.13 * share, lw=0)
    skipped = sum(any(each != "both" for each in step.evaluated) for step in report.steps)
    summary = (
        f"Similarity of both predictions over {counted(len(report.steps), 'step')}; {skipped} of them skipped some."
    )
    return _plot(
        _svg(figure, summary),
        "How far the predictions with and without the prompt agree. Shaded: the steps that skipped evaluations, "
        f"{skipped} of {len(report.steps)}.",
    )


def frontier_plot(rows: Sequence[Row]) -> Figure:
    """Fidelity to full CFG against its cost; further up and to the left is better."""
    figure = Figure(figsize=(7.0, 3.9), layout="constrained")
    axes = plane(figure)
    draw(axes, rows[1:])
    if rows:
        axes.axvline(rows[0].nfe, color="#94a3b8", ls="--", lw=1, label="full CFG")
        axes.legend(fontsize="small", frameon=False)
    return figure


def frontier_html(rows: Sequence[Row]) -> str:
    """The plot and its table."""
    svg = _svg(frontier_plot(rows), "Fidelity to full CFG against network evaluations, by policy.")
    return str(_parts().frontier(svg, rows))


def _decibels(psnr: float) -> str:
    return f"{psnr:.1f} dB" if psnr < EQUAL else "the same"


def _plot(svg: str, caption: str) -> str:
    return str(_parts().plot(svg, caption))


def _svg(figure: Figure, label: str) -> str:
    """A figure as inline SVG in the page's font and colour, light or dark."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(INK)
        axes.tick_params(colors=INK)
        if (legend := axes.get_legend()) is not None:
            legend.set_frame_on(False)
    for text in figure.findobj(Text):
        text.set_color(INK)
    out = io.StringIO()
    with _svg_text():
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head, rest = svg.split(">", 1)
    head = re.sub(r' (?:width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{escape(label)}">{rest}'


def _svg_text() -> Any:
    from matplotlib import rc_context

    return rc_context({"svg.fonttype": "none"})


# The grid of a comparison


def _layout(grid: Grid, results: Sequence[Result]) -> tuple[list[str], list[str], dict[tuple[int, int], Result]]:
    """Row labels, column labels and the results by (row, column); several scales run across, else rules."""
    if len(grid.scales) > 1:
        columns = [f"scale {scale:g}" for scale in grid.scales]
        several = len(grid.policies) > 1
        rows = [f"{rule} + {policy}" if several else rule for policy in grid.policies for rule in grid.rules]
    else:
        columns, rows = list(grid.rules), list(grid.policies)
    return rows, columns, {divmod(i, len(columns)): result for i, result in enumerate(results)}


def _caption(result: Result) -> tuple[str, str]:
    saved = f", {result.saved:.0%} saved" if result.saved else ""
    return f"{result.nfe} NFEs{saved}{estimates(result.policy)}", f"saturation {result.saturation:.2f}"


def grid_html(grid: Grid, results: Sequence[Result]) -> str:
    """The pictures made so far, in their places."""
    rows, columns, placed = _layout(grid, results)
    cells = {place: (result, *_caption(result)) for place, result in placed.items()}
    return str(_parts().grid(grid.prompt, rows, columns, cells))


def _breakable(name: str) -> Markup:
    """A class name that may break where its words meet."""
    return Markup("<wbr>").join(re.split(r"(?<=[a-z])(?=[A-Z])", name))


def grid_png(grid: Grid, comparison: Comparison) -> Image.Image:
    """The whole grid as one picture."""
    with lettering(grid.prompt):
        return to_picture(_grid_plot(grid, comparison))


def _grid_plot(grid: Grid, comparison: Comparison) -> Figure:
    rows, columns, cells = _layout(grid, comparison.results)
    figure = Figure(figsize=(1.1 + 2.1 * len(columns), 0.7 + 2.6 * len(rows)), layout="constrained")
    shortened = textwrap.shorten(grid.prompt, 40 * len(columns), placeholder=" …")
    scale = f", scale {grid.scales[0]:g}" if len(grid.scales) == 1 else ""
    title = f"{shortened}\nseed {grid.seed}, {counted(grid.steps, 'step')} of {comparison.scheduler}{scale}"
    figure.suptitle(title, fontsize="small", parse_math=False)  # a prompt may hold dollars
    places = figure.subplots(len(rows), len(columns), squeeze=False)
    for (i, j), result in cells.items():
        axes = places[i][j]
        axes.imshow(result.pictures[0].convert("RGB"), interpolation="lanczos")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color("#dddddd")
        axes.set_xlabel("\n".join(_caption(result)), fontsize="small")
        if not i:
            axes.set_title(columns[j], fontsize="medium")
        if not j:
            axes.set_ylabel(rows[i].replace(" + ", "\n+ "), fontsize="medium")
    return figure


def to_picture(figure: Figure) -> Image.Image:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130)
    return Image.open(out).convert("RGB")


def data_uri(picture: Image.Image, largest: int = 384) -> str:
    """A small version of a picture, as a data address."""
    small = picture.convert("RGB")
    small.thumbnail((largest, largest))
    out = io.BytesIO()
    small.save(out, format="PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
