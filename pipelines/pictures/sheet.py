"""A comparison as pictures: the contact sheet (rows: prompts, columns: rules and policies) and its similarities."""

import io
import json
import re
import textwrap
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from diffusers_guidance import scales
from diffusers_guidance.files import write
from diffusers_guidance.pipelines.pictures.columns import changes, short
from diffusers_guidance.pipelines.pictures.compare import Comparison
from diffusers_guidance.pipelines.pictures.fonts import font_for, lettering, own_font
from diffusers_guidance.pipelines.pictures.make import Result
from diffusers_guidance.pipelines.pictures.texts import counted
from diffusers_guidance.policies import AdaptiveGuidance

SMALLEST, LARGEST = 192, 512
"""Pixels of a picture's longer side on the sheet; smaller pictures are enlarged a whole number of times."""

INK, GREY, GREEN, FRAME = "#1a1a1a", "#6b6b6b", "#1a7f37", "#e4e4e4"

Line = tuple[str, ImageFont.FreeTypeFont, str]
"""Text, font, colour."""


def save(comparison: Comparison, folder: str | Path) -> list[Path]:
    """Writes contact_sheet.png, similarity.png and compare.json into `folder`, each whole or not at all."""
    sheet, plot = io.BytesIO(), io.BytesIO()
    contact_sheet(comparison).save(sheet, "PNG", optimize=True)
    with lettering(*comparison.prompts):
        similarity_plot(comparison).savefig(plot, format="png", dpi=150)
    text = json.dumps(comparison.to_dict(), indent=1, allow_nan=False, ensure_ascii=False)
    contents = {
        "contact_sheet.png": sheet.getvalue(),
        "similarity.png": plot.getvalue(),
        "compare.json": text.encode() + b"\n",
    }
    for name, content in contents.items():
        write(Path(folder) / name, content)
    return [Path(folder) / name for name in contents]


