"""Fonts for prompts in any script: matplotlib's own or, for letters it lacks, an installed one."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import matplotlib
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

OWN = "DejaVu Sans"


def own_font(name: str = "DejaVuSans") -> str:
    """The file of a font that comes with matplotlib, so that it is the same everywhere."""
    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf"))


def font_for(text: str) -> str:
    """The file of the font for a text."""
    return _found(text)[0]


@contextmanager
def lettering(*texts: str) -> Iterator[None]:
    """Makes matplotlib use fonts that have these texts' letters; a letter that no font has silently becomes a box."""
    families = dict.fromkeys([OWN, *(_found(text)[1] for text in texts)])
    with matplotlib.rc_context({"font.family": list(families)}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .*missing from font")
        yield


def _found(text: str) -> tuple[str, str]:
    """File and family of the font with the most of a text's letters; matplotlib's own wins ties."""
    letters = {ord(letter) for letter in text if letter.isprintable() and not letter.isspace()}
    if letters <= _letters(own_font()):
        return own_font(), OWN
    regular = {font.fname: font.name for font in font_manager.fontManager.ttflist if font.style == "normal"}
    files = [own_font(), *(file for file in regular if "LastResort" not in file)]  # it has a box for every letter
    best = max(files, key=lambda file: len(letters & _letters(file)))
    return best, regular.get(best, OWN)


@cache
def _letters(file: str) -> frozenset[int]:
    """The letters of a font; none if it does not scale, such as fonts of coloured pictures."""
    try:
        font = FT2Font(file)
        return frozenset(font.get_charmap()) if font.scalable else frozenset()
    except (OSError, RuntimeError):
        return frozenset()
