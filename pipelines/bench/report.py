"""A benchmark's report: one self-contained HTML page, and tables in Markdown for the docs."""

import base64
import io
import json
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure as Plot
from matplotlib.ticker import PercentFormatter
from matplotlib.transforms import Bbox

from diffusers_guidance.files import write
from diffusers_guidance.pipelines.bench.metrics import Figure, Measure, Summary
from diffusers_guidance.pipelines.pictures.contest import plane
from diffusers_guidance.pipelines.pictures.texts import counted
from diffusers_guidance.pipelines.support.templates import template

INK, GREY, BLUE, GREEN = "#1a1a1a", "#8a8a8a", "#2f6fde", "#1a7f37"
ABOUT_INTERVALS = (
    "Every figure is a mean over all prompts and seeds. After it stands its 95 % interval, from a bootstrap over seeds "
    "and prompts."
)
ABOUT_SECONDS = (
    "Seconds are medians, with their 20 and 80 % quantiles. Each column ran in turns with {baseline}, and its saving "
    "is the median of the ratios of neighbouring runs. Possible is the time of the skipped evaluations, measured on "
    "the denoiser alone in other calls; because of noise, a column can save more than 100 % of it."
)


def save(summary: Summary, out: Path) -> list[Path]:
    """Writes report.html, its plots, tables.md and summary.json into `out`, each whole or not at all."""
    contents = {"report.html": html(summary), "tables.md": markdown(summary), "summary.json": as_json(summary)}
    contents |= {f"{name}.svg": svg for name, (_, svg) in _plots(summary).items()}
    for name, text in contents.items():
        write(out / name, text.encode())
    return [out / name for name in contents]


def html(summary: Summary) -> str:
    """The page, with its pictures and plots inside."""
    filters = {"picture": _picture, "memory": _memory, "pair": _pair, "counted": counted}
    schedulers = list(dict.fromkeys(row.scheduler for row in summary.rows))
    return template(__package__, "report.html", **filters).render(
        summary=summary,
        suite=summary.suite,
        measures=summary.measures,
        schedulers=schedulers,
        about_intervals=ABOUT_INTERVALS,
        about_seconds=ABOUT_SECONDS.format(baseline=summary.suite.baseline),
        plots=list(_plots(summary).values()),
    )


def markdown(summary: Summary) -> str:
    """The tables for the docs."""
    suite, measures = summary.suite, summary.measures
    prompts = counted(len(suite.prompts), "held-out prompt" if suite.held_out else "prompt")
    lines = [f"{prompts}, {counted(len(suite.seeds), 'seed')}. {ABOUT_INTERVALS}", ""]
    head = ["rule + policy", "scale", "NFEs", "saved", *[m.title for m in measures]]
    for scheduler in dict.fromkeys(row.scheduler for row in summary.rows):
        rows = [
            [row.name, _scale(row.guidance_scale), f"{row.nfe.mean:.1f}", f"{row.saved:.0%}",
             *[figure(row.figures.get(m.name), m) for m in measures]]
            for row in summary.rows if row.scheduler == scheduler
        ]  # fmt: skip
        lines += [f"**{scheduler}, {counted(suite.steps, 'step')}**", "", *_table(head, rows), ""]
    if summary.timings:
        head = ["rule + policy", "batch", "s/image", "baseline s/image", "time saved", "possible", "peak memory"]
        lines += [ABOUT_SECONDS.format(baseline=suite.baseline), ""]
        lines += [*_table(head, [_timing_cells(t) for t in summary.timings]), ""]
    if summary.rates:
        head = ["batch B", "evaluations/s at B", "at 2B", "time of B / time of 2B"]
        lines += [*_table(head, [_rate_cells(r) for r in summary.rates]), ""]
    if summary.verdicts:
        met = {True: "met", False: "**not met**", None: "not measured"}
        head = ["target", "wanted", "found", ""]
        found = [[f"{v.column}: {v.measure}", v.wanted, v.found, met[v.met]] for v in summary.verdicts]
        lines += [*_table(head, found), ""]
    if summary.not_measured:
        lines += ["Not measured:", "", *[f"* {name}: {why}" for name, why in summary.not_measured.items()], ""]
    lines += [f"Measured on: {_machine(e)}." for e in summary.environments]
    return "\n".join(lines).rstrip() + "\n"