def contact_sheet(comparison: Comparison, notes: Sequence[str] = ()) -> Image.Image:
    """One row for each prompt and seed, one column for each rule and policy; above it are its NFEs and the saved share.

    Args:
        notes: one more line above each column.
    """
    width, height = cell_size(comparison.results[0].pictures[0])
    unit = width / 192  # all text and space grow with the pictures
    gap, margin = round(10 * unit), round(24 * unit)
    plain, bold = _font("DejaVuSans", 15 * unit), _font("DejaVuSans-Bold", 16 * unit)
    small = _font("DejaVuSans", 13 * unit)

    heads = [_head(result, bold, plain) for result in comparison.results]
    if all(head[-1][0] == "" for head in heads):
        heads = [head[:-1] for head in heads]  # no column saves anything: drop that line
    if notes:
        heads = [[*head, (note, plain, INK)] for head, note in zip(heads, notes, strict=True)]
    heads = [_wrap(head, width) for head in heads]
    labels = []
    for prompt in comparison.prompts:
        line = (textwrap.shorten(prompt, 140, placeholder=" …"), ImageFont.truetype(font_for(prompt), 15 * unit), INK)
        for seed in comparison.seeds:
            seeds = [(f"seed {seed}", small, GREY)] if len(comparison.seeds) > 1 else []
            labels.append(_wrap([line, *seeds], width))

    left = margin + max(round(line[1].getlength(line[0])) for label in labels for line in label) + 2 * gap
    top = margin + max(_height(head) for head in heads) + gap
    right, bottom = left + len(heads) * (width + gap) - gap, top + len(labels) * (height + gap)
    foot = _wrap([(_foot(comparison), small, GREY)], right - margin)
    sheet = Image.new("RGB", (right + margin, bottom + gap + _height(foot) + margin), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (result, head) in enumerate(zip(comparison.results, heads, strict=True)):
        x = left + column * (width + gap)
        _write(draw, (x, top - gap - _height(head)), head)
        for row, picture in enumerate(result.pictures):
            y = top + row * (height + gap)
            sheet.paste(picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS), (x, y))
            draw.rectangle((x, y, x + width - 1, y + height - 1), outline=FRAME, width=max(1, round(unit)))
    for row, label in enumerate(labels):
        _write(draw, (margin, top + row * (height + gap) + (height - _height(label)) // 2), label)
    _write(draw, (margin, bottom + gap), foot)
    return sheet


def similarity_plot(comparison: Comparison) -> Figure:
    """How similar the two predictions of every picture become, in the first adaptive column (or else the first)."""
    adaptive = (r for r in comparison.results if isinstance(r.policy, AdaptiveGuidance))
    result = next(adaptive, comparison.results[0])
    first = result.reports[0]
    figure: Figure = first.plot()
    axes = figure.axes[0]
    which = "" if len(result.reports) == 1 else ", first batch"
    title = f"{result.label}, scale {scales.text(result.guidance_scale)}: {first.summary()}{which}"
    axes.set_title(title, fontsize="medium", wrap=True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    names = [f"{p}, seed {s}" if len(comparison.seeds) > 1 else p for p in comparison.prompts for s in comparison.seeds]
    legend = axes.get_legend()
    for label, name in zip(legend.get_texts() if legend else [], names, strict=False):
        if label.get_text() != "skipped":
            label.set_text(textwrap.shorten(name, 40))
    if isinstance(result.policy, AdaptiveGuidance) and result.policy.space == "denoised":
        axes.axhline(result.policy.threshold, color=GREY, linestyle=":", linewidth=1, zorder=0)
    return figure


def cell_size(picture: Image.Image) -> tuple[int, int]:
    """A picture's size on the sheet."""
    longest = max(picture.size)
    factor = -(-SMALLEST // longest) if longest < SMALLEST else min(1.0, LARGEST / longest)
    return round(picture.width * factor), round(picture.height * factor)


def _head(result: Result, bold: Any, plain: Any) -> list[Line]:
    scale = f"scale {scales.text(result.guidance_scale)}"
    saved = f"{result.saved:.0%} saved" if result.nfe != result.nfe_full else ""
    if result.is_default:
        title, _, pair = result.label.partition(": ")
        lines = [(f"{title}, {scale}", bold, INK), (pair, plain, INK)]
    else:
        settings = [(changes(result.rule), plain, INK)] if changes(result.rule) else []
        title = f"{type(result.rule).__name__}, {scale}"
        lines = [(title, bold, INK), *settings, (short(result.policy), plain, INK)]
    return [*lines, (f"{result.nfe} NFEs", plain, GREY), (saved, plain, GREEN)]


def _foot(comparison: Comparison) -> str:
    seeds = ", ".join(map(str, comparison.seeds))
    return (
        f"{comparison.model} ({comparison.pipeline}), {comparison.scheduler}, "
        f"{counted(comparison.steps, 'step')}, seed {seeds}. "
        "NFEs: network evaluations for all pictures of a column."
    )


# Text


@cache
def _font(name: str, size: float) -> ImageFont.FreeTypeFont:
    """A font that comes with matplotlib, so it is the same everywhere."""
    return ImageFont.truetype(own_font(name), size)


def _wrap(lines: list[Line], width: int) -> list[Line]:
    """Breaks lines at spaces, before brackets and after commas, and within words longer than a line."""
    wrapped = []
    for text, font, colour in lines:
        line = ""
        for part in re.findall(r"\s+|\(?[^\s(,]*,?", text):
            while font.getlength(line + part) > width:
                fits = line or part[: max(1, _fitting(part, font, width))]
                wrapped.append((fits.rstrip(), font, colour))
                part = part.lstrip() if line else part[len(fits) :]
                line = ""
            line += part
        wrapped.append((line, font, colour))
    return wrapped


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: int) -> int:
    """How many of the first characters fit."""
    return sum(font.getlength(text[: i + 1]) <= width for i in range(len(text)))


def _line_height(font: ImageFont.FreeTypeFont) -> int:
    return round(1.35 * font.size)


def _height(lines: list[Line]) -> int:
    return sum(_line_height(font) for _, font, _ in lines)


def _write(draw: ImageDraw.ImageDraw, corner: tuple[int, int], lines: list[Line]) -> None:
    x, y = corner
    for text, font, colour in lines:
        draw.text((x, y), text, colour, font)
        y += _line_height(font)
