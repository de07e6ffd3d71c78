"""The most accuracy for a cost: the frontiers of Kinetics (arXiv 2506.05333, Algorithms 1 and 2), and honest ones.

The paper's frontier lets an oracle choose a configuration for every question, by the samples that it is scored on.
Beside it: one configuration for all questions, and configurations that are chosen on half of the samples and scored on
the other half.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from thresher.errors import UsageError
from thresher.evaluation.statistics import Interval
from thresher.kinetics.analysis import Floats, coverage
from thresher.kinetics.grid import Config, Grid

NEARLY = 0.999  # of the best accuracy: the cheapest configuration with so much counts as the best one


def costs_between(low: float, high: float, count: int = 100) -> Floats:
    """On a logarithmic scale. Raises UsageError unless 0 < low < high."""
    if not 0 < low < high < np.inf:
        raise UsageError(f"costs from {low} to {high}: give two above 0, the first below the second")
    return np.geomspace(low, high, count)


def oracle(grid: Grid, costs: Floats, axis: str = "eflops") -> Floats:
    """The paper's: for every question the best configuration within the cost, 0 where none is. `[costs]`."""
    reached: Floats = _per_question(grid, costs, axis).mean(axis=1)
    return reached


def _per_question(grid: Grid, costs: Floats, axis: str) -> Floats:
    """`[costs, questions]`."""
    if not grid.configs:
        return np.zeros((len(costs), len(grid.questions)))
    within = grid.cost(axis)[None] <= costs[:, None, None]
    reached: Floats = np.where(within, grid.accuracy[None], 0.0).max(axis=1)
    return reached


def single(grid: Grid, costs: Floats, axis: str = "eflops") -> tuple[Floats, list[Config | None]]:
    """One configuration for all questions, whose mean cost is within the cost; the cheaper of two equals."""
    mean_cost, mean_accuracy = grid.cost(axis).mean(axis=1), grid.accuracy.mean(axis=1)
    found, chosen = np.zeros(len(costs)), list[Config | None]()
    for i, cost in enumerate(costs):
        best = _best(mean_accuracy, mean_cost, cost)
        chosen.append(None if best is None else grid.configs[best])
        found[i] = 0.0 if best is None else mean_accuracy[best]
    return found, chosen


def _best(accuracy: Floats, costs: Floats, most: float) -> int | None:
    within = np.flatnonzero(costs <= most)
    if not len(within):
        return None
    return int(max(within, key=lambda i: (accuracy[i], -costs[i])))


def held_out(grid: Grid, costs: Floats, axis: str = "eflops", splits: int = 100, seed: int = 0) -> Floats:
    """For every question a configuration that is chosen by half of the samples and scored by the other half, mean over
    random halves; only configurations of at most half the samples can be. `[costs]`. Raises UsageError if the grid does
    not say how many samples are right."""
    if np.isnan(grid.correct).any():
        raise UsageError("choosing on half of the samples needs to know how many are right")
    rng = np.random.default_rng(seed)
    half = grid.trials.astype(int) // 2
    ks = np.array([c.samples for c in grid.configs])
    fits = ks[:, None] <= half
    price = np.where(fits, grid.cost(axis), np.inf)
    sources: dict[tuple[str, str, int], int] = {}  # samples are the same for every number of them
    rows = [sources.setdefault((c.model, c.method, c.cap), i) for i, c in enumerate(grid.configs)]
    correct, total = np.rint(grid.correct[rows]).astype(int), grid.trials[rows].astype(int)
    scores = {
        (n, k): np.array([coverage(n, i, k) for i in range(n + 1)])
        for n, k in {(int(h), int(k)) for k, of in zip(ks, half, strict=True) for h in of if k <= h}
    }
    within = price[None] <= costs[:, None, None]
    columns = np.arange(len(grid.questions))
    out = np.zeros(len(costs))
    for _ in range(splits):
        drawn = rng.hypergeometric(correct, total - correct, half)[rows]  # the same half for all of a source
        left = np.minimum(correct - drawn, half)
        chosen_by, scored_by = (_coverages(scores, part, half, ks) for part in (drawn, left))
        rank = chosen_by + 1e-6 * chosen_by.mean(axis=1, keepdims=True)  # of equals the one that is best on the others
        best = np.where(within, rank[None], -np.inf).argmax(axis=1)
        reached = np.where(within.any(axis=1), scored_by[best, columns], 0.0)
        out += reached.mean(axis=1)
    return out / splits


