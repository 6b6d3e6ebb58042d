"""Turns with what one thread at a time may use; refuses a thread that would wait forever."""

import sys
import threading
from concurrent.futures import Future
from types import FrameType

from diffusers_guidance.errors import GuidanceError

_WAITS = [each.__code__ for each in (threading.Thread.join, Future.result, Future.exception)]
_LOOK = 0.2
"""Seconds between two checks of what the holding thread waits for."""


class Turn:
    """A lock that its thread may take again; it refuses a thread that the holder waits for."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._lock = threading.RLock()
        self._holder = self._taken = 0

    def __enter__(self) -> None:
        while not self._lock.acquire(timeout=_LOOK):
            if _waits_for(self._holder, threading.get_ident()):
                raise GuidanceError(
                    f"{self.what} is in the middle of a call that waits for this thread, and can run only one call at "
                    "a time: let the thread call a copy of the pipeline (copy.copy, with its own scheduler), "
                    "or wait for the thread after the call"
                )
        self._holder, self._taken = threading.get_ident(), self._taken + 1

    def __exit__(self, *exception: object) -> None:
        self._taken -= 1
        self._holder = self._holder if self._taken else 0
        self._lock.release()


def _waits_for(thread: int, other: int) -> bool:
    """Whether a thread waits for another one's end, or for the end of its work."""
    frames, seen = sys._current_frames(), set[int]()
    while thread in frames and thread not in seen:
        seen.add(thread)
        waited = _waited(frames[thread], frames)
        if waited == other:
            return True
        thread = waited
    return False


def _waited(frame: FrameType | None, frames: dict[int, FrameType]) -> int:
    """The thread that a frame waits for without a timeout; 0 if none is known."""
    while frame is not None:
        if frame.f_code in _WAITS and frame.f_locals.get("timeout") is None:
            awaited = frame.f_locals.get("self")
            if isinstance(awaited, threading.Thread):
                return awaited.ident or 0
            return next((each for each, top in frames.items() if _works_at(top, awaited)), 0)
        frame = frame.f_back
    return 0


def _works_at(frame: FrameType | None, future: object) -> bool:
    """Whether a thread of an executor works on this future."""
    while frame is not None:
        if frame.f_code.co_name == "run" and getattr(frame.f_locals.get("self"), "future", None) is future:
            return True
        frame = frame.f_back
    return False
