"""The README's table and picture of both models, and docs/models.md: docs/results/both, docs/contact_sheet.webp.

    python benchmarks/both.py            # measures what is missing, then writes table and picture
    python benchmarks/both.py --write    # writes the pages alone, from what was measured

On each bundled model that is here: the prompts of `make demo`, one seed, 20 steps of its own scheduler, CFG at the
scale that suits it and at one where it burns. Each way takes turns with plain CFG, prompt by prompt: its time is the
ratio of the two sums of processor time, on one thread, so other work on the machine counts little. PSNR is the mean
over pictures to plain CFG at that scale. Every row is written as it is made; other weights or versions begin anew.
"""

import argparse
import io
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rows import Rows

from diffusers_guidance import CFG, AdaptiveGuidance, EveryStep, Forecast, Rule, samples
from diffusers_guidance.files import write
from diffusers_guidance.pipelines.app.suited import Suited, suited
from diffusers_guidance.pipelines.pictures.columns import Column
from diffusers_guidance.pipelines.pictures.compare import Comparison
from diffusers_guidance.pipelines.pictures.make import Case, Result, make, start_up
from diffusers_guidance.pipelines.pictures.measures import psnr, saturation
from diffusers_guidance.pipelines.pictures.sheet import contact_sheet
from diffusers_guidance.pipelines.support.files import read_lines
from diffusers_guidance.pipelines.support.loading import fingerprint, load
from diffusers_guidance.policies import Policy

ROOT = Path(__file__).parents[1]
OUT, PICTURE, README = ROOT / "docs" / "results" / "both", ROOT / "docs" / "contact_sheet.webp", ROOT / "README.md"
PAGE = ROOT / "docs" / "models.md"
PART = re.compile(r"<!-- (results/\S+) -->\n.*?<!-- end -->", re.DOTALL)
"""Of that page, where the results in a file go."""
BEGIN, END = "<!-- by benchmarks/both.py -->", "<!-- to here -->"
STEPS, SEED = 20, 0
SHOWN = ("CFG", "default", "half", "high", "apg and stopped")
"""The columns of the picture."""
ROWS = 3
"""Prompts of each model in it."""
COLUMNS = ("NFEs", "time", "PSNR", "saturation")
"""The columns of the table, of each model."""
BRIEF = ("time", "PSNR", "saturation")
"""Those of them that README has."""


@dataclass(frozen=True)
class Line:
    """A row of the table, on one model."""

    key: str
    label: str
    column: Column
    steps: int = STEPS


