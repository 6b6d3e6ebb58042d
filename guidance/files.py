"""Files that are whole or not there at all."""

import os
from pathlib import Path


def write(path: Path, content: bytes) -> None:
    """Writes `content` to `path`; a kill in the middle leaves what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
