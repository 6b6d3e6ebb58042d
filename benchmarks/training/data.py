"""The data set: emoji of four styles from the package registries, as 128-pixel pictures with captions.

`python benchmarks/training/data.py` fetches the packages below with `npm pack`, rasterises them over white, and writes
`pictures.safetensors` (uint8, (N, 128, 128, 3)) and `pictures.json` (one record a picture).
"""

import argparse
import colorsys
import hashlib
import io
import json
import random
import re
import subprocess
import tarfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm import tqdm

SIZE = 128
"""Pixels a side."""

PACKAGES = {
    "names": "emojibase-data@17.0.0",  # MIT
    "3d": "@lobehub/fluent-emoji-3d@1.1.0",  # Microsoft Fluent Emoji, MIT
    "flat": "@iconify-json/fluent-emoji-flat@1.2.6",  # Microsoft Fluent Emoji, MIT
    "noto": "@iconify-json/noto@1.2.9",  # Google Noto Emoji, Apache-2.0
    "blob": "@iconify-json/noto-v1@1.2.5",  # Google Noto Emoji before version 2, Apache-2.0
}
"""npm packages: first the names and keywords, then one for each style word."""

STYLES = ("3d", "flat", "noto", "blob")
HELD_OUT = 0.05
"""The share of the style x concept pairs that no training sees."""

_ALWAYS_TRAINED = {
    "red apple", "dog face", "rocket", "pizza", "grinning face", "tiger face", "tiger", "guitar", "soccer ball",
    "automobile", "lemon", "blue heart", "hamburger", "mouse face", "bear", "elephant", "unicorn",
}  # fmt: skip
"""The prompts of the demo and the tests: never held out."""

_GROUPS = (0, 1, 3, 4, 5, 6, 7, 8)  # emojibase's numbers: smileys, people, animals, food, places, activities, things
_NO_SUBGROUPS = {
    "transport-sign", "warning", "arrow", "zodiac", "av-symbol", "gender", "math", "punctuation", "currency",
    "keycap", "alphanum", "family", "religion",
}  # fmt: skip
_NO_LABELS = re.compile(r"^(man|woman|men|women)\b.+|.*(button|o’clock|-thirty|: |facing right)|input |^map of", re.I)


@dataclass
class Picture:
    """A record of the data set; the picture of record i is `pictures[i]` of the tensor."""

    style: str
    concept: str
    """Code points in hexadecimal: the same in every style."""
    label: str
    subgroup: str
    tags: list[str]
    colour: str | None
    held_out: bool
    captions: list[str] = field(default_factory=list)


# Captions

