"""What traces say: coverage, majority votes, and how sure both are."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from thresher.errors import UsageError
from thresher.evaluation.statistics import Interval
from thresher.kinetics.traces import Question, Sample, Trace

Floats = NDArray[np.float64]


def coverage(n: int, correct: float, k: int) -> float:
    """The chance that k of n samples have a right one: 1 - C(n - c, k) / C(n, k), pass@k. A correct that is no whole
    number, of scores between 0 and 1, is interpolated. Raises UsageError if there are not k samples."""
    if not 1 <= k <= n:
        raise UsageError(f"pass@{k}: there are {n} samples of a question")
    if not 0 <= correct <= n:
        raise UsageError(f"{correct} of {n} samples cannot be right")
    whole = int(correct)
    if whole != correct:
        low, high = coverage(n, whole, k), coverage(n, whole + 1, k)
        return low + (correct - whole) * (high - low)
    miss = 1.0
    for i in range(k):
        miss *= max(0.0, (n - whole - i) / (n - i))
    return 1 - miss


def majority(answers: Sequence[str | None], gold: str | None, k: int, right: Sequence[float] | None = None) -> float:
    """The chance that the most frequent answer of k of these is right, over all choices of k; of answers that are as
    frequent each is as likely. None, no answer, has no vote. right: scores of the answers, by which equal answers are
    right or not in place of comparing them with `gold`.

    Exact: for a right answer that is taken t times, the choices in which no other answer is taken more often are
    counted one answer after another. Raises UsageError if there are not k.
    """
    n = len(answers)
    if not 1 <= k <= n:
        raise UsageError(f"majority of {k}: there are {n} answers")
    counts = Counter(a for a in answers if a is not None)
    is_right = {a: a == gold for a in counts}
    if right is not None:
        is_right = {a: bool(s) for a, s in zip(answers, right, strict=True) if a is not None}
    silent = n - sum(counts.values())
    total = 0.0
    for answer, count in counts.items():
        if is_right[answer]:
            others = [c for a, c in counts.items() if a != answer]
            total += sum(_wins(count, taken, others, silent, k) for taken in range(1, min(count, k) + 1))
    return total / _choose(n, k)


def _wins(count: int, taken: int, others: list[int], silent: int, k: int) -> float:
    """Choices of k in which an answer is taken so often and wins, each by its share of the ties: ways[j][m] are those
    of m among the other answers, j of which are taken just as often and none more often."""
    left = k - taken
    ways = np.zeros((len(others) + 1, left + 1))
    ways[0, 0] = 1
    for other in others:
        grown = np.zeros_like(ways)
        for m in range(min(other, taken, left) + 1):
            tie = int(m == taken)
            part = ways[: ways.shape[0] - tie, : left + 1 - m] * _choose(other, m)
            grown[tie:, m:] += part
        ways = grown
    shares = 1 / (1 + np.arange(len(others) + 1))
    rest = np.array([_choose(silent, left - m) for m in range(left + 1)])
    return _choose(count, taken) * float(shares @ (ways @ rest))


def _choose(n: int, k: int) -> float:
    if not 0 <= k <= n:
        return 0.0
    out = 1.0
    for i in range(min(k, n - k)):
        out *= (n - i) / (i + 1)
    return round(out) if out < 2**53 else out


@dataclass(frozen=True)
class Accuracy:
    """Of k samples: a right one among them (the best of k by a perfect verifier), and the majority's answer, None where
    answers are not known. Intervals: 95 %, over questions and the samples of each."""

    samples: int
    coverage: Interval
    majority: Interval | None


def accuracies(trace: Trace, ks: Sequence[int], resamples: int = 1000, seed: int = 0) -> list[Accuracy]:
    """Over the questions of a trace. Raises UsageError if a question has fewer samples than one of ks."""
    known = all(s.answer is not None or s.score == 0 for q in trace.questions for s in q.samples)
    found = []
    for k in ks:
        by_coverage, by_majority = coverage_interval(trace.questions, k, resamples, seed), None
        if known:
            by_majority = majority_interval(trace.questions, k, min(resamples, 200), seed)
        found.append(Accuracy(k, by_coverage, by_majority))
    return found


def coverage_interval(questions: Sequence[Question], k: int, resamples: int = 1000, seed: int = 0) -> Interval:
    """pass@k over questions."""
    mean = float(np.mean([coverage(len(q.samples), q.correct, k) for q in questions]))
    rng = np.random.default_rng(seed)
    n = np.array([len(q.samples) for q in questions])
    c = np.array([q.correct for q in questions])  # a sample drawn again is right with the mean of the scores
    chosen = rng.integers(0, len(n), (resamples, len(n)))
    drawn = rng.binomial(n[chosen], c[chosen] / n[chosen])
    tables = {size: np.array([coverage(size, i, k) for i in range(size + 1)]) for size in set(n.tolist())}
    means = [
        np.mean([tables[size][i] for size, i in zip(n[row], got, strict=True)])
        for row, got in zip(chosen, drawn, strict=True)
    ]
    return _interval(mean, np.array(means))


def majority_interval(questions: Sequence[Question], k: int, resamples: int = 200, seed: int = 0) -> Interval:
    """The majority's accuracy over questions whose answers are known; answers that are not have no vote."""
    mean = float(np.mean([_majority(q.samples, k) for q in questions]))
    return _interval(mean, _resampled(questions, partial(_majority, k=k), resamples, seed))


def _majority(samples: Sequence[Sample], k: int) -> float:
    return majority([s.answer for s in samples], None, k, [s.score for s in samples])


def _resampled(
    questions: Sequence[Question], of: Callable[[Sequence[Sample]], float], resamples: int, seed: int
) -> Floats:
    """The mean over questions drawn again, of samples drawn again."""
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(resamples):
        values = []
        for i in rng.integers(0, len(questions), len(questions)):
            samples = questions[i].samples
            drawn = [samples[j] for j in rng.integers(0, len(samples), len(samples))]
            values.append(of(drawn))
        means.append(np.mean(values))
    return np.array(means)


def _interval(mean: float, resampled: Floats) -> Interval:
    """Around the estimate: where k is near the number of samples, those drawn again have a right one less often, as one
    that is drawn twice counts once."""
    low, high = np.clip(np.quantile(resampled, [0.025, 0.975]) + mean - resampled.mean(), 0, 1)
    return Interval(mean, float(low), float(high))


@dataclass(frozen=True)
class Lengths:
    """How long the answers of a trace are, in tokens. unended: the share that came to the cap."""

    mean: float
    median: float
    ninetieth: float
    longest: float
    unended: float


def lengths(trace: Trace) -> Lengths:
    samples = [s for q in trace.questions for s in q.samples]
    values = np.array([s.length for s in samples])
    unended = float(np.mean([not s.ended for s in samples]))
    median, ninetieth = np.quantile(values, [0.5, 0.9])
    return Lengths(float(values.mean()), float(median), float(ninetieth), float(values.max()), unended)
