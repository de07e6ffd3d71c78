"""How long a draft is, zero included: what a step will cost by the passes there were, and what it will give by the
acceptance that was measured.

A step of drafts of gamma tokens takes gamma passes of the drafter and one of the target, and gives 1 + a1 + a1 a2 + ...
tokens, a_k being the part of the drafts right at position k of those right before it (MagicDec, section 3, with rates
by position in place of one). The length with the most tokens a second is taken.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from thresher.attention.base import AttentionMethod
from thresher.machine.cost import Cost, ModelShape, attention_cost, weights_cost
from thresher.machine.profile import MachineProfile

MOST_CHOSEN = 8  # tokens of a draft whose length is chosen
REPLAN = 16  # steps after which lengths are chosen again, if nothing has changed before
REPLAN_UNSURE = 3  # the same, where the time of what was chosen is not measured yet
HYSTERESIS = 1.03  # as many times as fast must another length promise to be
PROBE = 96  # steps without drafts after which one is tried, and with drafts after which one is done without
PROBE_GAMMA = 2
_NOMINAL = MachineProfile(threads=1, read=20e9, matmul=200e9)  # what is expected where nothing was measured
_WEIGHT = 0.25  # of a new pass in the running correction
_MIXED = 0.2  # a pass whose sequences have this much more or fewer tokens each, on average, is between two kinds
_UNSEEN = 0.25  # of a pass that another token of each sequence is taken to cost, until a longer one was measured
_OUTLIER = 3.0  # a pass that took this much longer than expected counts only as much longer
_LIKELY = 0.5  # a token that is drafted rightly so often is worth its time beside others that are worth theirs
_MEMORY = 0.98  # of the counts of acceptance when one more is added: about the last 50


@dataclass(frozen=True)
class Chunk:
    """New tokens of one sequence behind `past` cached ones, each reading by `method` (None: densely)."""

    new: int
    past: int
    method: AttentionMethod | None = None


class Clock:
    """Learns how long passes take: a nominal time by their cost, corrected by the passes of the same kind there were.

    A kind is who makes the pass, how many sequences it has, to a power of two, and how many new tokens each; between
    the numbers of tokens that were measured corrections are interpolated, beyond them they stay. A pass between two
    kinds, as some of its sequences found nothing to draft, corrects that of more tokens. Longer passes are taken to
    cost more until one was measured: to believe that they are nearly free would be dear where they are not.
    """

    def __init__(self, shape: ModelShape, others: Mapping[str, ModelShape]) -> None:
        """others: shapes of makers of passes that are not the model itself."""
        self._shape = shape
        self._shapes = others
        self._corrections: dict[str, dict[tuple[int, int], float]] = {}

    def seconds(self, maker: str, chunks: Sequence[Chunk]) -> float:
        """The expected time of a pass."""
        tokens = sum(c.new for c in chunks) / len(chunks)
        return self._nominal(maker, chunks) * self._correction(maker, tokens, len(chunks).bit_length())

    def observe(self, maker: str, chunks: Sequence[Chunk], seconds: float) -> None:
        """A pass took so long."""
        known, batch = self._corrections.setdefault(maker, {}), len(chunks).bit_length()
        tokens = sum(c.new for c in chunks) / len(chunks)
        measured = seconds / self._nominal(maker, chunks)
        longer, share = _kind(tokens)
        for n in {longer, math.floor(tokens)}:
            if (n, batch) not in known:
                known[n, batch] = self._correction(maker, n, batch) if known and share < 1 else measured
        expected = share * known[longer, batch] + (1 - share) * known[math.floor(tokens), batch]
        error = min(measured, _OUTLIER * expected) - expected
        known[longer, batch] += _WEIGHT * error * min(1 / share, 2.0)

    def measured(self, maker: str, tokens: int | None = None) -> bool:
        """Whether any pass of this maker was, or one with so many tokens of each sequence."""
        return any(tokens in (None, kind[0]) for kind in self._corrections.get(maker, {}))

    def _correction(self, maker: str, tokens: float, batch: int) -> float:
        known = self._corrections.get(maker) or self._corrections.get("target")
        if not known:
            return 1.0
        nearest = min({kind[1] for kind in known}, key=lambda other: abs(other - batch))
        points = {n: correction for (n, size), correction in sorted(known.items()) if size == nearest}
        correction = float(np.interp(tokens, list(points), list(points.values())))
        return correction if len(points) > 1 else correction * (1 + _UNSEEN * max(0.0, tokens - min(points)))

    def _nominal(self, maker: str, chunks: Sequence[Chunk]) -> float:
        shape = self._shapes.get(maker, self._shape)
        attention, dense = Cost(0, 0), dict[int, float]()  # new tokens -> rows of all sequences with so many
        for c in chunks:
            if c.method is None:
                dense[c.new] = dense.get(c.new, 0) + c.past + c.new / 2
            else:
                attention += c.method.cost(shape, c.past).times(c.new)
        for new, rows in dense.items():
            attention += attention_cost(shape, rows, new)
        weights = weights_cost(shape, sum(c.new for c in chunks))
        return _NOMINAL.seconds(weights) + _NOMINAL.seconds(attention)


def _kind(tokens: float) -> tuple[int, float]:
    """The kind that a pass of so many tokens for each sequence corrects, and how much of the pass is of it; the rest is
    of the kind with one token less."""
    low = math.floor(tokens)
    if abs(tokens - round(tokens)) <= _MIXED:
        return round(tokens), 1.0
    return low + 1, tokens - low


@dataclass
class Acceptance:
    """How often drafts are right at each position, of those right before it; the latest count most.

    prior: what is expected before anything was seen, and how many drafts that is worth.
    """

    prior: Sequence[float]
    strength: float = 4.0
    _right: list[float] = field(default_factory=list)
    _seen: list[float] = field(default_factory=list)

    def observe(self, chances: Iterable[float]) -> None:
        """How likely each token of a draft was to stand, up to the first that fell."""
        for i, chance in enumerate(chances):
            if i == len(self._seen):
                self._right.append(0.0)
                self._seen.append(0.0)
            self._right[i] = _MEMORY * self._right[i] + chance
            self._seen[i] = _MEMORY * self._seen[i] + 1

    @property
    def drafts(self) -> float:
        """How many were seen, the latest counting most."""
        return self._seen[0] if self._seen else 0.0

    def rates(self, n: int) -> list[float]:
        """Expected at the first n positions."""
        rates: list[float] = []
        for i in range(n):
            expected = self.prior[min(i, len(self.prior) - 1)]
            right, seen = (self._right[i], self._seen[i]) if i < len(self._seen) else (0.0, 0.0)
            if not seen and rates and i >= len(self.prior):
                expected = rates[-1]
            rates.append((self.strength * expected + right) / (self.strength + seen))
        return rates


def expected_tokens(rates: Iterable[float]) -> float:
    """Of a step whose draft has these rates of acceptance: 1 + a1 + a1 a2 + ..., the target's own token included."""
    total, product = 1.0, 1.0
    for rate in rates:
        product *= rate
        total += product
    return total


