"""Samples that need not be taken: stop a question when a verifier passed one, or when the answers agree.

Agreement: Adaptive-Consistency (arXiv 2305.11860): with a flat prior on the two leading answers' shares, stop when the
leader is the more likely one with enough confidence.
"""

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from thresher.errors import UsageError
from thresher.kinetics.traces import Sample, Trace

RULES = ("none", "verifier", "majority")


@dataclass(frozen=True)
class Stopping:
    """rule: "verifier", a sample is right; "majority", the answers agree; "none". confidence: of the majority. step:
    samples taken at once before it is asked."""

    rule: str = "none"
    confidence: float = 0.95
    step: int = 4

    def __post_init__(self) -> None:
        """Raises UsageError on a value that makes no sense."""
        if self.rule not in RULES:
            raise UsageError(f"stopping by '{self.rule}': choose from {', '.join(RULES)}")
        if not 0.5 < self.confidence < 1 or self.step < 1:
            raise UsageError(f"confidence {self.confidence}, step {self.step}: give 0.5 to 1, and 1 or more")

    def done(self, samples: Sequence[Sample]) -> bool:
        """Whether no more samples of a question are needed."""
        if self.rule == "verifier":
            return any(s.score >= 1 for s in samples)
        return self.rule == "majority" and leads([s.answer for s in samples]) >= self.confidence


def leads(answers: Sequence[str | None]) -> float:
    """How likely the most frequent answer is the likelier one of the two most frequent: the share above a half of the
    Beta distribution with one more than their counts. Answers that are none have no vote."""
    counts = sorted(Counter(a for a in answers if a is not None).values(), reverse=True)
    if not counts:
        return 0.0
    first, second = counts[0], counts[1] if len(counts) > 1 else 0
    n = first + second + 1  # P(Beta(first + 1, second + 1) > 1/2) = P(Binomial(n, 1/2) <= first)
    return float(sum(math.comb(n, i) for i in range(first + 1)) / 2**n)


@dataclass(frozen=True)
class Saving:
    """What stopping early keeps. samples, tokens: their shares of all; accuracy: with it, and of all samples: the share
    of questions with a right sample (verifier), or whose majority is right."""

    rule: str
    samples: float
    tokens: float
    accuracy: float
    accuracy_of_all: float


def saving(trace: Trace, stopping: Stopping, orders: int = 50, seed: int = 0) -> Saving:
    """Over random orders of the samples that there are."""
    rng = random.Random(seed)
    taken = tokens = right = right_of_all = 0.0
    for question in trace.questions:
        for _ in range(orders):
            samples = rng.sample(question.samples, len(question.samples))
            n = taken_of(samples, stopping)
            taken += n / len(samples)
            tokens += sum(s.length for s in samples[:n])
            right += _right(samples[:n], stopping.rule)
            right_of_all += _right(samples, stopping.rule)
    runs = orders * len(trace.questions)
    every = orders * sum(s.length for q in trace.questions for s in q.samples)
    return Saving(stopping.rule, taken / runs, tokens / max(every, 1), right / runs, right_of_all / runs)


def taken_of(samples: Sequence[Sample], stopping: Stopping) -> int:
    """How many of them are taken."""
    for n in range(stopping.step, len(samples), stopping.step):
        if stopping.done(samples[:n]):
            return n
    return len(samples)


def _right(samples: Sequence[Sample], rule: str) -> float:
    if rule != "majority":
        return float(any(s.score >= 1 for s in samples))
    counts = Counter(s.answer for s in samples if s.answer is not None)
    if not counts:
        return 0.0
    most = max(counts.values())
    leading = {a for a, n in counts.items() if n == most}
    correct = {s.answer for s in samples if s.score >= 1}
    return len(leading & correct) / len(leading)
