"""What commands say: results on stdout, everything else on stderr; JSON for machines."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from thresher.errors import StorageError, UsageError
from thresher.files import replaced_text

STDOUT = ("-", "/dev/stdout")

stderr = Console(stderr=True, highlight=False)


def one_line(text: object) -> Text:
    """A path or message as it is, never as markup; what cannot be printed (line ends, bytes of no encoding) escaped."""
    shown = str(text)
    return Text(shown if shown.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in shown))


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def say(message: str, style: str = "dim") -> None:
    """A remark on stderr."""
    text = one_line(message)
    text.style = style
    stderr.print(text, soft_wrap=True)


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.0f} {self._unit}/s")


@contextmanager
def progress_bar(label: str, unit: str = "tokens") -> Iterator[Callable[[int, int], None]]:
    """A bar with rate and time left, fed with (done, total)."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), _Rate(unit))
    with Progress(*columns, TimeRemainingColumn(), console=stderr, transient=True) as progress:
        task = progress.add_task(one_line(label).plain, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def write_json(path: Path | None, value: Any) -> None:
    """To a file (whole or not at all), a pipe, a terminal or, for `-`, to stdout. ASCII, so that every path and
    encoding will do. Raises StorageError."""
    text = _as_json(value)
    if path is None:
        return
    if str(path) in STDOUT:
        sys.stdout.write(text)
        return
    check_json_target(path)
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """To a file (whole or not at all) or a pipe. Raises StorageError."""
    try:
        if _is_stream(path):
            path.write_text(text)
        else:
            replaced_text(path, text)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror}") from error


def check_json_target(path: Path) -> None:
    """Raises StorageError unless a file may get this name: only JSON as `write_json` writes it is ever replaced."""
    if str(path) in STDOUT or not os.path.lexists(path) or _is_stream(path):
        return
    if path.is_file() and not path.is_symlink():
        try:
            with path.open("rb") as file:
                begin = file.read(1)
                if not begin or (begin in b"[{" and _is_ours(begin + file.read())):
                    return
        except OSError as error:
            raise StorageError(f"{path}: cannot be read: {error.strerror}") from error
    raise StorageError(f"{path} exists and is not JSON that Thresher wrote; give another name or remove it")


def _is_ours(data: bytes) -> bool:
    try:
        return _as_json(json.loads(data)).encode() == data
    except (ValueError, RecursionError):
        return False


def _as_json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def _is_stream(path: Path) -> bool:
    """A pipe or terminal, which is written to and not replaced."""
    return path.is_fifo() or path.is_char_device()


def read_text(path: Path, most_bytes: int) -> str:
    """A UTF-8 text file without its byte order mark, `-` for stdin.

    UsageError if it is missing, empty, too large or not UTF-8.
    """
    name = "standard input" if str(path) == "-" else str(path)
    try:
        if str(path) == "-":
            data = sys.stdin.buffer.read(most_bytes + 1)
        else:
            with path.open("rb") as file:
                data = file.read(most_bytes + 1)
    except FileNotFoundError:
        raise UsageError(f"{name}: no such file") from None
    except OSError as error:
        raise UsageError(f"{name}: {error.strerror}") from error
    if len(data) > most_bytes:
        raise UsageError(f"{name} is larger than {most_bytes / 2**20:.0f} MiB, more than this model can read")
    try:
        text = data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8 text (byte {error.start}); convert it, e.g. with iconv") from None
    if not text.strip():
        raise UsageError(f"{name} is empty; give a text with at least one word")
    return text


def stdin_lines() -> Iterator[str]:
    """Lines of stdin that hold something, as they come. UsageError if one is not UTF-8 or stdin is closed."""
    number = 0
    while True:
        number += 1
        try:
            line = sys.stdin.buffer.readline()
            text = line.decode().strip()
        except UnicodeDecodeError:
            raise UsageError(f"standard input, line {number}: not UTF-8 text") from None
        except OSError as error:
            raise UsageError(f"standard input: {error.strerror}") from error
        if not line:
            return
        if text:
            yield text
