"""Associative memories: keys and values of new tokens of a ragged batch, and the answers of learned pairs."""

from collections.abc import Sequence
from itertools import pairwise

import torch

from thresher.kernels import _native
from thresher.kernels.linear import PackedLinear
from thresher.kernels.native import TYPES, kernel_set, threads

LEAST_NORM = 1e-10  # is added to each norm


def memory_keys(
    x: torch.Tensor, decay: torch.Tensor, starts: Sequence[int], before: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of leaky averages: a_t = x_t + decay_t a_{t-1} along each sequence, key_t = scale a_t / |a_t|.

    x bf16 or float32 `[tokens, heads, head_dim]`; the rest float32: decay `[tokens or 1, heads]`, before `[sequences,
    heads, head_dim]` (the averages so far), scale `[heads]`. starts: where each sequence's tokens begin, and the end.
    Returns the keys, of x's shape and dtype, and the averages, float32.

    Raises ValueError for other dtypes or shapes.
    """
    x, decay, before, scale = (t.contiguous() for t in (x, decay, before, scale))
    tokens, heads, head_dim = x.shape
    _check(x, starts, before, scale)
    if decay.dtype != torch.float32 or decay.shape not in ((1, heads), (tokens, heads)):
        raise ValueError(f"decay {decay.dtype} {tuple(decay.shape)}: needs float32 [{tokens} or 1, {heads}]")
    keys, averages = torch.empty_like(x), torch.empty(x.shape, dtype=torch.float32)
    _native.memory_keys(
        kernel_set(),
        TYPES[x.dtype],
        list(starts),
        heads,
        head_dim,
        x.data_ptr(),
        decay.data_ptr(),
        heads if decay.shape[0] == tokens else 0,
        before.data_ptr(),
        scale.data_ptr(),
        keys.data_ptr(),
        averages.data_ptr(),
        threads(),
    )
    return keys, averages


def memory_values(
    x: torch.Tensor, starts: Sequence[int], before: torch.Tensor, share: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Values of the pairs that tokens complete: v_t = (1 - share) x_t + share x_{t-1}, value_t = scale v_t / |v_t|.

    x bf16 or float32 `[tokens, heads, head_dim]`; before float32 `[sequences, heads, head_dim]`: the x before each
    sequence's first; share, scale float32 `[heads]`. Returns x's shape and dtype.

    Raises ValueError for other dtypes or shapes.
    """
    x, before, share, scale = (t.contiguous() for t in (x, before, share, scale))
    _check(x, starts, before, scale)
    if share.dtype != torch.float32 or share.shape != scale.shape:
        raise ValueError(f"share {share.dtype} {tuple(share.shape)}: needs float32 {tuple(scale.shape)}")
    values, mixed = torch.empty_like(x), torch.empty(x.shape, dtype=torch.float32)
    _native.memory_values(
        kernel_set(),
        TYPES[x.dtype],
        list(starts),
        x.shape[1],
        x.shape[2],
        x.data_ptr(),
        before.data_ptr(),
        share.data_ptr(),
        scale.data_ptr(),
        values.data_ptr(),
        mixed.data_ptr(),
        threads(),
    )
    return values


def _check(x: torch.Tensor, starts: Sequence[int], before: torch.Tensor, scale: torch.Tensor) -> None:
    tokens, heads, head_dim = x.shape
    if (
        x.dtype not in TYPES
        or {before.dtype, scale.dtype} != {torch.float32}
        or before.shape != (len(starts) - 1, heads, head_dim)
        or scale.shape != (heads,)
        or starts[0] != 0
        or starts[-1] != tokens
        or any(a > b for a, b in pairwise(starts))
    ):
        raise ValueError(
            f"x {x.dtype} {tuple(x.shape)}, before {before.dtype} {tuple(before.shape)}, scale {scale.dtype} "
            f"{tuple(scale.shape)} and {len(starts) - 1} sequences do not go together"
        )


def persistent_memory(x: torch.Tensor, keys: Sequence[PackedLinear], values: Sequence[PackedLinear]) -> torch.Tensor:
    """What learned pairs answer: of each head softmax(keys x) values.

    x `[rows, heads, head_dim]`, bf16 (bf16, int8 weights) or float32. keys: of each head `[pairs, head_dim]`, values:
    `[head_dim, pairs]`, packed. Returns the shape and dtype of x. Raises ValueError for other shapes or dtypes.
    """
    rows, heads, head_dim = x.shape
    pairs, weight = keys[0].out_features, keys[0].data.dtype
    shapes = {(k.in_features, k.out_features) for k in keys} | {(v.out_features, v.in_features) for v in values}
    if (
        shapes != {(head_dim, pairs)}
        or {heads} != {len(keys), len(values)}
        or any(p.data.dtype != weight or p.bias is not None for p in (*keys, *values))
        or (x.dtype == torch.float32) != (weight == torch.float32)
        or x.dtype not in TYPES
    ):
        raise ValueError(f"x {x.dtype} {tuple(x.shape)} does not go with {len(keys)} memories {sorted(shapes)}")
    x = x.contiguous()
    y = torch.empty_like(x)
    scores, weights = torch.empty(rows, pairs), torch.empty(rows, pairs, dtype=x.dtype)

    def addresses(packed: Sequence[PackedLinear]) -> list[tuple[int, int]]:
        return [(p.data.data_ptr(), 0 if p.scale is None else p.scale.data_ptr()) for p in packed]

    _native.persistent_memory(
        kernel_set(),
        TYPES[x.dtype],
        TYPES[weight],
        x.data_ptr(),
        y.data_ptr(),
        rows,
        head_dim,
        pairs,
        addresses(keys),
        addresses(values),
        scores.data_ptr(),
        weights.data_ptr(),
        threads(),
    )
    return y


def reference_persistent_memory(x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """What persistent_memory computes, in float64; keys, values `[heads, pairs, head_dim]`."""
    weights = torch.einsum("rhd,hpd->rhp", x.double(), keys.double()).softmax(-1)
    return torch.einsum("rhp,hpd->rhd", weights, values.double())


def reference_memory_keys(
    x: torch.Tensor, decay: torch.Tensor, starts: Sequence[int], before: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What memory_keys computes, in float64."""
    averages = x.double().clone()
    decay = decay.double().expand(x.shape[0], -1)
    for i, (begin, end) in enumerate(pairwise(starts)):
        last = before[i].double()
        for t in range(begin, end):
            averages[t] += decay[t, :, None] * last
            last = averages[t]
    return _unit(averages) * scale.double()[:, None], averages


def reference_memory_values(
    x: torch.Tensor, starts: Sequence[int], before: torch.Tensor, share: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """What memory_values computes, in float64."""
    earlier = torch.cat([x.double()[:1], x.double()[:-1]])
    for i, (begin, end) in enumerate(pairwise(starts)):
        if end > begin:
            earlier[begin] = before[i].double()
    share = share.double()[:, None]
    return _unit((1 - share) * x.double() + share * earlier) * scale.double()[:, None]


def _unit(x: torch.Tensor) -> torch.Tensor:
    unit: torch.Tensor = x / (x.norm(dim=-1, keepdim=True) + LEAST_NORM)
    return unit