SYNONYMS = {
    line.split(":")[0].strip(): [s.strip() for s in line.split(":")[1].split(",")]
    for line in """
        red apple: apple, shiny red apple
        pizza: slice of pizza, pizza slice, piece of pizza
        automobile: car, motor car
        hamburger: burger, cheeseburger
        soccer ball: football ball, soccer
        grinning face: smiling face, happy face, smiley
        dog face: dog's face, puppy face
        cat face: cat's face, kitten face
        tiger face: face of a tiger, tiger's face
        mouse face: mouse's face, face of a mouse
        bear: bear face, brown bear
        unicorn: unicorn head, unicorn face
        rocket: space rocket, rocket ship
        guitar: acoustic guitar
        red heart: heart, love heart
        tennis: tennis ball
        wrapped gift: gift box, present, gift
        honeybee: bee, honey bee
        lady beetle: ladybug, ladybird
        french fries: fries, chips
        doughnut: donut
        ear of corn: corn, corn cob
        fire engine: fire truck
        airplane: aeroplane, plane
        locomotive: steam train, steam engine
        police car: patrol car
        police car light: siren
        evergreen tree: pine tree, fir tree
        deciduous tree: tree
        jack-o-lantern: halloween pumpkin, pumpkin
        hot beverage: cup of coffee, coffee, tea
        steaming bowl: noodle soup, ramen
        spouting whale: whale spouting water
        sports medal: gold medal, medal
        droplet: water drop, drop of water
        water wave: wave
        fire: flame
        high voltage: lightning bolt, lightning
        american football: football
        teddy bear: stuffed bear
        pool 8 ball: billiard ball, eight ball
        bullseye: dartboard, target
        wine glass: glass of red wine, red wine
        beer mug: mug of beer, beer
        tropical drink: cocktail
        cup with straw: soft drink, cup of soda
        takeout box: chinese takeout
        soft ice cream: ice cream cone, soft serve
        birthday cake: cake with candles
        shortcake: slice of cake, piece of cake
        honey pot: pot of honey, honey
        ghost: friendly ghost
        robot: robot face
        alien: alien face
        pile of poo: poop, poo
        snowman without snow: small snowman
        smiling face with sunglasses: cool face, face with sunglasses
        crying face: sad face with a tear
        loudly crying face: sobbing face
        angry face: mad face
        smiling face with heart-eyes: face with heart eyes, face in love
        face with tears of joy: laughing face, laughing with tears
        thumbs up: thumb up, like
        light bulb: lamp, idea
        closed book: red book, book
        crescent moon: moon
        star: yellow star
        sun: yellow sun
        mobile phone: smartphone, cell phone, phone
        television: tv
        cookie: chocolate chip cookie
        hot dog: hotdog
        sailboat: sailing boat
        t-shirt: shirt
        high-heeled shoe: high heel, red shoe
        running shoe: sneaker, sports shoe
        key: golden key
        locked: padlock, lock
        hammer: claw hammer
        money bag: bag of money
        gem stone: diamond, gem
        graduation cap: graduate's hat
        ice cream: bowl of ice cream
        globe showing americas: globe, planet earth, earth
        """.strip().splitlines()
}
"""What people type for some concepts besides the name in Unicode."""

_TEMPLATES_STYLED = (
    "a {style} emoji of {a_name}",
    "a {style} emoji of {a_name}",
    "{style} emoji of {a_name}",
    "{style} emoji, {name}",
    "{name}, {style}",
    "{name}, {style} style",
    "{a_name} in {style} style",
    "{style} {name}",
    "a {style} {name} emoji",
    "{a_name}, {style} emoji",
)
_TEMPLATES_PLAIN = ("{a_name}", "{a_name}", "{name}", "an emoji of {a_name}", "{name} emoji", "a picture of {a_name}")
_PLURAL = re.compile(r"(?<![su])s$")
_VOWEL_SOUND = re.compile(r"^(?!uni|one|use|eu)[aeiou]|^hour", re.I)


def with_article(name: str) -> str:
    """A name (of one thing or several) as captions write it: "an apple", "a unicorn", "grapes".

    Args:
        name: What the picture shows, in lower case.
    """
    if _PLURAL.search(name.split(" with ")[0].split(" of ")[0]):
        return name
    return f"{'an' if _VOWEL_SOUND.match(name) else 'a'} {name}"


def captions(picture: Picture, count: int, seed: int = 0) -> list[str]:
    """`count` captions of one picture, as people would type them: half with the style word, some with keywords.

    Args:
        picture: The record; its tags should be those that few other concepts share.
        count: How many; they may repeat.
        seed: Captions of the same picture and seed are the same.
    """
    draw = random.Random(f"{seed} {picture.style} {picture.concept}")
    name = plain_name(picture.label)
    others = SYNONYMS.get(name, [])
    if picture.colour and not any(word in name for word in _COLOURS):
        others = [*others, f"{picture.colour} {name}"]
    written = []
    for _ in range(count):
        said = draw.choice(others) if others and draw.random() < 0.35 else name
        template = draw.choice(_TEMPLATES_STYLED if draw.random() < 0.6 else _TEMPLATES_PLAIN)
        caption = template.format(style=picture.style, name=said, a_name=with_article(said))
        tags = [tag for tag in picture.tags if tag not in caption]
        if tags and draw.random() < 0.2:
            caption += ", " + ", ".join(draw.sample(tags, min(len(tags), draw.randint(1, 2))))
        written.append(caption)
    return written