def as_json(summary: Summary) -> str:
    """All figures as plain JSON."""
    rows = [
        {**{k: v for k, v in vars(row).items() if k not in ("values", "pictures", "figures", "nfe")},
         "nfe": asdict(row.nfe), "figures": {name: asdict(found) for name, found in row.figures.items()}}
        for row in summary.rows
    ]  # fmt: skip
    timings = [asdict(t) | {"share_of_possible": t.share_of_possible} for t in summary.timings]
    found = {
        "suite": summary.suite.name,
        "environments": summary.environments,
        "prompts": summary.suite.prompts,
        "seeds": summary.suite.seeds,
        "rows": rows,
        "timings": timings,
        "rates": summary.rates,
        "effective": summary.effective,
        "targets": [asdict(v) for v in summary.verdicts],
        "not_measured": summary.not_measured,
    }
    return json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def figure(found: Figure | None, measure: Measure) -> str:
    """ "35.2 (34.1–36.0)"."""
    if found is None:
        return ""
    show = measure.format.format
    return f"{show(found.mean)} ({show(found.low)}–{show(found.high)})"


# Plots


def _plots(summary: Summary) -> dict[str, tuple[str, str]]:
    """The caption and SVG of each plot, by name."""
    if not summary.rows:
        return {}
    made = {"fidelity": fidelity_plot(summary), "look": look_plot(summary), "time": time_plot(summary)}
    return {name: plot for name, plot in made.items() if plot is not None}


def fidelity_plot(summary: Summary) -> tuple[str, str] | None:
    """PSNR against NFEs."""
    rows = [row for row in summary.rows if "psnr" in row.figures and row.scheduler == summary.rows[0].scheduler]
    rows = [row for row in rows if row.guidance_scale == summary.suite.guidance_scale]
    if not rows:
        return None
    plot = Plot(figsize=(7.2, 4.2), layout="constrained")
    axes = plane(plot)
    names = []
    for row in sorted(rows, key=lambda row: row.figures["psnr"].mean):
        at, x = row.figures["psnr"], row.nfe.mean
        colour = GREEN if row.name == "default" else BLUE
        axes.errorbar(x, at.mean, [[at.mean - at.low], [at.high - at.mean]], fmt="o", color=colour, capsize=3, lw=1.2)
        names.append((row.name, x, at, colour))
    axes.margins(x=0.25, y=0.15)
    _plain(axes)
    plot.draw_without_rendering()  # fixes all positions
    _name(axes, names)
    return "Fidelity for evaluations: further up is closer to full guidance, further left is cheaper.", _svg(plot)


def _name(axes: Any, names: list[tuple[str, float, Figure, str]]) -> None:
    """Writes names beside their points, where possible without covering another name, point or interval."""

    def box(x: float, low: float, high: float) -> Bbox:
        return Bbox(axes.transData.transform([(x, low), (x, high)])).padded(5)

    taken = [box(x, at.low, at.high) for _, x, at, _ in names]
    places = [(dx, dy, "left" if dx > 0 else "right") for dy in (4, -12, 18, -26, 32, -40) for dx in (8, -8)]
    for name, x, at, colour in names:
        tried: list[tuple[float, int, Any, Bbox]] = []
        for dx, dy, side in places:
            text = axes.annotate(name, (x, at.mean), (dx, dy), textcoords="offset points", fontsize=9, ha=side,
                                 color=colour, in_layout=False)  # fmt: skip
            extent = text.get_window_extent()
            outside = not axes.bbox.containsx(extent.x0) or not axes.bbox.containsx(extent.x1)
            tried.append((extent.count_overlaps(taken) + 10 * outside, len(tried), text, extent))
            text.set_visible(False)
        _, _, best, extent = min(tried, key=lambda each: each[:2])
        best.set_visible(True)
        for _, _, text, _ in tried:
            if text is not best:
                text.remove()
        taken.append(extent)


