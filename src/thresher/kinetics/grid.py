"""Every configuration on every question: what it costs, and how often it is right."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from thresher.attention.base import AttentionMethod
from thresher.errors import UsageError
from thresher.kinetics.analysis import Floats, coverage
from thresher.kinetics.law import PAPER, Reading, Terms, as_oracle, parse_reading, run_cost
from thresher.kinetics.published import Table
from thresher.kinetics.traces import Question, Trace
from thresher.machine.cost import ModelShape


@dataclass(frozen=True)
class Config:
    """What is chosen: model, how the cache is read, most tokens of an answer, number of samples."""

    model: str
    method: str
    cap: int
    samples: int

    @property
    def budget(self) -> int | None:
        """Tokens of the cache that are read, None where all are."""
        reading = parse_reading(self.method)
        budget = getattr(reading, "budget", None)
        return int(budget) if budget else None


@dataclass(frozen=True)
class Grid:
    """Every configuration on every question. accuracy, compute, memory: `[configs, questions]`; costs in Tera-eFLOPs.
    trials, correct: how many samples there are, and how many of them are right; length: their mean length."""

    configs: tuple[Config, ...]
    questions: tuple[str, ...]
    accuracy: Floats
    compute: Floats
    memory: Floats
    trials: Floats
    correct: Floats
    length: Floats

    def where(self, chosen: Callable[[Config], bool]) -> "Grid":
        """The configurations that are chosen, maybe none."""
        rows = [i for i, config in enumerate(self.configs) if chosen(config)]
        arrays = (self.accuracy, self.compute, self.memory, self.trials, self.correct, self.length)
        return Grid(tuple(self.configs[i] for i in rows), self.questions, *(a[rows] for a in arrays))

    def cost(self, axis: str) -> Floats:
        """eflops: both; flops: arithmetic alone, the law before Kinetics. Raises UsageError for another axis."""
        if axis not in ("eflops", "flops"):
            raise UsageError(f"axis '{axis}': choose eflops or flops")
        return self.compute + self.memory if axis == "eflops" else self.compute

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(c.model for c in self.configs))


@dataclass(frozen=True)
class Cell:
    """A configuration on a question: what `Grid` holds arrays of."""

    config: Config
    question: str
    accuracy: float
    compute: float
    memory: float
    trials: float
    correct: float
    length: float


def grid_of(cells: Iterable[Cell]) -> Grid:
    """Raises UsageError where a configuration lacks a question that another has, or the same is there twice."""
    by_config: dict[Config, dict[str, Cell]] = {}
    for cell in cells:
        of = by_config.setdefault(cell.config, {})
        if cell.question in of:
            raise UsageError(f"{cell.config.model} {cell.config.method}: question {cell.question} is there twice")
        of[cell.question] = cell
    if not by_config:
        raise UsageError("a frontier needs at least one table or trace")
    questions = tuple(dict.fromkeys(q for of in by_config.values() for q in of))
    for config, of in by_config.items():
        if missing := [q for q in questions if q not in of]:
            raise UsageError(f"{config.model} {config.method} has no question {missing[0]!r}, which others have")
    arrays = (
        np.array([[getattr(of[q], name) for q in questions] for of in by_config.values()], dtype=np.float64)
        for name in ("accuracy", "compute", "memory", "trials", "correct", "length")
    )
    return Grid(tuple(by_config), questions, *arrays)


def table_cells(table: Table) -> Iterable[Cell]:
    """As the table states them, costs included. It states no cap: that is the next multiple of 2,048 of the longest
    answer."""
    cap = -(-max(n for row in table.rows for n in row.lengths) // 2048) * 2048
    singles = {row.question: row.coverage for row in table.rows if row.samples == 1}
    for row in table.rows:
        n = len(row.lengths)
        correct = round(singles.get(row.question, np.nan) * n) if row.question in singles else np.nan
        config = Config(table.model, table.method, cap, row.samples)
        mean = float(np.mean(row.lengths))
        yield Cell(config, row.question, row.coverage, row.compute, row.memory, n, correct, mean)


def trace_cells(
    trace: Trace,
    shape: ModelShape,
    intensity: float,
    samples: Sequence[int],
    terms: Terms = PAPER,
    oracle_search: bool = False,
) -> Iterable[Cell]:
    """By the law, for so many samples each. oracle_search: finding the best keys costs our top-k nothing, as the paper
    counts. Raises UsageError if a question has no prompt length or too few samples."""
    for question, prompt, reading in _priced(trace, oracle_search):
        n = len(question.samples)
        for k in samples:
            cost = run_cost(shape, reading, prompt, question.lengths, k, terms).total
            yield Cell(
                Config(trace.model, trace.method, trace.cap, k),
                question.key,
                coverage(n, question.correct, k),
                cost.flops * 1e-12,
                intensity * cost.bytes * 1e-12,
                n,
                question.correct,
                float(np.mean(question.lengths)),
            )


def sample_costs(trace: Trace, shape: ModelShape, intensity: float, oracle_search: bool = False) -> Floats:
    """Tera-eFLOPs of every single sample: its cost is as spread out as its length. Raises UsageError if a question has
    no prompt length."""
    found = [
        run_cost(shape, reading, prompt, [length]).eflops(intensity) * 1e-12
        for question, prompt, reading in _priced(trace, oracle_search)
        for length in question.lengths
    ]
    return np.array(found)


def _priced(trace: Trace, oracle_search: bool) -> Iterator[tuple[Question, float, Reading | AttentionMethod]]:
    """Questions with their prompts, and how the cache is read."""
    reading = parse_reading(trace.method)
    reading = as_oracle(reading) if oracle_search else reading
    for question in trace.questions:
        if question.prompt is None:
            raise UsageError(f"{trace.source}: question {question.key!r} has no prompt length")
        yield question, question.prompt, reading