# Colours

_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "grey")


def dominant_colour(picture: np.ndarray) -> str | None:
    """The colour that 80 % of the coloured pixels share, or None; takes (H, W, 3) uint8."""
    pixels = picture[::4, ::4].reshape(-1, 3) / 255
    named = Counter(_colour_name(*pixel) for pixel in pixels)
    del named[None]
    if named.total() < 0.1 * len(pixels):
        return None
    colour, count = named.most_common(1)[0]
    return colour if count > 0.8 * named.total() else None


def _colour_name(red: float, green: float, blue: float) -> str | None:
    hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
    if saturation < 0.3 or value < 0.2:
        return None
    if value < 0.6 and 10 <= hue * 360 < 45:
        return "brown"
    edges = (15, 42, 68, 165, 255, 300, 340, 361)
    return ("red", "orange", "yellow", "green", "blue", "purple", "pink", "red")[
        next(i for i, edge in enumerate(edges) if hue * 360 < edge)
    ]


# Sources


def fetch(folder: Path) -> dict[str, Path]:
    """Fetches missing packages with `npm pack`. Returns their unpacked folders by the keys of PACKAGES."""
    found = {}
    for key, package in PACKAGES.items():
        found[key] = folder / key
        if not (folder / key / "package.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            packed = subprocess.run(
                ["npm", "pack", package, "--silent"], cwd=folder, check=True, capture_output=True, text=True
            )
            with tarfile.open(folder / packed.stdout.split()[-1]) as archive:
                archive.extractall(folder / f"{key}.part", filter="data")
            (folder / f"{key}.part" / "package").rename(folder / key)
    return found


def concepts(names: Path) -> list[dict[str, Any]]:
    """emojibase's records of drawable things, without flags, skin tones, clocks, signs, letters, gendered doubles."""
    subgroups = json.loads((names / "meta" / "groups.json").read_text(encoding="utf8"))["subgroups"]
    records = json.loads((names / "en" / "data.json").read_text(encoding="utf8"))
    kept = []
    for record in records:
        if record.get("group") not in _GROUPS or _NO_LABELS.search(record["label"]):
            continue
        record["subgroup"] = subgroups[str(record["subgroup"])]
        if record["subgroup"] not in _NO_SUBGROUPS:
            kept.append(record)
    shared = Counter(tag for record in kept for tag in record.get("tags", []))
    for record in kept:  # a keyword that more than three concepts share does not name any of them
        record["tags"] = [tag for tag in record.get("tags", []) if shared[tag] <= 3 and tag != record["label"]]
    return kept


def held_out(style: str, concept: str, label: str) -> bool:
    """Whether the pair is held out from every training, by a hash, so it never changes. At most one style of each."""
    if label.lower() in _ALWAYS_TRAINED:
        return False
    number = int(hashlib.sha256(concept.encode()).hexdigest(), 16)
    return number % 10_000 < 10_000 * HELD_OUT * len(STYLES) and STYLES[(number // 10_000) % len(STYLES)] == style


def _plain(concept: str) -> str:
    return concept.replace("-fe0f", "")  # packages differ in whether they write the variation selector


class _Iconify:
    """An icon package: SVG by code points, or by the slug of the name if the package has no code points."""

    def __init__(self, folder: Path):
        icons = json.loads((folder / "icons.json").read_text(encoding="utf8"))
        self.icons, self.aliases = icons["icons"], icons.get("aliases", {})
        self.size = icons.get("width", 16), icons.get("height", 16)
        codes = json.loads((folder / "chars.json").read_text(encoding="utf8"))
        self.by_code = {_plain(code): name for code, name in codes.items()}

    def svg(self, concept: str, label: str) -> str | None:
        slug = re.sub(r"[^a-z0-9]+", "-", label.lower().replace("’", "")).strip("-")
        name = self.by_code.get(_plain(concept))
        if name is None and not self.by_code:
            name = next((n for n in (slug, f"{slug}-face") if n in self.icons or n in self.aliases), None)
        while name in self.aliases:
            name = self.aliases[name]["parent"]
        if name not in self.icons:
            return None
        icon = self.icons[name]
        width, height = icon.get("width", self.size[0]), icon.get("height", self.size[1])
        box = f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}"'
        return f'<svg xmlns="http://www.w3.org/2000/svg" {box} width="256" height="256">{icon["body"]}</svg>'


def _over_white(picture: Image.Image) -> np.ndarray:
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return np.asarray(Image.alpha_composite(white, picture).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX))