def look_plot(summary: Summary) -> tuple[str, str]:
    """Saturation and contrast of every column."""
    rows = [row for row in summary.rows if row.scheduler == summary.rows[0].scheduler]
    base = next((row for row in rows if row.name == summary.suite.baseline), None)
    plot = Plot(figsize=(7.2, 0.9 + 0.34 * len(rows)), layout="constrained")
    shown = [
        (axes, name) for axes, name in zip(plot.subplots(1, 2, sharey=True), ("saturation", "contrast"), strict=True)
    ]
    for axes, name in shown:
        for y, row in enumerate(rows):
            at = row.figures[name]
            axes.errorbar(at.mean, -y, xerr=[[at.mean - at.low], [at.high - at.mean]], fmt="o", color=BLUE, capsize=3,
                          lw=1.2)  # fmt: skip
        if base is not None:
            axes.axvline(base.figures[name].mean, color=GREY, lw=1, ls=":", zorder=0)
        axes.set(xlabel=name, yticks=[-y for y in range(len(rows))])
        axes.set_yticklabels([row.name for row in rows])
        _plain(axes)
    return "How pictures look. Dotted: plain CFG at the suite's own scale.", _svg(plot)


def time_plot(summary: Summary) -> tuple[str, str] | None:
    """The actual savings beside the possible ones."""
    rows = summary.timings
    if not rows:
        return None
    plot = Plot(figsize=(7.2, 0.9 + 0.42 * len(rows)), layout="constrained")
    axes = plot.add_subplot(xlabel="share of the baseline's seconds saved")
    for y, row in enumerate(rows):
        if row.possible is not None:
            axes.barh(-y, row.possible, height=0.62, color="#dbe6fb", label="possible" if y == 0 else None)
        axes.barh(-y, row.saved, height=0.3, color=BLUE, label="measured" if y == 0 else None)
        axes.plot([1 - row.ratio["p80"], 1 - row.ratio["p20"]], [-y, -y], color=INK, lw=1.2)
    axes.set(yticks=[-y for y in range(len(rows))])
    axes.set_yticklabels([f"{row.name}, batch {row.batch}" for row in rows])
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    _plain(axes)
    return "Seconds saved: measured, with its 20 to 80 % range, beside what the cost of a half batch allows.", _svg(
        plot
    )


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)


def _svg(plot: Plot) -> str:
    content = io.StringIO()
    with rc_context({"svg.hashsalt": "diffusers-guidance"}):
        plot.savefig(content, format="svg", metadata={"Date": None}, transparent=True)
    return content.getvalue().partition("<svg")[2].join(("<svg", ""))


# Cells of tables


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return lines + [
        f"| {' | '.join(escape(cell, quote=False).replace('|', '&#124;') for cell in row)} |" for row in rows
    ]


def _timing_cells(row: Any) -> list[str]:
    low, high = 1 - row.ratio["p80"], 1 - row.ratio["p20"]
    possible = "" if row.possible is None else f"{row.possible:.1%}"
    return [
        row.name, str(row.batch), _seconds(row.seconds), _seconds(row.baseline_seconds),
        f"{row.saved:.1%} ({low:.1%} to {high:.1%})", possible, _memory(row.peak),
    ]  # fmt: skip


def _rate_cells(rate: dict[str, Any]) -> list[str]:
    per_second, step = rate["evaluations_per_second"], rate["seconds_per_step"]
    share = step["unguided"]["median"] / step["guided"]["median"]
    return [str(rate["batch"]), f"{per_second['unguided']:.1f}", f"{per_second['guided']:.1f}", f"{share:.0%}"]


def _seconds(seconds: dict[str, float]) -> str:
    return f"{seconds['median']:.3f} ({seconds['p20']:.3f}–{seconds['p80']:.3f})"


def _memory(count: int | None) -> str:
    return "not measured" if count is None else f"{count / 2**20:.0f} MiB"


def _pair(row: Any) -> str:
    return f"{row.rule} + {row.policy}"


def _machine(found: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    where = found["processor"] if found["device"] == "cpu" else f"{found['device']} ({found['processor']})"
    commit = f", commit {found['commit']}" if found["commit"] else ""
    return f"{where}, {found['threads']} threads, {found['dtype']}, Python {found['python']}, {versions}{commit}"


def _picture(file: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()


def _scale(given: float | str) -> str:
    return given if isinstance(given, str) else f"{given:.3g}"
