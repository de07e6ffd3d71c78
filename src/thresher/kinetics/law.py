"""What it costs to generate, memory counted: the eFLOPs of Kinetics (arXiv 2506.05333, section 3).

Token t of an answer attends to the prompt and t tokens before it, and on average to half of itself: sums over tokens
are integrals of the number of keys, as in the paper. What is not in the paper (weights that are read, prompts that are
read until the last sample ends, reading the prompt) is a switch that is off by default.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import comb

import numpy as np

from thresher.attention.base import AttentionMethod
from thresher.attention.registry import parse_method
from thresher.attention.topk import TopK
from thresher.errors import UsageError
from thresher.machine.cost import Cost, ModelShape, attention_cost, bounded_cost, weights_cost

_NONE = Cost(0, 0)
_KNOTS = 65  # contexts at which a method's own cost is asked; it is taken as linear between them


@dataclass(frozen=True)
class RunCost:
    """Linear layers and attention apart: they are kernels of their own, and do not overlap."""

    linear: Cost
    attention: Cost

    def __add__(self, other: "RunCost") -> "RunCost":
        return RunCost(self.linear + other.linear, self.attention + other.attention)

    def times(self, n: float) -> "RunCost":
        return RunCost(self.linear.times(n), self.attention.times(n))

    @property
    def total(self) -> Cost:
        return self.linear + self.attention

    def eflops(self, intensity: float) -> float:
        """Operations, and bytes in the operations that take as long: `compute + intensity memory`."""
        return self.total.flops + intensity * self.total.bytes

    def seconds(self, flops: float, bandwidth: float, additive: bool = True) -> float:
        """At rates of operations and bytes a second. additive: arithmetic waits for memory, as the paper counts; else
        each of the two parts takes the longer of both."""
        join = sum if additive else max
        return sum(join((part.flops / flops, part.bytes / bandwidth)) for part in (self.linear, self.attention))


@dataclass(frozen=True)
class Reading:
    """How the paper's models read their KV cache. budget: tokens of a query, None for all. block: tokens of a block
    that is chosen as a whole, by the mean of its keys; 0 for single tokens by an oracle that costs nothing."""

    budget: int | None = None
    block: int = 0

    def __str__(self) -> str:
        if self.budget is None:
            return "dense"
        return f"block{self.block}x{self.budget // self.block}" if self.block else f"topk{self.budget}"


DENSE = Reading()


def parse_reading(text: str) -> Reading | AttentionMethod:
    """`dense`, `topk256` or `block16x64` (64 blocks of 16) as the paper counts them, or a method of this project, by
    its own cost. Raises UsageError."""
    if text == "dense":
        return DENSE
    if found := re.fullmatch(r"topk(\d{1,9})", text):
        return Reading(int(found[1]))
    if found := re.fullmatch(r"block(\d{1,9})x(\d{1,9})", text):
        block, count = map(int, found.groups())
        if block and count:
            return Reading(block * count, block)
    try:
        return parse_method(text)
    except UsageError as error:
        raise UsageError(f"{error}; or dense, topk256, block16x64 as the paper counts them") from None


def as_oracle(how: Reading | AttentionMethod) -> Reading | AttentionMethod:
    """Our top-k as the paper counts it, with a search that costs nothing; other methods as they are."""
    if isinstance(how, TopK) and how.budget >= 1:
        return Reading(int(how.budget) + how.sinks + how.window)
    return how


def attended(prompt: float, length: float, budget: float | None = None) -> float:
    """Keys that the tokens of one answer attend to: the sum of min(budget, keys before a token)."""
    every = prompt * length + length * length / 2
    if budget is None or budget >= prompt + length:
        return every
    return budget * length - max(0.0, budget - prompt) ** 2 / 2


def law_cost(shape: ModelShape, reading: Reading, prompt: float, length: float, samples: float = 1) -> RunCost:
    """Of `samples` answers of `length` tokens to one prompt, whose keys a dense pass reads once for all of them. Which
    keys a query chooses is its own, so a sparse one shares nothing but the blocks' means of the prompt."""
    by_query = 4.0 * shape.layers * shape.q_heads * shape.head_dim
    by_row = float(shape.kv_bytes_per_token)
    linear = Cost(2.0 * shape.active_count * length * samples, 0)
    keys = attended(prompt, length, reading.budget)
    if reading.budget is None:
        memory = by_row * (prompt * length + samples * length * length / 2)
        return RunCost(linear, Cost(samples * by_query * keys, memory))
    attention = Cost(samples * by_query * keys, samples * by_row * keys)
    if reading.block:
        means = attended(prompt, length) / reading.block
        shared = (prompt * length + samples * length * length / 2) / reading.block
        attention += Cost(samples * by_query / 2 * means, by_row / 2 * shared)
    return RunCost(linear, attention)