def build(folder: Path, count: int = 32) -> list[Picture]:
    """Builds the data set in `folder`, with `count` captions a picture; returns its records."""
    import resvg_py

    sources = fetch(folder / "packages")
    webp = {_plain(path.stem): path for path in (sources["3d"] / "assets").glob("*.webp")}
    drawn = {style: _Iconify(sources[style]) for style in STYLES[1:]}
    pictures, records = [], []
    for record in tqdm(concepts(sources["names"]), desc="drawing", unit="concept"):
        concept, label = record["hexcode"].lower(), record["label"]
        for style in STYLES:
            if style == "3d":
                image = Image.open(webp[_plain(concept)]) if _plain(concept) in webp else None
            else:
                svg = drawn[style].svg(concept, label)
                png = svg and bytes(resvg_py.svg_to_bytes(svg_string=svg, width=256, height=256))
                image = Image.open(io.BytesIO(png)) if png else None
            if image is None:
                continue
            pixels = _over_white(image)
            if np.mean(pixels < 250) < 0.01:  # nothing was drawn
                continue
            pictures.append(pixels)
            colour = dominant_colour(pixels)
            hidden = held_out(style, concept, label)
            records.append(Picture(style, concept, label, record["subgroup"], record["tags"], colour, hidden))
    styles_of = Counter(r.concept for r in records)
    for r in records:
        r.held_out &= styles_of[r.concept] > 1  # a concept is learned in another style
        r.captions = captions(r, count)
    save_file({"pictures": torch.from_numpy(np.stack(pictures))}, folder / "pictures.safetensors")
    (folder / "pictures.json").write_text(json.dumps([asdict(r) for r in records], ensure_ascii=False), "utf8")
    return records


def load(folder: Path) -> tuple[torch.Tensor, list[Picture]]:
    """Pictures, uint8 (N, 128, 128, 3), and their records."""
    if not (folder / "pictures.json").exists():
        raise FileNotFoundError(f"no data set in {folder}: build it with `make model-data`")
    records = json.loads((folder / "pictures.json").read_text(encoding="utf8"))
    return load_file(folder / "pictures.safetensors")["pictures"], [Picture(**r) for r in records]


def everyday(records: list[Picture], count: int) -> list[int]:
    """Indices of the pictures of the first `count` concepts of concepts.txt, without those held out."""
    lines = (Path(__file__).parent / "concepts.txt").read_text(encoding="utf8").splitlines()
    names = [name.strip() for line in lines if not line.startswith("#") for name in line.split(",")]
    wanted = set(names[:count])
    return [i for i, r in enumerate(records) if not r.held_out and plain_name(r.label) in wanted]


def plain_name(label: str) -> str:
    """Unicode's name as people type it."""
    return label.lower().replace("’", "'")


def sheet(pictures: np.ndarray, columns: int) -> Image.Image:
    """Pictures of one size, (N, H, W, 3) uint8, row by row on one white sheet."""
    count, height, width, _ = pictures.shape
    page = Image.new("RGB", (columns * width, -(-count // columns) * height), "white")
    for i, picture in enumerate(pictures):
        page.paste(Image.fromarray(picture), (i % columns * width, i // columns * height))
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("out/model"), help="where the data set goes")
    records = build(parser.parse_args().folder)
    print(f"{len(records)} pictures of {len({r.concept for r in records})} concepts: ", end="")
    print(dict(Counter(r.style for r in records)), f"{sum(r.held_out for r in records)} held out")


if __name__ == "__main__":
    main()
