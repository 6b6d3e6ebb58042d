"""What the app shows: numbers, plots and grids as HTML, and the same grids and plots as PNG."""

import base64
import inspect
import io
import itertools
import re
import textwrap
from collections.abc import Sequence
from html import escape
from typing import Any

from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from diffusers_guidance.pipelines.app.settings import Grid
from diffusers_guidance.pipelines.app.work import Frontier, News, Outcome, estimates
from diffusers_guidance.pipelines.pictures.compare import Comparison
from diffusers_guidance.pipelines.pictures.fonts import lettering
from diffusers_guidance.pipelines.pictures.make import Result
from diffusers_guidance.pipelines.pictures.measures import EQUAL
from diffusers_guidance.pipelines.pictures.texts import counted
from diffusers_guidance.policies import LinearAG
from diffusers_guidance.report import Report

INK = "#123457"
"""Stands for the colour of the page's text; no other colour may be the same."""
COLOURS = ("#6366f1", "#f59e0b", "#10b981", "#ec4899", "#0ea5e9", "#84652c", "#ef4444", "#86198f")


# Numbers


def progress_bar(news: News) -> str:
    """Where a piece of work is."""
    what, so_far = escape(news.what), f"{news.done} of {counted(news.total, 'step')}"
    return (
        f'<div class="dg-progress"><progress value="{news.done}" max="{max(news.total, 1)}" '
        f'aria-label="{what}"></progress><span>{what} · {so_far}</span></div>'
    )


def is_progress(html: str) -> bool:
    """Whether that is a `progress_bar`, so that something is running."""
    return "<progress" in (html or "")


def note(text: str) -> str:
    """One quiet line."""
    return f'<div class="dg-progress" role="status"><span>{escape(text)}</span></div>'


def numbers(outcome: Outcome) -> str:
    """What a picture cost, beside what plain CFG costs."""
    guided, plain = outcome.guided, outcome.plain
    cards = [
        ('<abbr title="network evaluations">NFEs</abbr>', f"{guided.nfe}", f"plain CFG: {guided.nfe_full}"),
        ("Saved", f"{guided.saved:.0%}", "of evaluations"),
        ("Seconds", f"{guided.seconds:.2f}", f"plain CFG: {plain.seconds:.2f}" if plain else ""),
        ("Saturation", f"{guided.saturation:.2f}", f"plain CFG: {plain.saturation:.2f}" if plain else "0 is grey"),
    ]
    items = "".join(
        f"<div><dt>{name}</dt><dd>{value}<small>{beside or '&nbsp;'}</small></dd></div>"
        for name, value, beside in cards
    )
    return f'<dl class="dg-numbers" aria-live="polite">{items}</dl>'


def about(part: type) -> str:
    """What a rule or policy is: the first sentence of its documentation."""
    sentence = re.split(r"(?<=\.)\s", inspect.getdoc(part) or "")[0]
    words = re.sub("`([^`]+)`", r"<code>\1</code>", escape(sentence))
    if part is LinearAG:
        words += (
            " It is fitted where the bundled model has a calibration for the scheduler, steps and scale (DDIM or "
            "DPM++ 2M, 20 or 50 steps, scale 5); otherwise the last difference is held. The result says which."
        )
    return f'<p class="dg-about">{words}</p>'


def empty(words: str) -> str:
    """A place where something will be."""
    return f'<div class="dg-place">{escape(words)}</div>'


# Plots


def similarity_plot(report: Report) -> str:
    """How the two predictions come to agree over the steps; shaded where one of them was not evaluated."""
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
        share = step.evaluated.count("conditional") / len(step.evaluated)
        if share:
            axes.axvspan(step.index - 0.5, step.index + 0.5, color=COLOURS[0], alpha=0.13 * share, lw=0)
    skipped = sum("conditional" in step.evaluated for step in report.steps)
    summary = (
        f"Similarity of both predictions over {counted(len(report.steps), 'step')}; {skipped} of them skipped one."
    )
    return _figure(
        _svg(figure, summary),
        "How far the predictions with and without the prompt agree. Shaded: the steps that skipped an evaluation, "
        f"{skipped} of {len(report.steps)}.",
    )