def lines(model: str, learned: Any = None) -> Iterator[Line]:
    """What is measured on a model, plain CFG at both scales first.

    Args:
        learned: what a run of another prompt taught Forecast.
    """
    suits = suited(model)

    def line(key: str, label: str, rule: Rule, policy: Policy, scale: float = suits.scale, steps: int = STEPS) -> Line:
        return Line(key, label, Column(label, rule, policy, scale), steps)

    yield line("CFG", "plain CFG", CFG(), EveryStep())
    yield Line("default", "`attach(pipe)`", Column("default", guidance_scale=suits.scale))
    yield line("fewer", f"plain CFG, {3 * STEPS // 4} steps", CFG(), EveryStep(), steps=3 * STEPS // 4)
    yield line("half", "`Forecast(0.45)`", CFG(), Forecast(0.45))
    yield line("learned", "the same, one run learned", CFG(), Forecast(0.45, calibration=learned))
    yield line("few", f"plain CFG, {11 * STEPS // 20} steps", CFG(), EveryStep(), steps=11 * STEPS // 20)
    yield line("high", "plain CFG", CFG(), EveryStep(), suits.high)
    yield line("stopped", "AG", CFG(), AdaptiveGuidance(), suits.high)
    yield line("apg", "APG", suits.apg, EveryStep(), suits.high)
    yield line("apg and stopped", "APG and AG", suits.apg, AdaptiveGuidance(), suits.high)


class Measured:
    """A model's rows so far, in its file.

    Args:
        prompts: the most that are drawn.
    """

    def __init__(self, name: str, prompts: int = 6):
        self.name = name
        self.cases = [Case(text, SEED) for text in read_lines(samples.PROMPTS)[:prompts]]
        versions = {package: version(package) for package in ("diffusers", "transformers", "torch")}
        about = {"model": fingerprint(name), "steps": STEPS, "pictures": len(self.cases), "versions": versions}
        self.rows = Rows(OUT / f"{name}.json", **about)

    def measure(self, pipe: Any) -> dict[str, Result]:
        """Rows that are missing, and what was made for the picture."""
        start_up(pipe, self.cases[:1], suited(self.name).scale)
        lesson = Column("", CFG(), Forecast(0.45, learn=True), suited(self.name).scale)
        learned = make(pipe, [Case(read_lines(samples.CALIBRATION_PROMPTS)[0], SEED)], lesson, steps=STEPS).calibration
        plain: Line | None = None
        shown: dict[str, Result] = {}
        for line in lines(self.name, learned):
            plain = line if line.key in ("CFG", "high") else plain
            assert plain is not None
            if line.key in self.rows and line.key not in SHOWN:
                continue
            made, seconds, full, whole = _in_turns(pipe, self.cases, line, plain)
            shown[line.key] = made
            row = {
                "label": line.label, "scale": made.guidance_scale, "nfe": made.nfe / len(self.cases),
                "nfe_full": full.nfe / len(self.cases),
                "saturation": float(saturation(made.floats).mean()),
            }  # fmt: skip
            if line is not plain:
                row |= {"time": seconds / whole, "psnr": float(psnr(made.floats, full.floats).mean())}
            self.rows.once(line.key, partial(dict, row))
        return shown

    def picture(self, pipe: Any, shown: dict[str, Result]) -> Image.Image:
        """Some prompts as rows, some ways as columns."""
        results = []
        for key in SHOWN:
            made = shown[key]
            made.pictures, made.decoded, made.reports = made.pictures[:ROWS], made.decoded[:ROWS], made.reports[:ROWS]
            results.append(made)
        scheduler = type(pipe.scheduler).__name__
        asked = [case.prompt for case in self.cases[:ROWS]]
        about = (self.name, type(pipe).__name__, scheduler, "cpu", "float32", asked, [SEED], STEPS, None)
        return contact_sheet(Comparison(*about, results), [_note(self.rows[key], suited(self.name)) for key in SHOWN])


def _in_turns(pipe: Any, cases: list[Case], line: Line, plain: Line) -> tuple[Result, float, Result, float]:
    """A way's result and seconds, and those of plain CFG, made in turns."""

    def run(which: Line, case: Case) -> tuple[Result, float]:
        began = time.process_time()
        made = make(pipe, [case], which.column, steps=which.steps)
        return made, time.process_time() - began

    found: list[list[tuple[Result, float]]] = [[], []]
    for number, case in enumerate(cases):
        turn = [(0, line), (1, plain)] if line is not plain else [(0, line)]
        for place, which in turn if number % 2 else reversed(turn):
            found[place].append(run(which, case))
    own, others = (_joined(each) for each in (found[0], found[1] or found[0]))
    return *own, *others


def _joined(found: list[tuple[Result, float]]) -> tuple[Result, float]:
    """Results of single pictures as one."""
    each = [made for made, _ in found]
    joined = {
        name: [one for made in each for one in getattr(made, name)] for name in ("pictures", "decoded", "reports")
    }
    return replace(each[0], **joined), sum(seconds for _, seconds in found)


def _note(row: dict[str, Any], suits: Suited) -> str:
    """Time and likeness; where CFG burns, colours in place of the likeness to that."""
    near = f"saturation {row['saturation']:.2f}" if row["scale"] == suits.high else f"{row.get('psnr', 0):.1f} dB"
    return f"{row.get('time', 1):.0%} of the time" + (
        f", {near}" if "psnr" in row or row["scale"] == suits.high else ""
    )


def table(measured: dict[str, dict[str, dict[str, Any]]], columns: Sequence[str] = COLUMNS) -> str:
    """Both models beside each other, in Markdown.

    Args:
        measured: by model, the rows of its file.
        columns: what it has of each model.
    """
    named = {name: rows for name, rows in measured.items() if rows}
    head = [f"{name}: {what}" for name in named for what in columns]
    text = [f"| | {' | '.join(head)} |", f"|---|{'---:|' * len(head)}"]
    for line in lines(samples.NAMES[0]):
        cells, scales = [], dict.fromkeys(f"{rows[line.key]['scale']:g}" for rows in named.values())
        for rows in named.values():
            cell = _cells(rows[line.key])
            cells += [cell[what] for what in columns]
        text.append(f"| {line.label} at {' and '.join(scales)} | {' | '.join(cells)} |")
    return "\n".join(text)


def _cells(row: dict[str, Any]) -> dict[str, str]:
    """What the table says of a row, by column."""
    saved = 1 - row["nfe"] / row["nfe_full"]
    return {
        "NFEs": f"{row['nfe']:.3g}" + (f" (−{saved:.0%})" if saved > 0 else ""),
        "time": f"{row['time']:.2f}" if "psnr" in row else "1",
        "PSNR": f"{row['psnr']:.1f} dB" if "psnr" in row else "",
        "saturation": f"{row['saturation']:.3f}",
    }


def written(columns: Sequence[str] = COLUMNS) -> str:
    """The table of what was measured."""
    return table({name: Rows(OUT / f"{name}.json") for name in samples.NAMES}, columns)


def filled(page: str) -> str:
    """A page with the results in its marked parts: the text of a file below its title, or the picture."""

    def content(found: re.Match[str]) -> str:
        file = PAGE.parent / found[1]
        if not file.is_file():
            inner = "Not measured yet."
        elif file.suffix == ".md":
            inner = file.read_text(encoding="utf-8").partition("\n")[2].strip()
        else:
            inner = f"![{file.stem}]({found[1]})"
        return f"<!-- {found[1]} -->\n\n{inner}\n\n<!-- end -->"

    return PART.sub(content, page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="measure nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.write:
        OUT.mkdir(parents=True, exist_ok=True)
        sheets = []
        for name in samples.models():
            pipe, measured = load(name, device="cpu"), Measured(name)
            sheets.append(measured.picture(pipe, measured.measure(pipe)))
        page = Image.new("RGB", (max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)), "white")
        for number, sheet in enumerate(sheets):
            page.paste(sheet, (0, sum(each.height for each in sheets[:number])))
        sheet = io.BytesIO()
        page.save(sheet, "WEBP", quality=90)
        write(PICTURE, sheet.getvalue())
    write(OUT / "summary.md", f"# Both models\n\n{written()}\n".encode())
    write(PAGE, filled(PAGE.read_text(encoding="utf-8")).encode())
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        parser.error(f"{README} does not have the lines {BEGIN!r} and {END!r} between which the table goes")
    write(README, f"{before}{BEGIN}\n\n{written(BRIEF)}\n\n{END}{after}".encode())


if __name__ == "__main__":
    main()
