"""What the app shows: numbers, plots and grids as HTML, and the same grids and plots as PNG."""

import base64
import functools
import hashlib
import inspect
import io
import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from gradio.utils import get_upload_folder
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from diffusers_guidance.files import write
from diffusers_guidance.pipelines.app.settings import SHOWN, Grid
from diffusers_guidance.pipelines.app.suited import suited
from diffusers_guidance.pipelines.app.work import OURS, Measured, News, Outcome, estimates, file_name, recommended
from diffusers_guidance.pipelines.pictures.columns import bundled_calibrations
from diffusers_guidance.pipelines.pictures.compare import Comparison
from diffusers_guidance.pipelines.pictures.contest import draw, plane
from diffusers_guidance.pipelines.pictures.fonts import lettering
from diffusers_guidance.pipelines.pictures.make import Result, png_of
from diffusers_guidance.pipelines.pictures.measures import EQUAL
from diffusers_guidance.pipelines.pictures.texts import counted
from diffusers_guidance.pipelines.support.templates import template
from diffusers_guidance.policies import LinearAG
from diffusers_guidance.report import StepReport
from diffusers_guidance.steps import Action

INK = "#123457"
"""Stands for the colour of the page's text. No other colour may equal it."""


@functools.cache
def _parts() -> Any:
    """The macros of `parts.html`. They escape their arguments."""
    filters = {"counted": counted, "data_uri": data_uri, "decibels": _decibels, "breakable": _breakable}
    return template(__package__, "parts.html", **filters).module


def head(opening: Sequence[Outcome] = (), turns: int = 1) -> str:
    """The top of the page: both uses, each beside plain CFG with the same prompt and seed.

    Args:
        opening: an outcome of each of the presets `SHOWN`, with the model that is chosen; empty if there is none.
        turns: the first outcome is the one with the median ratio of so many.
    """
    alone = suited(opening[0].settings.model).alone if opening else ""
    return str(_parts().head(opening, SHOWN, turns, alone))


def progress_bar(news: News) -> str:
    """The progress of a job, as a bar."""
    return str(_parts().progress_bar(news))


def is_progress(html: str) -> bool:
    """Whether this is a `progress_bar`: then a job is running."""
    return "<progress" in (html or "")


def note(text: str, address: str = "", warning: str = "", lesson: str = "") -> str:
    """One line of status.

    Args:
        address: a query that carries the settings.
        warning: the end of the prompt that the model did not read.
        lesson: what Forecast learned.
    """
    return str(_parts().note(text, address, warning, lesson))


def picture_file() -> str:
    """The control that reads the settings from a picture that was made here. The file stays in the browser."""
    return str(_parts().picture_file())


def numbers(outcome: Outcome) -> str:
    """The cost of a picture and its likeness to plain CFG's."""
    return str(_parts().numbers(outcome))


def stage(pairs: Sequence[tuple[Image.Image | None, Image.Image]], left: str, right: str, words: str) -> str:
    """The pictures, each over its reference, with a slider between the two and links to the files.

    Args:
        pairs: a reference or None, and a picture.
        left, right: names of the reference and of the picture.
        words: what the pictures show.
    """
    shown = [tuple(None if each is None else in_a_file(each) for each in pair) for pair in pairs]
    return str(_parts().stage(shown, left, right, words))


class Shown(NamedTuple):
    """A picture in the app's outputs."""

    path: str
    name: str
    width: int
    height: int

    @property
    def url(self) -> str:
        """The address of the file, relative to the page."""
        return f"gradio_api/file={quote(self.path)}"


def in_a_file(picture: Image.Image) -> Shown:
    """Writes a picture into a file. If the file still exists, it is not written again."""
    shown: Shown | None = picture.info.get("shown")
    if shown is None or not Path(shown.path).exists():
        name = f"{file_name(picture)}.png"
        path = keep(png_of(picture), name)
        shown = picture.info["shown"] = Shown(path, name, *picture.size)
    return shown


def keep(content: bytes, name: str) -> str:
    """Writes a file among the app's outputs, whole or not at all; returns its path."""
    path = Path(get_upload_folder()).resolve() / hashlib.sha256(content).hexdigest() / name
    write(path, content)
    return str(path)


def forming(picture: Image.Image, words: str) -> str:
    """A picture while it is denoised."""
    return str(_parts().forming(picture, words))


def about(part: type) -> str:
    """What a rule or policy is: the first sentence of its docstring."""
    sentence = re.split(r"(?<=\.)\s", inspect.getdoc(part) or "")[0]
    if part is LinearAG:
        sentence += (
            f" It is fitted to a calibration if there is one for model, scheduler, steps and scale "
            f"({', '.join(bundled_calibrations())}). Otherwise it holds the last difference. The result says which."
        )
    return str(_parts().about(re.split("`([^`]+)`", sentence)))


