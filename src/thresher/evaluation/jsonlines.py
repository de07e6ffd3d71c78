"""A file of one JSON object a line that survives a kill: only appended to; its first line says the settings."""

import fcntl
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from thresher.errors import StorageError, UsageError

_FORMAT = 1


class JsonLines:
    """Entries are given to `read` when the file is opened, and added with `append`; without a path nothing is kept.

    kind: the key of the first line; name: what such a file is, for messages; option: what chooses another file.
    Whatever changes an entry belongs into `settings`: a file that was begun with other ones is refused. A last line
    that was cut when a run was killed is dropped.

    Raises UsageError if the file is something else, has other settings, or `read` raises KeyError, TypeError or
    ValueError for a line; StorageError if it cannot be written or another run is writing it.
    """

    def __init__(
        self,
        path: Path | None,
        kind: str,
        name: str,
        option: str,
        settings: Mapping[str, Any],
        read: Callable[[dict[str, Any]], None],
    ) -> None:
        self.path = path
        self._kind, self._name, self._option = kind, name, option
        self._file: int | None = None
        if path is None:
            return
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise StorageError(f"{path}: cannot be written: {error.strerror}") from error
        try:
            as_read: dict[str, Any] = json.loads(json.dumps(dict(settings)))  # a tuple is a list in the file
            self._open(path, self._file, as_read, read)
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path, file: int, settings: dict[str, Any], read: Callable[[dict[str, Any]], None]) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StorageError(
                f"{path}: another run is writing it; wait for it or give another {self._option}"
            ) from None
        data, begin = path.read_bytes(), b'{"%s"' % self._kind.encode()
        whole = data[: data.rfind(b"\n") + 1]
        lines = whole.split(b"\n")[:-1]
        if not data.startswith(begin) and not begin.startswith(data):
            raise UsageError(f"{path} is not {self._name}; give another {self._option}")
        if not lines:
            os.ftruncate(file, 0)
            self.append({self._kind: _FORMAT, "settings": settings})
            return
        header = self._parsed(lines[0], 1)
        if header.get(self._kind) != _FORMAT:
            raise UsageError(f"{path} is not {self._name}, or of another version; give another {self._option}")
        begun = header.get("settings", {})
        differ = [name for name in sorted({*begun, *settings}) if begun.get(name) != settings.get(name)]
        if differ:
            was = ", ".join(f"{name} {begun.get(name)!r} and now {settings.get(name)!r}" for name in differ)
            raise UsageError(f"{path} was begun with other settings ({was}); delete it or give another {self._option}")
        for number, line in enumerate(lines[1:], 2):
            entry = self._parsed(line, number)
            try:
                read(entry)
            except (KeyError, TypeError, ValueError):
                raise self._no_entry(number) from None
        os.ftruncate(file, len(whole))  # only when all else was understood: what is not ours is not cut

    def append(self, entry: Mapping[str, Any]) -> None:
        """It is in the file when this returns. Raises StorageError."""
        if self._file is None:
            return
        data = (json.dumps(entry, ensure_ascii=False) + "\n").encode()
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be written: {error.strerror}") from error

    def _parsed(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise self._no_entry(number)
        return value

    def _no_entry(self, number: int) -> UsageError:
        return UsageError(f"{self.path}, line {number}: not a result; delete the file and start anew")

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
