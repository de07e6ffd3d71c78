"""Associative memories: kernel regression over key-value pairs, which unit keys turn into softmax attention.

A pair (k_t, v_t) says what came after something like x_t: the key is a leaky average of the past, the value peeks one
token ahead, so the pair exists only once x_{t+1} is known. As streams that are late by one, k'_t = k_{t-1} and
v'_t = v_{t-1}, pairs make an ordinary causal KV cache whose first row is blank. A memory of all but the newest m - 1
pairs is the same with streams late by m, and m blank rows.

Each memory computes its streams in two forms: `parallel` for whole sequences (training), and `recurrent` for the new
tokens of sequences that carry a state (`models/states.py`).
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from thresher.kernels.memory import LEAST_NORM, memory_keys, memory_values
from thresher.models.mosaic.configuration import MemoryMosaicConfig
from thresher.models.mosaic.leaky import leaky_scan
from thresher.models.states import StateBatch

LARGEST = 5.0  # exponent of a scale
SCALE_SPEED = 10.0  # what learned exponents and decays are multiplied by, so that they learn as fast as the paper's


@dataclass(frozen=True)
class Streams:
    """What attention of one memory gets, `[..., tokens, heads, head_dim]` each: the keys that ask, and the pairs that
    have become complete, late by the memory's delay."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


def gaussian_memory(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, beta: float) -> torch.Tensor:
    """The kernel regression estimate of a value, f(q) = sum_i w_i v_i with w_i ~ exp(-beta |q - k_i|^2) (v1, eq. 1).

    query `[dim]`, keys, values `[pairs, dim]`. For keys of one norm this is softmax attention with scores 2 beta q k_i.
    """
    weights = (-beta * (query - keys).square().sum(-1)).softmax(-1)
    return weights @ values


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / (x.norm(dim=-1, keepdim=True) + LEAST_NORM)


def late(x: torch.Tensor, steps: int) -> torch.Tensor:
    """A stream `[batch, tokens, ...]` as it was `steps` tokens ago, zeros before its beginning."""
    if steps == 0:
        return x
    return torch.cat([torch.zeros_like(x[:, :steps]), x[:, :-steps]], dim=1)[:, : x.shape[1]]


def drop_pairs(values: torch.Tensor, dropout: float) -> torch.Tensor:
    """Values `[..., head_dim]` with some pairs gone for this step, the others scaled up for them.

    The paper drops single weights, one for each query and pair. Dropping the pair for all queries has the same
    expectation, and takes no random number and no matrix for each weight (30 % of the time of a step in training).
    """
    return F.dropout(torch.ones_like(values[..., :1]), dropout) * values


def scale_of(exponent: torch.Tensor) -> torch.Tensor:
    """exp of a learned exponent per head, as `[heads, 1]`."""
    return (SCALE_SPEED * exponent).clamp(max=LARGEST).exp()[:, None]


