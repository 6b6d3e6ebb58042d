"""The tables of a model's card, from `evaluation.json` (and `curve.json`) beside it.

`python benchmarks/training/card.py samples/emoji-flow` writes them between the two marks in the README.md there.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- by benchmarks/training/card.py -->", "<!-- to here -->"
ROWS = {
    "concept, top 1": "nearest one shows the concept",
    "concept, top 5": "one of the nearest five does",
    "concept and style, top 1": "nearest one shows concept and style, where the caption named one",
    "concept and style, top 5": "one of the nearest five does",
}

TIMED = ("evaluation, batch 1", "evaluation, batch 2", "decoding")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, the first column to the left and the others to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def retrieval(found: dict[str, Any]) -> str:
    """Shares of pictures whose nearest real ones fit, beside the same shares for distorted real pictures."""
    measured = {
        "training captions": found["retrieval"],
        "held-out pairs": found["retrieval"]["held out"],
        "shipped prompts": found["prompts"],
    }
    columns = [part[kind] for part in measured.values() for kind in ("generated", "real pictures, distorted")]
    head = ["", *[name for part in measured for name in (part, "real")]]
    return table(head, ([said, *[f"{100 * column[key]:.1f} %" for column in columns]] for key, said in ROWS.items()))


def guidance(found: dict[str, Any]) -> str:
    """Saturation and contrast for each scale and rule."""
    measured = found["guidance"]
    rules = [rule for rule in measured if rule not in ("scales", "data")]
    rows = (
        [f"{rule.split('(')[0]}, {what}", *[f"{value:.3f}" for value in measured[rule][what]]]
        for rule in rules
        for what in ("saturation", "contrast")
    )
    return table(["scale", *map(str, measured["scales"])], rows)


def similarity(found: dict[str, Any], steps: Sequence[int] = (1, 2, 3, 5, 10, 15, 20)) -> str:
    """Mean cosine of conditional and unconditional predictions at some steps."""
    rows = (
        [f"{scheduler.removesuffix('Scheduler')}, {kind}", *[f"{values[step - 1]:.3f}" for step in steps]]
        for scheduler, kinds in found["similarity"].items()
        for kind, values in kinds.items()
    )
    return table(["", *[f"step {step}" for step in steps]], rows)


def curve(records: Sequence[dict[str, Any]], count: int = 14) -> str:
    """Mean squared error of the velocity over the steps: `count` of the records, the last one among them."""
    spread = [records[(len(records) - 1) * i // (count - 1)] for i in range(count)] if len(records) > count else records
    rows = (("rate", *[f"{r['rate']:.2f}" for r in spread]), ("error", *[f"{r['v']:.3f}" for r in spread]))
    return table(["step", *[str(r["step"]) for r in spread]], rows)


def written(model: Path) -> str:
    """The tables for the card of the model in that folder."""
    found = json.loads((model / "evaluation.json").read_text(encoding="utf8"))
    trained, look, seconds = found["retrieval"], found["guidance"]["data"], found["seconds"]
    single, double, decoding = (1000 * seconds[what] for what in TIMED)
    parts = [
        f"**Retrieval.** {trained['captions']} training captions, {trained['held out']['pairs']} held-out pairs with "
        f"three seeds each, {found['prompts']['captions']} prompts that ship with the package.",
        retrieval(found),
        f"**Guidance scale.** Means over 20 common prompts; the training pictures have saturation "
        f"{look['saturation']:.3f} and contrast {look['contrast']:.3f}. APG with `norm_threshold=5`.",
        guidance(found),
        "**Similarity** of conditional and unconditional predictions, mean cosine over the same prompts.",
        similarity(found),
        f"**Seconds.** {seconds['image']:.2f} s an image (20 steps of CFG), {single:.0f} ms an evaluation, "
        f"{double:.0f} ms at batch 2, {decoding:.0f} ms for decoding: medians on {seconds['threads']} cores.",
    ]
    if (model / "curve.json").exists():
        parts += ["**Training.** Mean squared error:", curve(json.loads((model / "curve.json").read_text()))]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of the model")
    model = parser.parse_args().model
    file = model / "README.md"
    before, _, rest = file.read_text(encoding="utf8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        parser.error(f"{file} does not have the lines {BEGIN!r} and {END!r} between which the tables go")
    file.write_text(f"{before}{BEGIN}\n\n{written(model)}\n\n{END}{after}", encoding="utf8")


if __name__ == "__main__":
    main()
