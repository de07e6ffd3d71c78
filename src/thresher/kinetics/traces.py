"""Traces: what a model answered how often to which questions, and how long the answers were.

Our own format is JSON lines (docs/kinetics.md): the first line {"traces": 1, "settings": {...}} says model, method,
task and max_tokens; then every line is a sample. Also read are the two forms published with Kinetics: generations (JSON
lines, first line metadata) and result tables (CSV), whose names say what they are of.
"""

import csv
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from thresher.errors import TraceError, UsageError
from thresher.kinetics.law import parse_reading
from thresher.machine.cost import ModelShape
from thresher.machine.shapes import DECODERS

_NAME = re.compile(
    r"(?P<task>[a-z0-9]+)_(?P<model>[a-z0-9-]+)_"
    r"(?P<method>dense|local(?P<local>\d+)_(topk(?P<topk>\d+)|block(?P<block>\d+)_blocktopk(?P<blocks>\d+)))"
    r"(?P<copy>_\d+)?(?P<table>_numtrials_tradeoff)?"
)
_MOST_TOKENS = 1 << 40


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


@dataclass(frozen=True)
class Row:
    """A line of a published table: what `samples` answers to a question cost, in Tera-eFLOPs, and reach."""

    question: str
    gold: str
    samples: int
    coverage: float
    compute: float
    memory: float
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Table:
    """A published table. copy: a number that tells it from another one of the same settings; doubt: why its costs are
    not to be believed, or nothing."""

    model: str
    method: str
    task: str
    rows: tuple[Row, ...]
    source: str
    copy: str = ""
    doubt: str = ""


def read_trace(path: Path, count_tokens: Callable[[str], int] | None = None) -> Trace:
    """Our own or a published file of generations. count_tokens: of a text, for files that do not state lengths.

    Raises TraceError that names the line.
    """
    first = next(_json_lines(path), (0, {}))[1]
    if "traces" in first:
        return _own(path, count_tokens)
    return _published(path, count_tokens)


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
            _number("length", length, 0, _MOST_TOKENS),
            _number("score", entry["score"], 0, 1),
            None if answer is None else str(answer),
            bool(entry.get("ended", True)),
        ),
    )


def _number(name: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}, and must be a number from {low} to {high}")
    return value


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
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


def _own(path: Path, count_tokens: Callable[[str], int] | None) -> Trace:
    lines = _json_lines(path)
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
            prompt = None if prompt is None else _number("prompt", prompt, 0, _MOST_TOKENS)
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
        cap = int(_number("max_tokens", settings["max_tokens"], 1, _MOST_TOKENS))
    except ValueError as error:
        raise TraceError(f"{path}, line 1: {error}") from None
    shape = _shape(path, settings.get("shape"))
    return _checked(Trace(str(settings["model"]), method, str(settings["task"]), cap, questions, str(path), shape))


def _shape(path: Path, stated: Any) -> ModelShape | None:
    """Of the settings: numbers above 0 by name; nothing where they have none."""
    if not stated:
        return None
    names = ("layers", "q_heads", "kv_heads", "head_dim", "weight_bytes", "weight_count", "value_bytes")
    try:
        values = {name: _number(name, stated[name], 1, 1 << 50) for name in names}
        windowed = tuple((int(n), int(w)) for n, w in stated.get("windowed", ()) if n > 0 and w > 0)
        return ModelShape(**values, windowed=windowed)  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError) as error:
        raise TraceError(f"{path}, line 1: the shape of the model makes no sense: {error}") from None


def _hint(field: str) -> str:
    return "; name a tokenizer to count the tokens of the text" if field == "length" else ""


def _checked(trace: Trace) -> Trace:
    if not trace.questions:
        raise TraceError(f"{trace.source}: no samples")
    try:
        parse_reading(trace.method)
    except UsageError as error:
        raise TraceError(f"{trace.source}: {error}") from None
    return trace


def _published(path: Path, count_tokens: Callable[[str], int] | None) -> Trace:
    named = _parse_name(path)
    lines = _json_lines(path)
    number, header = next(lines, (1, {}))
    if "prediction" in header:
        raise TraceError(f"{path}, line {number}: a sample, where the first line must say what the samples are of")
    method = _stated_method(path, header) or _method_of(named)
    if method != _method_of(named):
        raise TraceError(f"{path}, line 1: it says {method}, and the name says {_method_of(named)}")
    if count_tokens is None:
        raise TraceError(f"{path}: it has texts without lengths; name a tokenizer to count their tokens")
    found: dict[str, tuple[str, list[Sample]]] = {}
    for number, entry in lines:
        gold, text = entry.get("choices", entry.get("choice")), entry.get("prediction")
        gold, text = (x[0] if isinstance(x, list) and x else x for x in (gold, text))
        try:
            if not isinstance(text, str) or gold is None:
                raise KeyError("prediction" if gold is not None else "choices")
            score = _number("score", entry["score"], 0, 100) / 100
            known = found.setdefault(str(entry["query"]), (str(gold), []))
        except KeyError as error:
            raise TraceError(f"{path}, line {number}: no {error.args[0]}") from None
        except ValueError as error:
            raise TraceError(f"{path}, line {number}: {error}") from None
        known[1].append(Sample(count_tokens(text), score))
    questions = tuple(Question(q, gold, tuple(samples)) for q, (gold, samples) in found.items())
    cap = max((s.length for q in questions for s in q.samples), default=0)
    return _checked(Trace(_model_of(named), method, named["task"], int(cap), questions, str(path)))


