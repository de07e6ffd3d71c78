"""Files that are there whole or not at all."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def replaced(path: Path, write: Callable[[Path], T]) -> T:
    """Have `write` make a file under another name, with the same suffix, which gets `path`'s once it is whole. Returns
    what `write` does; if it raises, what was at `path` stays. Raises OSError."""
    part = path.with_name(f".part-{secrets.token_hex(4)}-{path.name}")
    try:
        result = write(part)
        os.replace(part, path)
        return result
    finally:
        part.unlink(missing_ok=True)


def replaced_text(path: Path, text: str) -> None:
    """UTF-8, line ends as they are, and on the disk before it has its name. Raises OSError."""

    def write(part: Path) -> None:
        with part.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    replaced(path, write)
