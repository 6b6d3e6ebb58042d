"""The device of the app: a thread that does one job at a time. It does not know what the jobs are."""

import atexit
import queue
import threading
from collections.abc import Callable, Generator
from typing import Any, TypeVar

R = TypeVar("R")


class Stopped(BaseException):
    """Nobody waits for this work any more. It is not an `Exception`, so that pipelines do not catch it."""


class Device:
    """Runs jobs in its own thread, one at a time, in order of arrival, until the interpreter ends."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="device", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def _work(self) -> None:
        while not self._closed.is_set():
            self._jobs.get()()

    def close(self) -> None:
        """Stops the current job at its next news, drops the others, and waits for the thread.

        If the interpreter ends while the thread is in a kernel, the process aborts.
        """
        self.stop()
        self._thread.join()

    def stop(self) -> None:
        """Does the same as `close`, but does not wait."""
        self._closed.set()
        self._jobs.put(lambda: None)

    def run(self, job: Callable[[Callable[[Any], None]], R]) -> Generator[Any, None, R]:
        """Yields the latest news of `job(tell)`, and returns its result.

        The job calls `tell(news)`, which raises `Stopped` once nobody waits.

        Closing the generator stops the job at its next news. A job that has not begun is dropped.
        """
        news: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        stopped = threading.Event()

        def tell(item: Any) -> None:
            if stopped.is_set() or self._closed.is_set():
                raise Stopped
            news.put(("news", item))

        def work() -> None:
            try:
                if not stopped.is_set():
                    news.put(("result", job(tell)))
            except BaseException as error:  # any error goes to the caller who waits
                news.put(("error", error))

        self._jobs.put(work)
        try:
            while True:
                kind, value = news.get()
                while kind == "news" and not news.empty():
                    kind, value = news.get()
                if kind == "error":
                    raise value
                if kind == "result":
                    return value
                yield value
        finally:
            stopped.set()
