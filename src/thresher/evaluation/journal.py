"""Results that survive a kill: an append-only file of one JSON object a line, the first of which names the settings."""

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from thresher.errors import StorageError, UsageError

_FORMAT = 1
_BEGIN = b'{"journal"'  # of every file


@dataclass(frozen=True)
class ResultKey:
    """What one result is of. `length`: tokens; `method`: as parse_method reads it; `model`: its fingerprint."""

    task: str
    length: int
    index: int
    seed: int
    method: str
    model: str


class Journal:
    """Results by key. Without a path they are kept in memory only.

    Results that are in the file already are not to be computed again: ask with `get`, add with `put`. Everything else
    that changes a result (the haystack, the number format of the weights) belongs into `settings`: a file that was
    begun with other ones is refused. A last line that was cut when a run was killed is dropped.

    Raises UsageError if the file is something else or has other settings, StorageError if it cannot be written or
    another run is writing it.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._results: dict[ResultKey, dict[str, Any]] = {}
        self._file: int | None = None
        if path is None:
            return
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise StorageError(f"{path}: cannot be written: {error.strerror}") from error
        try:
            self._open(path, self._file, dict(settings))
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path, file: int, settings: dict[str, Any]) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StorageError(f"{path}: another run is writing it; wait for it or give another --journal") from None
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        lines = whole.splitlines()
        if not lines and not data.startswith(_BEGIN) and not _BEGIN.startswith(data):
            raise UsageError(f"{path} is not a journal of results; give another --journal")
        if not lines:
            os.ftruncate(file, 0)
            self._write({"journal": _FORMAT, "settings": settings})
            return
        header = _parsed(path, lines[0], 1)
        if header.get("journal") != _FORMAT:
            raise UsageError(f"{path} is not a journal of results, or of another version; give another --journal")
        begun = header.get("settings", {})
        differ = [name for name in sorted({*begun, *settings}) if begun.get(name) != settings.get(name)]
        if differ:
            was = ", ".join(f"{name} {begun.get(name)!r} and now {settings.get(name)!r}" for name in differ)
            raise UsageError(f"{path} was begun with other settings ({was}); delete it or give another --journal")
        for number, line in enumerate(lines[1:], 2):
            entry = _parsed(path, line, number)
            try:
                self._results[ResultKey(**entry["key"])] = dict(entry["result"])
            except (KeyError, TypeError, ValueError):
                raise UsageError(f"{path}, line {number}: not a result; delete the file and start anew") from None
        os.ftruncate(file, len(whole))  # only when all else was understood: what is not ours is not cut

    @property
    def count(self) -> int:
        """Results it holds."""
        return len(self._results)

    def get(self, key: ResultKey) -> dict[str, Any] | None:
        return self._results.get(key)

    def put(self, key: ResultKey, result: Mapping[str, Any]) -> None:
        """Keep a result; it is in the file when this returns. Raises StorageError."""
        self._results[key] = dict(result)
        self._write({"key": asdict(key), "result": dict(result)})

    def _write(self, entry: dict[str, Any]) -> None:
        if self._file is None:
            return
        data = (json.dumps(entry, ensure_ascii=False) + "\n").encode()
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be written: {error.strerror}") from error

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


def _parsed(path: Path, line: bytes, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UsageError(f"{path}, line {number}: not a result; delete the file and start anew")
    return value