def empty(words: str) -> str:
    """A placeholder."""
    return str(_parts().place(words))


# Plots


class Mark(NamedTuple):
    """What one step did for one picture."""

    kind: str
    words: str


KINDS = {
    "both": "both predictions evaluated",
    "repaid": "both evaluated; they repay the error of the skipped steps before",
    "held": "the prediction with the prompt evaluated, the other estimated",
    "stopped": "guidance stopped: only the prediction with the prompt evaluated",
    "skipped": "skipped: nothing evaluated",
    "alone": "without guidance: one prediction",
}


def _mark(step: StepReport, row: int) -> Mark:
    evaluated, action = step.evaluated[row], step.action[row]
    if evaluated == Action.NEITHER:
        kind = "skipped"
    elif step.nfe_full <= len(step.evaluated):
        kind = "alone"
    elif evaluated == Action.BOTH:
        kind = "repaid" if step.repaid is not None else "both"
    else:
        kind = "held" if action == Action.EXTRAPOLATE else "stopped"
    return Mark(kind, f"step {step.index}: {KINDS[kind]}")


def strip(outcome: Outcome) -> str:
    """A run as a strip: what each step evaluated. Curves over it show similarity and scale."""
    steps = outcome.guided.reports[0].steps
    rows = max((len(step.evaluated) for step in steps), default=0)
    marks = [[_mark(step, row) for step in steps] for row in range(rows)]
    similarity = [(n, step.similarity[0]) for n, step in enumerate(steps) if step.similarity[0] is not None]
    scales = [(step, found[0]) for step, found in outcome.strengths.items() if math.isfinite(found[0])]
    kinds = [kind for kind in KINDS if any(mark.kind == kind for row in marks for mark in row)]
    counts = {kind: sum(mark.kind == kind for mark in marks[0]) for kind in kinds}
    lines = [_line("similarity", similarity, "", "how far the predictions with and without the prompt agree")]
    lines += [_line("scale", scales, "", "effective guidance scale: at this scale CFG would push as far")]
    return str(_parts().strip(marks, {kind: KINDS[kind] for kind in kinds}, counts, [each for each in lines if each]))


class Line(NamedTuple):
    """A curve over the steps. Its box is 100 high, and as wide as the number of steps."""

    name: str
    points: str
    low: float
    high: float
    words: str


def _line(name: str, points: Sequence[tuple[int, float]], unit: str, words: str) -> Line | None:
    if len(points) < 2:
        return None
    low, high = min(y for _, y in points), max(y for _, y in points)
    margin = 0.08 * ((high - low) or abs(high) or 1.0)
    bottom, top = low - margin, high + margin
    place = [(x + 0.5, 100 * (top - y) / (top - bottom)) for x, y in points]
    return Line(name, " ".join(f"{x:.2f},{y:.2f}" for x, y in place), low, high, words)


def frontier_plot(rows: Sequence[Measured]) -> Figure:
    """Fidelity to full CFG against NFEs. Up and to the left is better. This package's policies are drawn heavier."""
    figure = Figure(figsize=(7.0, 4.1), layout="constrained")
    axes = plane(figure)
    rivals = {row.series for row in rows} - {*OURS}
    draw(axes, rows[1:], rivals, full=rows[0].nfe if rows else None)
    if rows:
        measured = [row.psnr for row in rows[1:] if row.psnr < EQUAL]
        # The axes have their final size from the first point on.
        axes.set(
            xlim=(0.4 * rows[0].nfe, 1.03 * rows[0].nfe), ylim=(min([15, *measured]) - 1, max([55, *measured]) + 2)
        )
    if (found := recommended(rows)) is not None:
        default = found[0]
        axes.plot(default.nfe, default.psnr, "o", ms=17, mfc="none", mec=INK, mew=1.4, zorder=4)
        axes.annotate("recommended", (default.nfe, default.psnr), (-12, 10), textcoords="offset points", ha="right")
    return figure


def frontier_html(rows: Sequence[Measured]) -> str:
    """The plot and its table."""
    svg = _svg(frontier_plot(rows), "Fidelity to full CFG against network evaluations, by policy.")
    return str(_parts().frontier(svg, rows, recommended(rows), OURS))


def _decibels(psnr: float) -> str:
    return f"{psnr:.1f} dB" if psnr < EQUAL else "the same"


def _plot(svg: str, caption: str) -> str:
    return str(_parts().plot(svg, caption))


def _svg(figure: Figure, label: str) -> str:
    """A figure as inline SVG, in the page's font and its light or dark colour."""
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


class Laid(NamedTuple):
    """A grid with its labels."""

    rows: list[str]
    across: int
    """The number of pictures in a row."""
    cells: dict[tuple[int, int], str]
    """(row, column) and name of each picture, in the order in which they are made."""


