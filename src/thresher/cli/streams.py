"""Standard streams without surprises: closed, full, given up by their reader, or of an encoding without the text's
characters, they end a command in one line or not at all.
"""

import contextlib
import io
import os
import sys
from typing import Any

from thresher.errors import StorageError


class ReaderGoneError(Exception):
    """Who read our output went away. Not a BrokenPipeError: rich would answer that with an exit of its own."""


class _Output(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise ReaderGoneError from None
        except OSError as error:
            raise StorageError(f"standard output: {error.strerror}") from error


class _Remarks(io.FileIO):
    def write(self, data: Any) -> int:
        with contextlib.suppress(OSError):  # a remark that cannot be made is no reason to stop
            return super().write(data)
        return memoryview(data).nbytes


def prepare_streams() -> None:
    """Put our own streams into `sys`, for a process of the command line.

    The number of a closed stream is taken, as else the next file opened would get it, and with it what libraries print.
    """
    for number, flags in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):  # the wrong way: closed stays closed
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
    sys.stdout = _text(_Output(1, "w", closefd=False), sys.stdout)
    sys.stderr = _text(_Remarks(2, "w", closefd=False), sys.stderr)


def release_stdout() -> None:
    """Write what is still buffered; let it go where that is impossible, as Python would try again at its end."""
    try:
        sys.stdout.flush()
    except (ReaderGoneError, StorageError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _text(raw: io.FileIO, before: Any) -> io.TextIOWrapper:
    encoding = before.encoding if before else "utf-8"
    interactive = raw.isatty() or isinstance(raw, _Remarks)
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=interactive)
