"""Reads text files; every error names the file, and says what to do."""

import errno
from pathlib import Path


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        ValueError: it has another encoding, or is not text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None


def read_lines(file: Path) -> list[str]:
    """The lines of a file that are neither empty nor comments.

    Raises:
        ValueError: there are none.
    """
    lines = (line.strip() for line in read_text(file).splitlines())
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise ValueError(f"{file} holds no prompt; write one a line")
    return found


def sentence(error: OSError) -> str:
    """Which file is wrong, why, and what to do."""
    if error.errno is None or not error.filename:
        return error.strerror or str(error)
    said = {
        errno.ENOENT: "there is no such file or folder",
        errno.EEXIST: "this is a file where a folder is wanted: choose another",
        errno.ENOTDIR: "a part of this path is a file where a folder is wanted: choose another",
        errno.EISDIR: "this is a folder where a file is wanted",
        errno.EACCES: "this may not be read or written by you",
        errno.EPERM: "this may not be read or written by you",
        errno.EROFS: "this cannot be written: the file system is read-only",
        errno.ENOSPC: "there is no room left on the disk for this: free some",
        errno.EDQUOT: "your share of the disk is full: free some",
        errno.EFBIG: "this is larger than a file may be here (ulimit -f): allow more",
    }
    return f"{error.filename}: {said.get(error.errno, error.strerror)}"