def _layout(grid: Grid) -> Laid:
    """The first picture of each row is plain CFG, if that is in the grid. Columns that the user wrote come below."""
    pairs = [_pair(rule, policy) for policy in grid.policies for rule in grid.rules]
    wide = len(grid.policies) > len(grid.rules)
    if len(grid.scales) > 1 and len(pairs) > 1:
        rows, across = [f"scale {scale:g}" for scale in grid.scales], len(pairs)
        cells = {(i, j): pair for j, pair in enumerate(pairs) for i in range(len(rows))}
    elif len(grid.scales) > 1:
        rows, across = pairs, len(grid.scales)
        cells = {(0, j): f"scale {scale:g}" for j, scale in enumerate(grid.scales) if pairs}
    else:
        rows = [*(grid.rules if wide else grid.policies)] if pairs and grid.scales else []
        across = len(grid.policies if wide else grid.rules)
        places = [divmod(n, len(grid.rules)) for n in range(len(pairs))] if rows else []
        cells = {((j, i) if wide else (i, j)): pair for (i, j), pair in zip(places, pairs, strict=False)}
    across = across if cells else min(4, max(1, len(grid.written)))
    more = {(len(rows) + i // across, i % across): each.name for i, each in enumerate(grid.written)}
    return Laid(rows + ["yours"] * (-(-len(more) // across)), across, cells | more)


def _pair(rule: str, policy: str) -> str:
    """The name of a rule under a policy. It skips what plain CFG has too."""
    own = [name for name, plain in ((rule, "CFG"), (policy, "EveryStep")) if name != plain]
    return " + ".join(own) or "plain CFG"


def _caption(result: Result, comparison: Comparison) -> list[str]:
    """Lines below a picture. A rule of its own means to differ from CFG, so its likeness to that is not told."""
    reference = comparison.reference(result)
    share = result.saved if reference is None else 1 - result.nfe / reference.nfe
    saved = f" (−{share:.0%})" if share > 0 else ""
    near = comparison.psnr(result) if result.rule.is_plain else None
    likeness = [] if near is None else ["the same as CFG" if near >= EQUAL else f"{near:.1f} dB to CFG"]
    return [f"{result.nfe} NFEs{saved}{estimates(result.policy)}", *likeness, f"saturation {result.saturation:.2f}"]


def grid_html(grid: Grid, comparison: Comparison | None = None) -> str:
    """The grid with the pictures so far."""
    laid = _layout(grid)
    done: dict[tuple[int, int], Result] = {}
    lines = {place: [""] * 3 for place in laid.cells}  # as many for all, so that the grid keeps its height as it fills
    if comparison is not None:
        done = dict(zip(laid.cells, comparison.results, strict=False))
        for place, result in done.items():
            found = _caption(result, comparison)
            lines[place][: len(found)] = found
    return str(_parts().grid(grid.prompt, laid, done, lines))


def _breakable(name: str) -> Markup:
    """A name that can break between its words, and before its arguments."""
    return Markup("<wbr>").join(re.split(r"(?<=[a-z])(?=[A-Z])|(?=\()", name))


def grid_png(grid: Grid, comparison: Comparison) -> Image.Image:
    """The whole grid as one picture."""
    with lettering(grid.prompt):
        return to_picture(_grid_plot(grid, comparison))


def _grid_plot(grid: Grid, comparison: Comparison) -> Figure:
    laid = _layout(grid)
    figure = Figure(figsize=(1.1 + 2.1 * laid.across, 0.7 + 2.8 * len(laid.rows)), layout="constrained")
    shortened = textwrap.shorten(grid.prompt, 40 * laid.across, placeholder=" …")
    scale = f", scale {grid.scales[0]:g}" if len(grid.scales) == 1 else ""
    title = f"{shortened}\nseed {grid.seed}, {counted(grid.steps, 'step')} of {comparison.scheduler}{scale}"
    figure.suptitle(title, fontsize="small", parse_math=False)  # a prompt may have dollar signs
    places = figure.subplots(len(laid.rows), laid.across, squeeze=False)
    for axes in places.flat:
        axes.set_axis_off()
    for ((i, j), name), result in zip(laid.cells.items(), comparison.results, strict=True):
        axes = places[i][j]
        axes.set_axis_on()
        axes.imshow(result.pictures[0].convert("RGB"), interpolation="lanczos")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color("#dddddd")
        under = [textwrap.shorten(name, 34, placeholder=" …"), *_caption(result, comparison)]
        axes.set_xlabel("\n".join(under), fontsize="small", parse_math=False)
        if not j and len(laid.rows) > 1:
            axes.set_ylabel(laid.rows[i], fontsize="medium")
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
