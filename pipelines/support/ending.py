"""How a command ends on Ctrl-C or on SIGTERM, which containers send."""

import os
import signal
import sys
from contextlib import suppress
from typing import Any


class Terminated(KeyboardInterrupt):
    """The process got SIGTERM."""


def heed_termination() -> None:
    """Makes SIGTERM end the work like Ctrl-C, so that all files are whole and one line says what happened."""

    def end(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_IGN)  # ignore further signals
        raise Terminated

    signal.signal(signal.SIGTERM, end)


def status(ended: KeyboardInterrupt) -> int:
    """The exit status that shells expect: 128 plus the signal's number."""
    return 128 + (signal.SIGTERM if isinstance(ended, Terminated) else signal.SIGINT)


def end_at_once(code: int) -> None:
    """Ends the process without waiting for threads that are in a kernel, which would abort it."""
    try:
        sys.stdout.flush()
    except OSError as error:  # a full disk, or nobody who reads on
        code = code or 1
        if not isinstance(error, BrokenPipeError):
            print(f"Error: the standard output: {error.strerror}", file=sys.stderr)
    with suppress(OSError):
        sys.stderr.flush()
    os._exit(code)