def step_cost(
    shape: ModelShape,
    reading: Reading | AttentionMethod,
    prompt: float,
    produced: float,
    samples: float,
    questions: int = 1,
) -> RunCost:
    """One pass in which each of `samples` answers to each of `questions` prompts, of `produced` tokens so far, gets a
    token. Weights are read once; layers whose memory does not grow are counted."""
    context = prompt + produced
    linear = weights_cost(shape, samples * questions)
    rest = bounded_cost(shape, context).times(samples)
    if isinstance(reading, AttentionMethod) and not _is_dense(reading):
        return RunCost(linear, (reading.cost(shape, round(context)).times(samples) + rest).times(questions))
    budget = reading.budget if isinstance(reading, Reading) else None
    block = reading.block if isinstance(reading, Reading) else 0
    keys = context if budget is None else min(float(budget), context)
    rows = prompt + samples * produced if budget is None else samples * keys
    attention = Cost(attention_cost(shape, keys).flops * samples, attention_cost(shape, rows).bytes)
    if block:
        means = attention_cost(shape, context / block).flops / 2 * samples
        attention += Cost(means, attention_cost(shape, (prompt + samples * produced) / block).bytes / 2)
    return RunCost(linear, (attention + rest).times(questions))


def _is_dense(method: AttentionMethod) -> bool:
    return method.exact and method.visibility() is None


def method_cost(shape: ModelShape, method: AttentionMethod, prompt: float, length: float, samples: float) -> RunCost:
    """The same by a method's own account, its index and its dense layers included. A prompt is shared only by a dense
    method: the account does not say which rows of it several samples choose."""
    if _is_dense(method):
        return law_cost(shape, DENSE, prompt, length, samples)
    linear = Cost(2.0 * shape.active_count * length * samples, 0)
    contexts = prompt + np.linspace(0, length, _KNOTS)
    costs = [method.cost(shape, round(context)) for context in contexts]
    flops = float(np.trapezoid([c.flops for c in costs], contexts))
    size = float(np.trapezoid([c.bytes for c in costs], contexts))
    return RunCost(linear, Cost(flops, size).times(samples))


@dataclass(frozen=True)
class Terms:
    """What counts beside the paper's terms.

    batch: sequences decoded together, among which reading the weights is divided; None, so many that it is nothing.
    until_last: a prompt is read until the longest of the samples ends, and not as if all were as long as one.
    prefill: reading the prompt, once. bounded: layers whose memory does not grow (windows, states).
    """

    batch: float | None = None
    until_last: bool = False
    prefill: bool = False
    bounded: bool = True


PAPER = Terms()


def run_cost(
    shape: ModelShape,
    reading: Reading | AttentionMethod,
    prompt: float,
    lengths: Sequence[float],
    samples: int = 1,
    terms: Terms = PAPER,
) -> RunCost:
    """What `samples` answers to one question are expected to cost, when lengths are as these. Raises UsageError."""
    if not len(lengths) or min(lengths) < 0 or prompt < 0 or samples < 1:
        raise UsageError("a cost needs at least one length, none of them negative, and one sample or more")
    total = RunCost(_NONE, _NONE)
    for length in lengths:
        total += _one_length(shape, reading, prompt, length, samples, terms)
    mean = total.times(1 / len(lengths))
    if terms.until_last and reading == DENSE:
        waiting = expected_longest(lengths, samples) - sum(lengths) / len(lengths)
        mean += RunCost(_NONE, Cost(0, shape.kv_bytes_per_token * prompt * waiting))
    return mean


def _one_length(
    shape: ModelShape,
    reading: Reading | AttentionMethod,
    prompt: float,
    length: float,
    samples: int,
    terms: Terms,
) -> RunCost:
    if isinstance(reading, Reading):
        cost = law_cost(shape, reading, prompt, length, samples)
    else:
        cost = method_cost(shape, reading, prompt, length, samples)
    if terms.bounded and (shape.windowed or shape.state_bytes):
        cost += RunCost(_NONE, _bounded(shape, prompt, length).times(samples))
    if terms.batch is not None:
        size = weights_cost(shape, terms.batch).bytes / terms.batch
        cost += RunCost(Cost(0, size * length * samples), _NONE)
    if terms.prefill:
        by_query = 4.0 * shape.layers * shape.q_heads * shape.head_dim
        attention = Cost(by_query * prompt * prompt / 2, shape.kv_bytes_per_token * prompt)
        cost += RunCost(Cost(2.0 * shape.active_count * prompt, weights_cost(shape, prompt).bytes), attention)
    return cost


def _bounded(shape: ModelShape, prompt: float, length: float) -> Cost:
    """Windows and states over a whole answer."""
    states = bounded_cost(replace(shape, windowed=()), 0).times(length)
    for layers, window in shape.windowed:
        one = replace(shape, windowed=((layers, 1),), state_bytes=0)
        states += bounded_cost(one, 1).times(attended(prompt, length, window))
    return states


def expected_longest(lengths: Sequence[float], samples: int) -> float:
    """The mean over all choices of `samples` of these lengths of the longest; beyond as many as there are, drawn again
    and again."""
    known = np.sort(np.asarray(lengths, dtype=np.float64))
    n = len(known)
    if samples <= n:
        weights = np.array([comb(i, samples - 1) / comb(n, samples) for i in range(n)])
    else:
        share = np.arange(n + 1) / n
        weights = np.diff(share**samples)
    return float(known @ weights)


def drafted(plain: RunCost, draft: RunCost, gamma: int, tokens: float) -> RunCost:
    """With drafts of gamma tokens of which a step keeps `tokens` (the bonus included): attention reads the cache once
    a step and drafts read their view of it; arithmetic is done for every token that is tried. The output is the same
    (MagicDec, section 3)."""
    verify = RunCost(
        Cost(plain.linear.flops * (gamma + 1), plain.linear.bytes),
        Cost(plain.attention.flops * (gamma + 1), plain.attention.bytes),
    )
    return (verify + draft.times(gamma)).times(1 / tokens)
