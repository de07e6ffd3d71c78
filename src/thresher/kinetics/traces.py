"""Traces: what a model answered how often to which questions, and how long the answers were.

Our own format is JSON lines (docs/kinetics.md): the first line {"traces": 1, "settings": {...}} says model, method,
task and max_tokens; then every line is a sample.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thresher.errors import TraceError, UsageError
from thresher.kinetics.law import parse_reading
from thresher.machine.cost import ModelShape

MOST_TOKENS = 1 << 40


@dataclass(frozen=True)
class Sample:
    """One answer. length: tokens generated; score: 0 to 1; ended: by itself, and not at the cap."""

    length: float
    score: float
    answer: str | None = None
    ended: bool = True


@dataclass(frozen=True)
class Question:
    """prompt: its tokens, None where nobody said."""

    key: str
    gold: str
    samples: tuple[Sample, ...]
    prompt: float | None = None

    @property
    def correct(self) -> float:
        """How many samples are right, by their scores."""
        return sum(s.score for s in self.samples)

    @property
    def lengths(self) -> list[float]:
        return [s.length for s in self.samples]


@dataclass(frozen=True)
class Trace:
    """Samples of one model that read its cache by one method. method: as `parse_reading` takes it; cap: most tokens of
    an answer; shape: of the model, where the file has it."""

    model: str
    method: str
    task: str
    cap: int
    questions: tuple[Question, ...]
    source: str = ""
    shape: ModelShape | None = None

    @property
    def samples(self) -> int:
        """Of every question at least."""
        return min(len(q.samples) for q in self.questions)


def sample_of(entry: dict[str, Any], count_tokens: Callable[[str], int] | None = None) -> tuple[str, str, Sample]:
    """Question, gold answer and sample of a line of our own format. Raises KeyError for a field that is missing and
    ValueError for one that makes no sense, named."""
    question, gold = str(entry["question"]), str(entry["gold"])
    length = entry.get("length")
    if length is None and isinstance(entry.get("text"), str) and count_tokens:
        length = count_tokens(entry["text"])
    if length is None:
        raise KeyError("length")
    answer = entry.get("answer")
    return (
        question,
        gold,
        Sample(
            number_between("length", length, 0, MOST_TOKENS),
            number_between("score", entry["score"], 0, 1),
            None if answer is None else str(answer),
            bool(entry.get("ended", True)),
        ),
    )


def number_between(name: str, value: Any, low: float, high: float) -> float:
    """Raises ValueError that names it."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}, and must be a number from {low} to {high}")
    return value


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered lines that hold something. Raises TraceError."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError):
                    value = None
                if not isinstance(value, dict):
                    raise TraceError(f"{path}, line {number}: not a JSON object")
                yield number, value
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror}") from None


def read_own(path: Path, count_tokens: Callable[[str], int] | None = None) -> Trace:
    """A file of our own format. count_tokens: of a text, where lines do not state lengths. Raises TraceError that names
    the line."""
    lines = json_lines(path)
    _, header = next(lines)
    settings = header.get("settings")
    if header["traces"] != 1 or not isinstance(settings, dict):
        raise TraceError(f"{path}, line 1: not traces of version 1 with their settings")
    if missing := [name for name in ("model", "method", "task", "max_tokens") if name not in settings]:
        raise TraceError(f"{path}, line 1: the settings have no {missing[0]}")
    found: dict[str, tuple[str, float | None, dict[int, Sample]]] = {}
    for number, entry in lines:
        try:
            question, gold, sample = sample_of(entry, count_tokens)
            for name in ("model", "method"):
                if entry.get(name, settings[name]) != settings[name]:
                    raise ValueError(f"{name} is {entry[name]!r}, and the file is of {settings[name]!r}")
            prompt = entry.get("prompt", settings.get("prompt"))
            prompt = None if prompt is None else number_between("prompt", prompt, 0, MOST_TOKENS)
            known = found.setdefault(question, (gold, prompt, {}))
            index = entry.get("sample", len(known[2]))
            if index in known[2]:
                raise ValueError(f"sample {index} of question {question} is there twice")
            if gold != known[0]:
                raise ValueError(f"gold is {gold!r}, and was {known[0]!r}")
            known[2][index] = sample
        except KeyError as error:
            raise TraceError(f"{path}, line {number}: no {error.args[0]}{_hint(error.args[0])}") from None
        except (TypeError, ValueError) as error:
            raise TraceError(f"{path}, line {number}: {error}") from None
    questions = tuple(Question(q, gold, tuple(s.values()), prompt) for q, (gold, prompt, s) in found.items())
    method = str(settings["method"])
    try:
        cap = int(number_between("max_tokens", settings["max_tokens"], 1, MOST_TOKENS))
    except ValueError as error:
        raise TraceError(f"{path}, line 1: {error}") from None
    shape = _shape(path, settings.get("shape"))
    return checked(Trace(str(settings["model"]), method, str(settings["task"]), cap, questions, str(path), shape))


def _shape(path: Path, stated: Any) -> ModelShape | None:
    """Of the settings: numbers above 0 by name; nothing where they have none."""
    if not stated:
        return None
    names = ("layers", "q_heads", "kv_heads", "head_dim", "weight_bytes", "weight_count", "value_bytes")
    try:
        values = {name: number_between(name, stated[name], 1, 1 << 50) for name in names}
        windowed = tuple((int(n), int(w)) for n, w in stated.get("windowed", ()) if n > 0 and w > 0)
        return ModelShape(**values, windowed=windowed)  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError) as error:
        raise TraceError(f"{path}, line 1: the shape of the model makes no sense: {error}") from None


def _hint(field: str) -> str:
    return "; name a tokenizer to count the tokens of the text" if field == "length" else ""


def checked(trace: Trace) -> Trace:
    """Raises TraceError if it has no samples or a method that nobody knows."""
    if not trace.questions:
        raise TraceError(f"{trace.source}: no samples")
    try:
        parse_reading(trace.method)
    except UsageError as error:
        raise TraceError(f"{trace.source}: {error}") from None
    return trace
