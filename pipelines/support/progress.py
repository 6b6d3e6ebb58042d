"""How far a piece of work is, as it is told to the command line's bar, to the app and to callers in Python."""

from typing import Protocol


class Progress(Protocol):
    """progress(what is running, done, in all); what it raises ends the work."""

    def __call__(self, what: str, done: int, total: int, /) -> None: ...


def silent(what: str, done: int, total: int, /) -> None:
    """Tells nobody."""


def part(whole: Progress, before: int, total: int, name: str | None = None) -> Progress:
    """What a part of the work tells, told as of the whole.

    Args:
        before: what was done before the part.
        total: in all.
        name: what is running; None for the part's own words.
    """

    def progress(what: str, done: int, _: int, /) -> None:
        whole(name or what, before + done, total)

    return progress