def _coverages(
    scores: dict[tuple[int, int], Floats], correct: NDArray[np.int_], n: NDArray[np.int_], ks: NDArray[np.int_]
) -> Floats:
    out = np.zeros(correct.shape)
    for row, k in enumerate(ks):
        out[row] = [scores[h, k][c] if k <= h else 0.0 for h, c in zip(n[row].tolist(), correct[row], strict=True)]
    return out


@dataclass(frozen=True)
class Frontier:
    """By cost in Tera-eFLOPs: what is reached, and by which model; none where nothing is within the cost."""

    costs: Floats
    accuracy: Floats
    model: tuple[str | None, ...]


def best_models(grid: Grid, costs: Floats, axis: str = "eflops") -> Frontier:
    """The oracle's frontier of every model, and the best of them at every cost; of equals the first in the grid."""
    models = grid.models
    by_model = np.array([oracle(grid.where(lambda c, m=m: c.model == m), costs, axis) for m in models])  # type: ignore[misc]
    best = by_model.argmax(axis=0)
    accuracy = by_model[best, np.arange(len(costs))]
    names = tuple(models[i] if a > 0 else None for i, a in zip(best, accuracy, strict=True))
    return Frontier(costs, accuracy, names)


def oracle_interval(
    grid: Grid, costs: Floats, axis: str = "eflops", resamples: int = 300, seed: int = 0
) -> list[Interval]:
    """95 % of the oracle's frontier over questions drawn again. Samples are not: the oracle chooses by them, and would
    profit from their noise twice."""
    reached = _per_question(grid, costs, axis)
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, reached.shape[1], (resamples, reached.shape[1]))
    means = reached[:, chosen].mean(axis=2)
    bounds = np.quantile(means, [0.025, 0.975], axis=1)
    return [Interval(float(m), float(a), float(b)) for m, a, b in zip(reached.mean(axis=1), *bounds, strict=True)]


@dataclass(frozen=True)
class Growth:
    """How what is best grows with the cost: exponents of cost by least squares, with 95 % intervals over questions.
    2 ** exponent is the factor of a cost twice as high."""

    budget: Interval
    tokens: Interval
    points: int


def growth(grid: Grid, costs: Floats, axis: str = "eflops", resamples: int = 300, seed: int = 0) -> Growth:
    """Of the KV budget and of the tokens generated for a question, in sparse configurations: those of the cheapest
    configuration that is nearly best. A question counts at a cost while more would still gain on it.

    Raises UsageError if there are fewer than two costs with such a question.
    """
    sparse = grid.where(lambda c: c.budget is not None)
    each = range(len(sparse.questions)) if sparse.configs else ()
    points = [p for i in each for p in _growing(sparse, i, costs, axis)]
    if len({p[1] for p in points}) < 2:
        raise UsageError("a fit needs at least two costs at which more would gain on a question, and sparse traces")
    data = np.array(points)
    slopes = _slopes(data)
    rng = np.random.default_rng(seed)
    by_question = [data[data[:, 0] == i] for i in range(len(sparse.questions))]
    again = []
    for _ in range(resamples):
        drawn = np.concatenate([by_question[i] for i in rng.integers(0, len(by_question), len(by_question))])
        if len(set(drawn[:, 1])) > 1:
            again.append(_slopes(drawn))
    bounds = np.quantile(np.array(again), [0.025, 0.975], axis=0)
    budget, tokens = (Interval(float(slopes[i]), float(bounds[0, i]), float(bounds[1, i])) for i in (0, 1))
    return Growth(budget, tokens, len({p[1] for p in points}))


def _growing(grid: Grid, question: int, costs: Floats, axis: str) -> list[tuple[float, float, float, float]]:
    """(question, log cost, log budget, log tokens) at the costs at which more would gain."""
    accuracy, price = grid.accuracy[:, question], grid.cost(axis)[:, question]
    most, found = accuracy.max(), []
    for cost in costs:
        within = price <= cost
        best = accuracy[within].max() if within.any() else 0.0
        if best <= 0 or best >= NEARLY * most:
            continue
        near = np.flatnonzero(within & (accuracy >= NEARLY * best))
        chosen = near[price[near].argmin()]
        config = grid.configs[chosen]
        tokens = config.samples * grid.length[chosen, question]
        found.append((float(question), float(np.log(cost)), float(np.log(config.budget or 1)), float(np.log(tokens))))
    return found


def _slopes(data: Floats) -> Floats:
    """Least squares of the mean over questions at each cost."""
    costs = np.unique(data[:, 1])
    means = np.array([data[data[:, 1] == cost, 2:].mean(axis=0) for cost in costs])
    slopes: Floats = np.polyfit(costs, means, 1)[0]
    return slopes
