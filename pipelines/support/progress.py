"""Progress of work, as reported to the command line's bar, to the app and to Python callers."""

import sys
import time
from typing import Protocol


class Progress(Protocol):
    """progress(what is running, done, total); an exception from it ends the work."""

    def __call__(self, what: str, done: int, total: int, /) -> None: ...


def silent(what: str, done: int, total: int, /) -> None:
    """Tells nobody."""


def part(whole: Progress, before: int, total: int, name: str | None = None) -> Progress:
    """Reports the progress of a part as progress of the whole.

    Args:
        before: how much was done before the part.
        total: how much there is in total.
        name: what is running; None for the part's own words.
    """

    def progress(what: str, done: int, _: int, /) -> None:
        whole(name or what, before + done, total)

    return progress


class Printed:
    """For Python callers who wait for minutes: a line on stderr when the words change, and every ten seconds."""

    every = 10.0

    def __init__(self) -> None:
        self.told, self.what = -self.every, ""

    def __call__(self, what: str, done: int, total: int, /) -> None:
        now = time.monotonic()
        if what != self.what or now - self.told >= self.every:
            self.told, self.what = now, what
            print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)
