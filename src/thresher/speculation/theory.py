"""What speculation can gain, from shapes and rates alone: the cost model of MagicDec (arXiv 2408.11049, sections 3, 4).

A pass reads the weights once and every sequence's keys and values once, however many new tokens each has. Linear layers
and attention are different kernels, so their times add; each takes the longer of its arithmetic and its memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from thresher.attention.base import AttentionMethod
from thresher.machine.cost import Cost, ModelShape, attention_cost, bounded_cost, weights_cost
from thresher.speculation.policy import expected_tokens

MOST_GAMMA = 15


@dataclass(frozen=True)
class Hardware:
    """flops: operations a second; bandwidth: bytes a second; overhead: seconds of a pass that are neither."""

    flops: float
    bandwidth: float
    overhead: float = 0.0

    def seconds(self, cost: Cost) -> float:
        return max(cost.flops / self.flops, cost.bytes / self.bandwidth)


@dataclass(frozen=True)
class Drafter:
    """Who drafts. acceptance: of a token, one rate for all positions or a rate for each. method: how it reads its
    cache, None for all of it; budget: tokens of it that are read, in place of what the method costs by itself."""

    shape: ModelShape
    acceptance: Sequence[float]
    method: AttentionMethod | None = None
    budget: int | None = None

    def rates(self, gamma: int) -> list[float]:
        """At the first positions; the last one that is known stands for those behind it."""
        return [self.acceptance[min(i, len(self.acceptance) - 1)] for i in range(gamma)]


def omega(alpha: float, gamma: int) -> float:
    """Tokens of a step when every drafted token stands with the same chance: (1 - alpha^(gamma + 1)) / (1 - alpha)."""
    return expected_tokens([alpha] * gamma)


def target_seconds(shape: ModelShape, hardware: Hardware, batch: int, context: int, tokens: int = 1) -> float:
    """A dense pass of `batch` sequences of `context` tokens with so many new ones each."""
    linear = hardware.seconds(weights_cost(shape, batch * tokens))
    attention = hardware.seconds(
        (attention_cost(shape, context, tokens) + bounded_cost(shape, context, tokens)).times(batch)
    )
    return linear + attention + hardware.overhead


def draft_seconds(drafter: Drafter, hardware: Hardware, batch: int, context: int) -> float:
    """A pass that drafts a token of each sequence."""
    shape = drafter.shape
    if drafter.budget is not None:
        cost = attention_cost(shape, min(drafter.budget, context))
    else:
        cost = drafter.method.cost(shape, context) if drafter.method else attention_cost(shape, context)
    linear = hardware.seconds(weights_cost(shape, batch))
    return linear + hardware.seconds((cost + bounded_cost(shape, context)).times(batch)) + hardware.overhead


@dataclass(frozen=True)
class Gain:
    """Of drafts of gamma tokens over none. speedup: 1 for gamma 0. draft, verify: their times by that of a plain pass;
    tokens: of a step; plain_seconds: of a pass without drafts."""

    gamma: int
    speedup: float
    draft: float
    verify: float
    tokens: float
    plain_seconds: float


def gain(shape: ModelShape, drafter: Drafter, hardware: Hardware, batch: int, context: int, gamma: int) -> Gain:
    """Speed-up = tokens of a step / (gamma T_D / T_T + T_V / T_T)."""
    plain = target_seconds(shape, hardware, batch, context)
    draft = draft_seconds(drafter, hardware, batch, context) / plain
    verify = target_seconds(shape, hardware, batch, context, gamma + 1) / plain
    tokens = expected_tokens(drafter.rates(gamma))
    return Gain(gamma, tokens / (gamma * draft + verify), draft, verify, tokens, plain)


def best_gain(shape: ModelShape, drafter: Drafter, hardware: Hardware, batch: int, context: int) -> Gain:
    """The best length of a draft, 0 if none pays."""
    gains = [gain(shape, drafter, hardware, batch, context, g) for g in range(min(MOST_GAMMA, context) + 1)]
    return max(gains, key=lambda g: g.speedup)


def critical_length(shape: ModelShape, hardware: Hardware, tokens: int = 1) -> float | None:
    """The context beyond which a pass of any number of sequences waits for memory and not for arithmetic: there more
    sequences make drafts pay more and not less. None if arithmetic always takes longer. tokens: new ones of a sequence,
    1 for decoding, gamma + 1 for verification."""
    intensity = hardware.flops / hardware.bandwidth
    by_query = 4.0 * shape.layers * shape.q_heads * shape.head_dim
    left = intensity * shape.kv_bytes_per_token - tokens * by_query
    return tokens * 2.0 * shape.active_count / left if left > 0 else None
