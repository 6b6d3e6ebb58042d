"""Whose turn it is with what one thread at a time may use; who would wait for ever is told so."""

import sys
import threading
from concurrent.futures import Future
from types import FrameType

from diffusers_guidance.errors import GuidanceError

_WAITS = [each.__code__ for each in (threading.Thread.join, Future.result, Future.exception)]
_LOOK = 0.2
"""Seconds between two looks at what the thread whose turn it is waits for."""


class Turn:
    """A lock that its thread may take again; of the others, one whose end its holder waits for is refused."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._lock = threading.RLock()
        self._holder = self._taken = 0

    def __enter__(self) -> None:
        while not self._lock.acquire(timeout=_LOOK):
            if _waits_for(self._holder, threading.get_ident()):
                raise GuidanceError(
                    f"{self.what} is in the middle of a call that waits for this thread, and one call at a time can be "
                    "made of it: have the thread call a copy of the pipeline (copy.copy, with a scheduler of its own), "
                    "or wait for it after the call"
                )
        self._holder, self._taken = threading.get_ident(), self._taken + 1

    def __exit__(self, *exception: object) -> None:
        self._taken -= 1
        self._holder = self._holder if self._taken else 0
        self._lock.release()


def _waits_for(thread: int, other: int) -> bool:
    """Whether a thread cannot go on before another one has come to its end, or to that of what it works at."""
    frames, seen = sys._current_frames(), set[int]()
    while thread in frames and thread not in seen:
        seen.add(thread)
        waited = _waited(frames[thread], frames)
        if waited == other:
            return True
        thread = waited
    return False


def _waited(frame: FrameType | None, frames: dict[int, FrameType]) -> int:
    """The thread that a frame waits for, without a limit of time; 0: none that can be told."""
    while frame is not None:
        if frame.f_code in _WAITS and frame.f_locals.get("timeout") is None:
            awaited = frame.f_locals.get("self")
            if isinstance(awaited, threading.Thread):
                return awaited.ident or 0
            return next((each for each, top in frames.items() if _works_at(top, awaited)), 0)
        frame = frame.f_back
    return 0


def _works_at(frame: FrameType | None, future: object) -> bool:
    """Whether a thread of an executor is at what comes to this future."""
    while frame is not None:
        if frame.f_code.co_name == "run" and getattr(frame.f_locals.get("self"), "future", None) is future:
            return True
        frame = frame.f_back
    return False
