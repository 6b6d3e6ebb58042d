"""Files that are whole or not there at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def write(path: Path, content: bytes) -> None:
    """Writes `content` to `path`; if the process is killed meanwhile, or the disk is full, the old file stays."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with about(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(content)
            os.replace(part, path)
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)


def append(path: Path, content: bytes) -> None:
    """Adds `content` to the end of a file, and waits until it is on the disk; of a failed try nothing stays.

    A kill in the middle may leave a part of it.
    """
    with about(path), path.open("ab") as file:
        before = file.tell()
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            with suppress(OSError):
                file.close()  # which tries to write the rest once more
            with suppress(OSError):
                os.truncate(path, before)
            raise


@contextmanager
def about(path: Path) -> Iterator[None]:
    """Makes errors of the system name this file, not its temporary part, and not nothing."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from None