class KeyExtractor(nn.Module):
    """Unit keys from a leaky average of the past, unit(g_t W x_t + lam_t kb_{t-1}) per head (v1 section 4, v2 eq. 6).

    "leaky": g = 1 and lam = exp(-10 |a|), learned per head. "gated": g_t = exp(W_g x_t), lam_t = exp(-|W_lam x_t|).
    """

    def __init__(self, config: MemoryMosaicConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.gated = config.keys == "gated"
        if self.gated:
            self.gates = nn.Linear(config.hidden_size, 2 * self.heads, bias=False)
        else:
            self.decay = nn.Parameter(torch.empty(self.heads))

    def contributions(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x `[..., d]` -> what each token adds to the average, float32 `[..., heads, head_dim]`, and the logarithm of
        what it leaves of the past, `[..., heads]`, or `[1, heads]` if that is the same for all."""
        added = self.proj(x).float().unflatten(-1, (self.heads, self.head_dim))
        if not self.gated:
            return added, self.log_decay()
        gate, leak = self.gates(x).float().chunk(2, dim=-1)
        return gate.exp()[..., None] * added, -leak.abs()

    def log_decay(self) -> torch.Tensor:
        """Of "leaky" keys, `[1, heads]`."""
        return -SCALE_SPEED * self.decay.float().abs()[None]

    def parallel(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, tokens, d]` -> float32 `[batch, tokens, heads, head_dim]`."""
        added, log_decay = self.contributions(x)
        if not self.gated:
            log_decay = log_decay.expand(x.shape[1], -1)[None]
        return unit(leaky_scan(added, log_decay))

    def recurrent(
        self, x: torch.Tensor, batch: StateBatch, before: torch.Tensor, scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of flattened tokens `[tokens, d]`; before `[sequences, d]`: the average so far; scale float32 `[heads]`.
        Returns keys `[tokens, heads, head_dim]`, of x's dtype, and the averages at the kept tokens `[kept, d]`."""
        before = before.unflatten(-1, (self.heads, self.head_dim))
        if self.gated:
            added, log_decay = self.contributions(x)
        else:
            added, log_decay = self.proj(x).unflatten(-1, (self.heads, self.head_dim)), self.log_decay()
        if x.device.type == "cpu":
            keys, averages = memory_keys(added, log_decay.exp(), batch.starts, before, scale)
        else:
            averages = _carried_on(added.float(), log_decay.expand(x.shape[0], -1), batch, before)
            keys = unit(averages) * scale[:, None]
        return keys.to(x.dtype), averages[batch.kept].flatten(1)


def _carried_on(added: torch.Tensor, log_decay: torch.Tensor, batch: StateBatch, before: torch.Tensor) -> torch.Tensor:
    """The average of each sequence from what it was before, by the parallel scan: that value is its step 0."""
    parts = []
    for i, (begin, end) in enumerate(pairwise(batch.starts)):
        steps = torch.cat([before[i : i + 1], added[begin:end]])[None]
        decays = torch.cat([log_decay[begin : begin + 1], log_decay[begin:end]])[None]
        parts.append(leaky_scan(steps, decays)[0, 1:])
    return torch.cat(parts)


class ContextualMemory(nn.Module):
    """The memory of a context: pairs are stored as the sequence goes on, and the newest key asks (v1 section 4).

    delay: pairs at least so many tokens old are in it; window: of those only the newest so many, 0 all. layer_idx: its
    number among the model's calls of attention.
    """

    def __init__(self, config: MemoryMosaicConfig, layer_idx: int, delay: int, window: int) -> None:
        super().__init__()
        self.layer_idx, self.delay, self.window = layer_idx, delay, window
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.dropout = config.dropout
        self.keys = KeyExtractor(config)
        self.values = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.present = nn.Parameter(torch.empty(self.heads))  # c: share of the present token in a value
        self.value_scale = nn.Parameter(torch.empty(self.heads))
        self.adaptive = config.bandwidth == "adaptive"
        if self.adaptive:
            self.theta = nn.Parameter(torch.empty(3, self.heads))
        else:
            self.key_scale = nn.Parameter(torch.empty(self.heads))

    @property
    def state_sizes(self) -> list[int]:
        """Numbers of the state: the average, the last `delay` keys, the last complete values, the last raw value."""
        d = self.heads * self.head_dim
        return [d, self.delay * d, (self.delay - 1) * d, d]

    def _value(self, raw: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """The value of the pair that each token completes, from its raw value and the one of the token before."""
        share = self.present.float()[:, None]
        return unit((1 - share) * raw + share * before) * scale_of(self.value_scale.float())

    def _scaled(self, keys: torch.Tensor, pairs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and stored keys from unit keys `[..., heads, head_dim]`; pairs `[...]`: how many each query reads."""
        if not self.adaptive:
            keys = keys * scale_of(self.key_scale.float())
            return keys, keys
        return keys * self._beta(pairs)[..., None], keys

    def _beta(self, pairs: torch.Tensor) -> torch.Tensor:
        """The adaptive bandwidth of queries that read so many pairs, `[..., heads]`: b1 n^alpha + b0 (v2, eq. 5)."""
        low, high, power = self.theta.float().unbind(0)
        n = pairs.clamp(min=1).float()[..., None]
        return high.clamp(max=10).exp() * n ** power.abs().clamp(max=1) + low.clamp(max=10).exp()

    def _pairs(self, positions: torch.Tensor, delay: int) -> torch.Tensor:
        """How many pairs a token at each position reads."""
        held = (positions + 1 - delay).clamp(min=0)
        return held.clamp(max=self.window) if self.window else held

    def parallel(self, x: torch.Tensor, delay: int | None = None) -> torch.Tensor:
        """`[batch, tokens, d]` -> answers of the memory, of the same shape. delay: another one than the layer's."""
        delay = delay or self.delay
        tokens = x.shape[1]
        if tokens <= delay:
            return torch.zeros_like(x)  # an empty memory answers nothing, whatever is asked
        raw = self.values(x).float().unflatten(-1, (self.heads, self.head_dim))
        values = self._value(raw, late(raw, 1))
        queries, keys = self._scaled(
            self.keys.parallel(x), self._pairs(torch.arange(tokens, device=x.device), delay)[None]
        )
        # Rows `delay` on of the late streams: query t sees pairs up to t - delay.
        q, k, v = queries[:, delay:], keys[:, : tokens - delay], values[:, 1 : tokens - delay + 1]
        if self.training:
            v = drop_pairs(v, self.dropout)
        q, k, v = (t.to(x.dtype).transpose(1, 2) for t in (q, k, v))
        mask = None
        if self.window and tokens - delay > self.window:
            at = torch.arange(tokens - delay, device=x.device)
            mask = (at[None, :] <= at[:, None]) & (at[None, :] > at[:, None] - self.window)
        answers = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=1.0)
        return F.pad(answers.transpose(1, 2).flatten(2), (0, 0, delay, 0))

    def recurrent(
        self, x: torch.Tensor, positions: torch.Tensor, batch: StateBatch, before: torch.Tensor
    ) -> tuple[Streams, torch.Tensor]:
        """Streams of flattened tokens `[tokens, d]` at `positions`, in x's dtype, and the states `[kept, size]` at the
        kept tokens; before `[sequences, size]`."""
        shape = (self.heads, self.head_dim)
        average, keys_before, values_before, raw_before = before.split(self.state_sizes, dim=-1)
        # Of an adaptive bandwidth keys are stored with norm 1, and it goes into the queries.
        scale = torch.ones(self.heads, device=x.device) if self.adaptive else scale_of(self.key_scale.float())[:, 0]
        keys, average_after = self.keys.recurrent(x, batch, average, scale)
        queries = keys
        if self.adaptive:
            beta = self._beta(self._pairs(positions, self.delay))
            queries = (keys.float() * beta[..., None]).to(x.dtype)
        raw = self.values(x).unflatten(-1, shape)
        if x.device.type == "cpu":
            share, value_scale = self.present.float(), scale_of(self.value_scale.float())[:, 0]
            complete = memory_values(raw, batch.starts, raw_before.unflatten(-1, shape), share, value_scale)
        else:
            previous, _ = batch.lagged(raw.float(), raw_before.unflatten(-1, (1, *shape)), 1)
            complete = self._value(raw.float(), previous).to(x.dtype)
        late_keys, keys_after = batch.lagged(keys, keys_before.unflatten(-1, (self.delay, *shape)), self.delay)
        parts = [average_after, keys_after.flatten(1)]
        late_values = complete
        if self.delay > 1:
            lag = self.delay - 1
            late_values, kept = batch.lagged(complete, values_before.unflatten(-1, (lag, *shape)), lag)
            parts.append(kept.flatten(1))
        after = torch.cat([part.float() for part in (*parts, raw[batch.kept].flatten(1))], dim=-1)
        return Streams(queries, late_keys, late_values), after


class PersistentMemory(nn.Module):
    """A memory of P learned pairs per head, in the place of an MLP (v1 section 4)."""

    def __init__(self, config: MemoryMosaicConfig) -> None:
        super().__init__()
        self.heads, self.head_dim, self.size = config.num_attention_heads, config.head_dim, config.persistent_size
        self.dropout = config.dropout
        self.keys = KeyExtractor(config)
        self.stored_keys = nn.Parameter(torch.empty(self.heads, self.size, self.head_dim))
        self.stored_values = nn.Parameter(torch.empty(self.heads, self.size, self.head_dim))
        self.key_scale = nn.Parameter(torch.empty(self.heads))
        self.value_scale = nn.Parameter(torch.empty(self.heads))

    @property
    def state_sizes(self) -> list[int]:
        """Numbers of the state: the leaky average."""
        return [self.heads * self.head_dim]

    def parallel(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, tokens, d]` -> answers, of the same shape."""
        return self._answer(self.keys.parallel(x).flatten(0, 1), x.dtype).view(x.shape)

    def recurrent(self, x: torch.Tensor, batch: StateBatch, before: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Answers to flattened tokens `[tokens, d]`, and the states `[kept, d]`."""
        keys, after = self.keys.recurrent(x, batch, before, torch.ones(self.heads, device=x.device))
        return self._answer(keys.float(), x.dtype), after

    def _answer(self, keys: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`[tokens, heads, head_dim]` -> `[tokens, d]`. The stored keys carry no scale, so the query has it twice."""
        queries = (keys * scale_of(self.key_scale.float()).square()).to(dtype).transpose(0, 1)
        values: torch.Tensor = self.stored_values
        if self.training:
            values = drop_pairs(values, self.dropout)
        # As attention, which keeps no matrix of weights: 1.5 to 3 times as fast on a CPU, forward and backward.
        answers = F.scaled_dot_product_attention(queries[None], self.stored_keys[None], values[None], scale=1.0)[0]
        return (answers.transpose(0, 1) * scale_of(self.value_scale.float())).to(dtype).flatten(1)


class SwiGLU(nn.Module):
    """The MLP that stands for persistent memory in v2."""

    def __init__(self, config: MemoryMosaicConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return out


@torch.no_grad()
def initialize(module: Any, config: MemoryMosaicConfig) -> None:
    """The published starts of what is not a matrix, and of the stored pairs; of matrices see modeling.py."""
    heads, head_dim = config.num_attention_heads, config.head_dim
    if isinstance(module, KeyExtractor) and not module.gated:
        module.decay.copy_(torch.linspace(0.5, 5, heads) / SCALE_SPEED)
    if isinstance(module, ContextualMemory):
        module.present.uniform_(0, 1)
        module.value_scale.fill_(0.0 if module.adaptive else -0.05)
        if module.adaptive:
            module.theta.copy_(torch.tensor([1.5, 1.5, 1 / 3])[:, None].expand(3, heads))
        else:
            module.key_scale.fill_(0.1)
    if isinstance(module, PersistentMemory):
        for stored in (module.stored_keys, module.stored_values):
            stored.normal_(0, math.sqrt(1 / head_dim))
        module.key_scale.fill_(0.1)
        module.value_scale.fill_(-0.05)