@dataclass(frozen=True)
class Case:
    """A sequence in the next step. most: longest draft that it may have; rates: of acceptance at each position."""

    past: int
    target: AttentionMethod | None
    drafting: AttentionMethod | None
    most: int
    rates: Sequence[float]


@dataclass(frozen=True)
class Plan:
    """Lengths of drafts, and what is expected of a step: tokens of all sequences and seconds."""

    gammas: list[int]
    tokens: float
    seconds: float

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def plan(clock: Clock, drafter: str | None, cases: Sequence[Case], gamma: int) -> Plan:
    """What drafts of up to gamma tokens by a maker of passes (None: drafts that cost nothing) will give and take."""
    gammas = [min(gamma, c.most) for c in cases]
    seconds = clock.seconds("target", [Chunk(1 + g, c.past, c.target) for c, g in zip(cases, gammas, strict=True)])
    for k in range(max(gammas, default=0)):
        active = [Chunk(1, c.past + k, c.drafting) for c, g in zip(cases, gammas, strict=True) if g > k]
        seconds += clock.seconds(drafter, active) if drafter else 0.0
    tokens = sum(expected_tokens(c.rates[:g]) for c, g in zip(cases, gammas, strict=True))
    return Plan(gammas, tokens, seconds)


def best_plan(clock: Clock, drafter: str | None, cases: Sequence[Case], present: int = 0) -> Plan:
    """The length with the most tokens a second; the present one unless another is clearly better. Sequences whose
    drafts do not pay in it have shorter ones or none."""
    plans = [plan(clock, drafter, cases, g) for g in range(min(MOST_CHOSEN, max(c.most for c in cases)) + 1)]
    best = max(plans, key=lambda p: p.rate)
    held = plans[present] if present < len(plans) else plans[0]
    if best.rate < HYSTERESIS * held.rate:
        best = held
    return _trimmed(clock, drafter, cases, best) if len(cases) > 1 else best


def _trimmed(clock: Clock, drafter: str | None, cases: Sequence[Case], chosen: Plan) -> Plan:
    """Without the tokens that are too unlikely to be worth their time beside the others."""
    shortest = list(cases)
    for i, case in enumerate(cases):
        n = chosen.gammas[i]
        while n and math.prod(case.rates[:n]) < _LIKELY:
            fewer = [*shortest[:i], _cut(case, n - 1), *shortest[i + 1 :]]
            other = plan(clock, drafter, fewer, max(chosen.gammas))
            if other.rate <= chosen.rate:
                break
            chosen, shortest, n = other, fewer, n - 1
    return chosen


def _cut(case: Case, most: int) -> Case:
    return Case(case.past, case.target, case.drafting, most, case.rates)
