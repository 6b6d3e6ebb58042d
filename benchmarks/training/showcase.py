"""The pictures of the model's card: concepts and styles, guidance scales, and failures.

`python benchmarks/training/showcase.py`, after `evaluate`, writes them beside the model.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import data
import evaluate
import torch
from PIL import Image, ImageDraw, ImageFont

from diffusers_guidance.pipelines.pictures.compare import compare
from diffusers_guidance.samples import MODEL

CONCEPTS = (
    "red apple", "dog face", "rocket", "slice of pizza", "grinning face", "tiger face", "guitar", "soccer ball",
    "car", "blue heart", "hamburger", "penguin", "sunflower", "airplane",
)  # fmt: skip
SCALES = (1, 2, 3, 5, 8, 12, 20)
_MARGIN = 20


def labelled(pictures: Sequence[Image.Image], columns: int, above: Sequence[str]) -> Image.Image:
    """Pictures of one size, row by row, each with a line of text above it."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    page = Image.new("RGB", (columns * width, rows * (height + _MARGIN)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=11)
    for i, (picture, text) in enumerate(zip(pictures, above, strict=True)):
        x, y = i % columns * width, i // columns * (height + _MARGIN)
        page.paste(picture, (x, y + _MARGIN))
        while font.getlength(text) > width - 4:
            text = text.removesuffix("…")[:-1] + "…"
        draw.text((x + 2, y + 4), text, fill="black", font=font)
    return page


def grid(pipe: object, styles: Sequence[str]) -> Image.Image:
    """A grid of concepts and styles, the first row without a style word; scale 5, 20 steps, seed 0, nothing picked."""
    names = [(style, name) for style in ("", *styles) for name in CONCEPTS]
    captions = [
        f"a {style} emoji of {data.with_article(name)}" if style else data.with_article(name) for style, name in names
    ]
    made = evaluate.generate(pipe, captions, [0] * len(captions), "grid", batch=len(CONCEPTS))
    above = [f"{name}, {style}" if style else data.with_article(name) for style, name in names]
    return labelled([Image.fromarray(p) for p in made.numpy()], len(CONCEPTS), above)


def scales(pipe: object) -> Image.Image:
    """Three prompts at several guidance scales, CFG above APG."""
    prompts = ("a tiger face", "a rocket", "a slice of pizza")
    rules = ("CFG", "APG(norm_threshold=5)")
    made = compare(pipe, prompts, [f"{rule}@{scale}" for rule in rules for scale in SCALES], warm_up=False)
    pictures, above = [], []
    for i in range(len(prompts)):
        for result in made.results:
            pictures.append(result.pictures[i])
            above.append(f"{type(result.rule).__name__} at {result.guidance_scale:g}")
    return labelled(pictures, len(SCALES), above)


def failures(folder: Path, found: dict, count: int = 12) -> Image.Image | None:
    """Generated pictures whose five nearest real ones do not fit: the first of each list, in equal parts.

    Args:
        folder: The folder of the generated pictures.
        found: The measured numbers; it shows the parts that were measured.
    """
    lists = {"prompts": found.get("prompts", {}).get("missed", [])}
    if "retrieval" in found:
        lists |= {"training": found["retrieval"]["missed"], "held_out": found["retrieval"]["held out"]["missed"]}
    lists = {name: missed for name, missed in lists.items() if missed}
    pictures, above = [], []
    for name, missed in lists.items():
        page = Image.open(folder / f"{name}.png")
        captions = (folder / f"{name}.txt").read_text(encoding="utf8").splitlines()
        size = page.width // evaluate.COLUMNS
        for at in missed[: count // len(lists)]:
            x, y = at % evaluate.COLUMNS * size, at // evaluate.COLUMNS * size
            pictures.append(page.crop((x, y, x + size, y + size)))
            above.append(captions[at])
    return labelled(pictures, count, above) if pictures else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("out/model"), help="folder of the data set and checkpoints")
    parser.add_argument("--model", type=Path, default=MODEL, help="the exported pipeline")
    parser.add_argument("--keep", type=Path, help="where evaluate kept its pictures; default: generated in the folder")
    parser.add_argument("--styles", nargs="*", default=data.STYLES, help="styles that the grid shows")
    options = parser.parse_args()
    pipe = evaluate.load(options.model)
    found = json.loads((options.model / "evaluation.json").read_text())
    to = options.model / "pictures"
    to.mkdir(exist_ok=True)
    with torch.no_grad():
        for name, page in (
            ("grid", grid(pipe, options.styles)),
            ("scales", scales(pipe)),
            ("failures", failures(options.keep or options.folder / "generated", found)),
        ):
            if page is None:
                continue
            page.save(to / f"{name}.webp", quality=85)
            print(to / f"{name}.webp", page.size)


if __name__ == "__main__":
    main()
