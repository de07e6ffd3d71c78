"""Results of an evaluation by key, in a file that survives a kill."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from thresher.evaluation.jsonlines import JsonLines


@dataclass(frozen=True)
class ResultKey:
    """What one result is of. `length`: tokens; `method`: as parse_method reads it; `model`: its fingerprint."""

    task: str
    length: int
    index: int
    seed: int
    method: str
    model: str


class Journal(JsonLines):
    """Results by key. Without a path they are kept in memory only.

    Results that are in the file already are not to be computed again: ask with `get`, add with `put`. Everything else
    that changes a result (the haystack, the number format of the weights) belongs into `settings`. Raises what
    JsonLines does.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self._results: dict[ResultKey, dict[str, Any]] = {}
        super().__init__(path, "journal", "a journal of results", "--journal", settings, self._read)

    def _read(self, entry: dict[str, Any]) -> None:
        self._results[ResultKey(**entry["key"])] = dict(entry["result"])

    @property
    def count(self) -> int:
        """Results it holds."""
        return len(self._results)

    def get(self, key: ResultKey) -> dict[str, Any] | None:
        return self._results.get(key)

    def put(self, key: ResultKey, result: Mapping[str, Any]) -> None:
        """Keep a result; it is in the file when this returns. Raises StorageError."""
        self._results[key] = dict(result)
        self.append({"key": asdict(key), "result": dict(result)})
