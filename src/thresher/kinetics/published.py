"""What was published with Kinetics: generations (JSON lines, first line metadata) and result tables (CSV).

Names of files say what they are of: `aime24_qwen3-1-7b_local0_topk256`.
"""

import csv
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from thresher.errors import TraceError
from thresher.kinetics.traces import (
    MOST_TOKENS,
    Question,
    Sample,
    Trace,
    checked,
    json_lines,
    number_between,
    read_own,
)
from thresher.machine.shapes import DECODERS

_NAME = re.compile(
    r"(?P<task>[a-z0-9]+)_(?P<model>[a-z0-9-]+)_"
    r"(?P<method>dense|local(?P<local>\d+)_(topk(?P<topk>\d+)|block(?P<block>\d+)_blocktopk(?P<blocks>\d+)))"
    r"(?P<copy>_\d+)?(?P<table>_numtrials_tradeoff)?"
)


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
    first = next(json_lines(path), (0, {}))[1]
    if "traces" in first:
        return read_own(path, count_tokens)
    return _published(path, count_tokens)


def _published(path: Path, count_tokens: Callable[[str], int] | None) -> Trace:
    named = _parse_name(path)
    lines = json_lines(path)
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
            score = number_between("score", entry["score"], 0, 100) / 100
            known = found.setdefault(str(entry["query"]), (str(gold), []))
        except KeyError as error:
            raise TraceError(f"{path}, line {number}: no {error.args[0]}") from None
        except ValueError as error:
            raise TraceError(f"{path}, line {number}: {error}") from None
        known[1].append(Sample(count_tokens(text), score))
    questions = tuple(Question(q, gold, tuple(samples)) for q, (gold, samples) in found.items())
    cap = max((s.length for q in questions for s in q.samples), default=0)
    return checked(Trace(_model_of(named), method, named["task"], int(cap), questions, str(path)))


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
        or not all(type(n) is int and 0 <= n <= MOST_TOKENS for n in lengths)
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
    ones are right it does not say: the first ones are marked. Raises TraceError without rows of one sample."""
    questions = []
    for row in (r for r in table.rows if r.samples == 1):
        n = len(row.lengths)
        correct = round(row.coverage * n)
        samples = tuple(Sample(length, float(i < correct)) for i, length in enumerate(row.lengths))
        questions.append(Question(row.question, row.gold, samples, prompt_of(row)))
    if not questions:
        raise TraceError(f"{table.source}: no rows of one sample, by which it is known how many are right")
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