def _stated_method(path: Path, header: dict[str, Any]) -> str | None:
    try:
        if (blocks := header.get("attn_block_topk")) and (size := header.get("attn_block_size")):
            return f"block{int(size)}x{int(blocks)}"
        if topk := header.get("attn_topk"):
            return f"topk{int(topk) + int(header.get('attn_local') or 0)}"
    except (TypeError, ValueError):
        raise TraceError(f"{path}, line 1: budgets must be numbers") from None
    return None


def read_table(path: Path) -> Table:
    """A result table as published: query_id, query, choices, generation_length, trial, coverage, compute_cost,
    memory_cost, total_cost and, of sparse ones, budget. Raises TraceError that names the line."""
    named = _parse_name(path)
    method, rows = _method_of(named), []
    csv.field_size_limit(min(sys.maxsize, 1 << 24))
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            wanted = ("query_id", "choices", "generation_length", "trial", "coverage", "compute_cost", "memory_cost")
            if missing := [name for name in wanted if name not in (reader.fieldnames or ())]:
                raise TraceError(f"{path}, line 1: no column {missing[0]}")
            sparse = "budget" in (reader.fieldnames or ())
            for entry in reader:
                try:
                    row = _row(entry)
                    if sparse and int(entry["budget"]) != _budget_of(named):
                        raise ValueError(f"budget is {entry['budget']}, and the name says {_budget_of(named)}")
                except (ValueError, TypeError, RecursionError) as error:
                    raise TraceError(f"{path}, line {reader.line_num}: {error}") from None
                if row is not None:
                    rows.append(row)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TraceError(f"{path}: {error}") from None
    if not rows:
        raise TraceError(f"{path}: no rows")
    doubt = "" if sparse or method == "dense" else "it has no budget: it was costed as dense"
    return Table(_model_of(named), method, named["task"], tuple(rows), str(path), named["copy"] or "", doubt)


def _row(entry: dict[str, str]) -> Row | None:
    """None where it asks for more samples than there are, as the published code writes such rows without a coverage."""
    samples, lengths = int(entry["trial"]), json.loads(entry["generation_length"])
    if (
        not isinstance(lengths, list)
        or not lengths
        or not all(type(n) is int and 0 <= n <= _MOST_TOKENS for n in lengths)
    ):
        raise ValueError("generation_length is not a list of numbers")
    if samples < 1:
        raise ValueError(f"trial is {samples}")
    if samples > len(lengths):
        if entry["coverage"] in ("", "nan"):
            return None
        raise ValueError(f"{samples} of {len(lengths)} samples are asked for")
    coverage = float(entry["coverage"])
    compute, memory = float(entry["compute_cost"]), float(entry["memory_cost"])
    if not 0 <= coverage <= 1:
        raise ValueError(f"coverage is {coverage}")
    if not (compute > 0 and memory > 0 and math.isfinite(compute + memory)):
        raise ValueError(f"costs are {compute} and {memory}")
    return Row(entry["query_id"], entry["choices"], samples, coverage, compute, memory, tuple(lengths))


def trace_of_table(table: Table, prompt_of: Callable[[Row], float | None]) -> Trace:
    """The samples behind a table: lengths are listed, and how many are right follows from the coverage of one. Which
    ones are right it does not say: the first ones are marked."""
    questions = []
    for row in (r for r in table.rows if r.samples == 1):
        n = len(row.lengths)
        correct = round(row.coverage * n)
        samples = tuple(Sample(length, float(i < correct)) for i, length in enumerate(row.lengths))
        questions.append(Question(row.question, row.gold, samples, prompt_of(row)))
    cap = int(max(s.length for q in questions for s in q.samples))
    ended = tuple(replace(q, samples=tuple(replace(s, ended=s.length < cap) for s in q.samples)) for q in questions)
    return Trace(table.model, table.method, table.task, cap, ended, table.source)


def _parse_name(path: Path) -> dict[str, str]:
    found = _NAME.fullmatch(path.name.removesuffix(path.suffix).lower())
    if not found:
        raise TraceError(
            f"{path}: the name does not say what it is of, as task_model_dense or task_model_local0_topk256"
        )
    return found.groupdict()


def _model_of(named: dict[str, str]) -> str:
    """Names of files have - where names of models have a dot."""
    return next((name for name in DECODERS if name.replace(".", "-") == named["model"]), named["model"])


def _budget_of(named: dict[str, str]) -> int:
    chosen = int(named["topk"] or 0) or int(named["block"] or 0) * int(named["blocks"] or 0)
    return int(named["local"] or 0) + chosen


def _method_of(named: dict[str, str]) -> str:
    if named["method"] == "dense":
        return "dense"
    if named["block"]:
        return f"block{named['block']}x{named['blocks']}"
    return f"topk{_budget_of(named)}"
