"""Resuming after an interruption: a piece of work is done if, and only if, its record is on disk."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from diffusers_guidance.files import write
from diffusers_guidance.pipelines.support.ray import spread

P = TypeVar("P")
R = TypeVar("R")


class Record:
    """A JSON file that says what was made, and from which settings.

    Args:
        file: its path.
        made_of: what it depends on, by name; plain JSON values.
        error: raised if the file was made from something else.
    """

    def __init__(self, file: Path, made_of: dict[str, Any], error: type[Exception] = ValueError):
        self.file, self.error = file, error
        self.made_of = json.loads(json.dumps(made_of))

    def read(self) -> dict[str, Any] | None:
        """The file's other content; None if the file does not exist.

        A truncated file (from a full disk) counts as missing.
        """
        try:
            found = json.loads(self.file.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        if not isinstance(found, dict):
            return None
        if {name: found.get(name) for name in self.made_of} != self.made_of:
            raise self.error(
                f"{self.file} was made with another prompt or other settings: choose another place, or delete it"
            )
        return {name: value for name, value in found.items() if name not in self.made_of}

    def write(self, content: dict[str, Any]) -> None:
        text = json.dumps(self.made_of | content, indent=1, ensure_ascii=False, allow_nan=False)
        write(self.file, text.encode() + b"\n")


def resumed(
    work: Callable[[P], Any],
    pieces: Sequence[P],
    found: Callable[[P], R | None],
    keep: Callable[[P, Any], R],
    **spreading: Any,
) -> Iterator[tuple[P, R]]:
    """(piece, its record): first the pieces already done, then each other piece when it is finished.

    Args:
        work: does a piece, on any machine.
        found: returns the record of a piece, or None if it is still to do. Raises if another piece's record is in its
        place.
        keep: writes a piece's results here, and its record last; returns the record.
        spreading: arguments of `spread`.
    """
    left = []
    for piece in pieces:
        record = found(piece)
        if record is None:
            left.append(piece)
        else:
            yield piece, record
    for piece, made in spread(work, left, **spreading):
        yield piece, keep(piece, made)
