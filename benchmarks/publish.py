"""Puts the results of `diffusers-guidance bench` into the docs.

    python benchmarks/publish.py out/bench out/bench-flow

Copies plots, figures and lines of each folder to docs/results/<its name>, with the report of the first, and its tables
into the marked part of docs/benchmark.md. It also draws the pictures of some columns below each other.
"""

import json
import shutil
import sys
from pathlib import Path

from PIL import Image

DOCS = Path(__file__).parents[1] / "docs"
END = "<!-- end -->\n"
SHOWN = ("CFG", "CFG@15", "CFG@15+AG", "APG@15", "APG@15+AG")
SIDE = 96


def sheet(found: Path) -> Image.Image:
    """A row for each column of `SHOWN`, all prompts with the first seed."""
    lines = [json.loads(line) for line in (found / "results.jsonl").read_text().splitlines()]
    runs = {line["column"]: line for line in reversed(lines) if line.get("kind") == "pictures"}
    files = [sorted((found / "pictures" / runs[column]["key"]).glob("*.png")) for column in SHOWN]
    drawn = Image.new("RGB", (SIDE * len(files[0]), SIDE * len(SHOWN)), "white")
    for y, row in enumerate(files):
        for x, file in enumerate(row):
            drawn.paste(Image.open(file).resize((SIDE, SIDE), Image.Resampling.LANCZOS), (SIDE * x, SIDE * y))
    return drawn


def begin(name: str) -> str:
    """The line of docs/benchmark.md after which the tables of a folder go."""
    return f"<!-- written by benchmarks/publish.py from out/{name} -->\n"


def publish(found: Path, *files: str) -> None:
    """Copies `files` and puts in the tables of one folder."""
    target, page, line = DOCS / "results" / found.name, DOCS / "benchmark.md", begin(found.name)
    before, marked, rest = page.read_text(encoding="utf-8").partition(line)
    _, ended, after = rest.partition(END)
    if not marked or not ended:
        raise SystemExit(f"{page} has no part between {line.strip()} and {END.strip()} to put the tables in")
    target.mkdir(parents=True, exist_ok=True)
    for name in files:
        if (found / name).exists():
            shutil.copyfile(found / name, target / name)
    sheet(found).save(target / "apg.webp", quality=85)
    tables = (found / "tables.md").read_text(encoding="utf-8")
    page.write_text(f"{before}{line}\n{tables}\n{END}{after}", encoding="utf-8")
    print(f"wrote {page} and {target}")


def main() -> int:
    files = ("summary.json", "results.jsonl", "fidelity.svg", "look.svg", "time.svg")
    first, *others = map(Path, sys.argv[1:])
    publish(first, "report.html", *files)
    for other in others:
        publish(other, *files)
    return 0


if __name__ == "__main__":
    sys.exit(main())
