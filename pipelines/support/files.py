"""Reads text files; every error names the file."""

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