def frontier_plot(frontier: Frontier) -> Figure:
    """Fidelity to full CFG against its cost; further up and to the left is better."""
    figure = Figure(figsize=(7.0, 3.9), layout="constrained")
    axes = figure.add_subplot(xlabel="network evaluations per picture", ylabel="PSNR to full CFG, dB")
    families = list(dict.fromkeys(point.family for point in frontier.points[1:]))
    # Every family looks its own way, whatever their number; points that coincide are all seen.
    looks = zip(families, itertools.cycle(COLOURS), itertools.cycle("XosD^*vP"), itertools.count(10, -1), strict=False)
    for family, colour, marker, size in looks:
        known = sorted((p.nfe, p.psnr) for p in frontier.points if p.family == family and _is_known(p.psnr))
        if known:
            axes.plot(*zip(*known, strict=True), marker=marker, ms=size, color=colour, label=family, lw=1.4)
    if frontier.points:
        axes.axvline(frontier.points[0].nfe, color="#94a3b8", ls="--", lw=1, label="full CFG")
        axes.legend(fontsize="small", frameon=False)
    axes.grid(alpha=0.25)
    return figure


def frontier_html(frontier: Frontier) -> str:
    """The plot and its table."""
    full = frontier.points[0]
    rows = "".join(
        f"<tr><th scope='row'>{escape(p.name)}</th><td>{p.nfe:.4g}</td><td>{1 - p.nfe / full.nfe:.0%}</td>"
        f"<td>{_decibels(p.psnr, p is full)}</td><td>{p.seconds:.2f}</td><td>{p.saturation:.3f}</td></tr>"
        for p in frontier.points
    )
    heads = "".join(
        f"<th scope='col'>{h}</th>" for h in ("", "NFEs", "saved", "mean PSNR", "s / picture", "saturation")
    )
    plot = _svg(frontier_plot(frontier), "Fidelity to full CFG against network evaluations, by policy.")
    table = _table('class="dg-table"', heads, rows)
    return _figure(plot, "Up and to the left is better: nearer to full CFG for fewer network evaluations.") + table


def _table(attributes: str, head: str, body: str) -> str:
    """A table that scrolls by itself where it is too wide; by keyboard too."""
    return (
        f'<div class="dg-scroll" tabindex="0" role="region" aria-label="Results">'
        f"<table {attributes}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _is_known(psnr: float | None) -> bool:
    return psnr is not None and psnr < EQUAL


def _decibels(psnr: float | None, is_reference: bool) -> str:
    if is_reference:
        return "reference"
    return f"{psnr:.1f} dB" if _is_known(psnr) else "the same"


def _figure(svg: str, caption: str) -> str:
    return f'<figure class="dg-plot">{svg}<figcaption>{escape(caption)}</figcaption></figure>'


def _svg(figure: Figure, label: str) -> str:
    """A figure as inline SVG in the page's own font and colour, light or dark."""
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


def strip(results: Sequence[Result]) -> str:
    """Small pictures in a row, each over its scale and how it was guided."""
    figures = ""
    for result in results:
        scale = f"scale {result.guidance_scale:g}"
        words = "no guidance" if result.guidance_scale == 1 else "plain CFG" if result.is_plain else result.name
        figures += f'<figure><img src="{data_uri(result.pictures[0])}" alt="{escape(f"{scale}, {words}")}">'
        figures += f"<figcaption><b>{scale}</b><br>{escape(words)}</figcaption></figure>"
    return f'<div class="dg-strip">{figures}</div>'


# The grid of a comparison


def _layout(grid: Grid, results: Sequence[Result]) -> tuple[list[str], list[str], dict[tuple[int, int], Result]]:
    """Row labels, column labels and the results by (row, column): rules or, where there are several, scales across."""
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
    """The pictures there are so far, in their places."""
    rows, columns, cells = _layout(grid, results)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = ""
    for i, row in enumerate(rows):
        body += f'<tr><th scope="row">{_breakable(row)}</th>'
        for j, column in enumerate(columns):
            body += f"<td>{_cell(cells.get((i, j)), f'{row}, {column}: {grid.prompt}')}</td>"
        body += "</tr>"
    return _table(f'class="dg-grid" style="--columns: {len(columns)}"', f"<td></td>{head}", body)


def _breakable(name: str) -> str:
    """A class name that may break where its words meet."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "<wbr>", escape(name))


def _cell(result: Result | None, description: str) -> str:
    if result is None:
        return '<figure><div class="dg-empty"></div><figcaption><br><br></figcaption></figure>'
    nfe, saturation = _caption(result)
    image = f'<img src="{data_uri(result.pictures[0])}" alt="{escape(description)}">'
    return f"<figure>{image}<figcaption>{nfe}<br>{saturation}</figcaption></figure>"


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
    """A picture, made small, as an address that needs no file."""
    small = picture.convert("RGB")
    small.thumbnail((largest, largest))
    out = io.BytesIO()
    small.save(out, format="PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
