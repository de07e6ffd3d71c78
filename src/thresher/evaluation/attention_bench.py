"""Attention alone, at any head shape, over synthetic keys and values: one layer against the clock and the floor."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from thresher.attention.base import AttentionMethod
from thresher.attention.index import Index
from thresher.attention.sparse import Shape, SparseMethod
from thresher.cache.sequence import KVLayout, KVSequence
from thresher.evaluation.machine import measure_machine
from thresher.kernels import _native
from thresher.kernels.attention import AttentionPlan, Heads

LAYERS = 2  # in turn, so that no layer finds its rows in a cache


@dataclass(frozen=True)
class AttentionTiming:
    """One method. Times of one layer. rows: K and V rows read for a KV head; tokens: weighed by a query head, both as
    shares of the context; error: mean |o - o_dense| / |o_dense|; index_bytes: of a token and KV head; build_us: of
    a token and KV head; bytes: read by a step; floor_ratio: time against bytes at the measured bandwidth; speedup:
    over dense."""

    method: str
    context: int
    heads: str
    median_us: float
    speedup: float
    rows: float
    tokens: float
    error: float
    index_bytes: float
    build_us: float
    bytes: float
    floor_ratio: float


def synthetic_rows(heads: Heads, context: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[1, 2, kv_heads, context, head_dim]` bf16 and queries `[64, q_heads, head_dim]` for them.

    Keys lie in 256 clusters around a common mean with spread of their own; a query lies near one of the clusters,
    as queries of text do: a few hundred keys take most of its attention, the others a little each.
    """
    generator = torch.Generator().manual_seed(seed)
    dim, clusters = heads.head_dim, 256
    centres = torch.randn(heads.kv_heads, clusters, dim, generator=generator)
    mean = 2 * torch.randn(heads.kv_heads, 1, dim, generator=generator)
    rows = torch.empty(1, 2, heads.kv_heads, context, dim, dtype=torch.bfloat16)
    for h in range(heads.kv_heads):
        chosen = torch.randint(clusters, (context,), generator=generator)
        keys = mean[h] + centres[h, chosen] + 0.8 * torch.randn(context, dim, generator=generator)
        rows[0, 0, h] = keys.bfloat16()
        rows[0, 1, h] = torch.randn(context, dim, generator=generator).bfloat16()
    group = heads.q_heads // heads.kv_heads
    near = torch.randint(clusters, (64, heads.kv_heads, 1), generator=generator).expand(-1, -1, group)
    along = torch.stack([centres[h, near[:, h]] for h in range(heads.kv_heads)], dim=1)
    queries = 0.9 * along + 0.5 * torch.randn(64, heads.kv_heads, group, dim, generator=generator)
    return rows, queries.flatten(1, 2).bfloat16()


def bench_attention(
    heads: Heads,
    context: int,
    methods: Sequence[AttentionMethod],
    rounds: int,
    progress: Callable[[str], None],
    seed: int = 0,
) -> Iterator[AttentionTiming]:
    """Time one step of attention of one sequence under each method, in turn. Dense comes first, and no layer stays
    dense."""
    named = [str(m) for m in methods]
    methods = [replace(m, dense_layers="none") if isinstance(m, SparseMethod) else m for m in methods]
    layout = KVLayout(LAYERS, heads.kv_heads, heads.head_dim, torch.bfloat16)
    sequence = KVSequence(layout)
    progress(f"{context} tokens: drawing keys and values")
    rows, queries = synthetic_rows(heads, context, seed)
    sequence.append([0] * context, rows.expand(LAYERS, -1, -1, -1, -1))
    sequence.reserve(1)
    del rows
    gc.collect()
    new = torch.randn(2, 1, heads.kv_heads, heads.head_dim, generator=torch.Generator().manual_seed(seed)).bfloat16()
    indexes: list[Index | None] = []
    builds = []
    for method in methods:
        begin = time.perf_counter()
        index = None
        if isinstance(method, SparseMethod) and not method.visibility():
            progress(f"{context} tokens: building the index of {method}")
            index = Index(method, Shape(heads, torch.bfloat16), LAYERS)
            index.extend(sequence, lambda n: queries[None, -n:].expand(LAYERS, -1, -1, -1))
        builds.append(time.perf_counter() - begin)
        indexes.append(index)
    progress(f"{context} tokens: measuring")
    machine = measure_machine()
    workspace = _native.Workspace()

    def step(i: int, q: torch.Tensor) -> tuple[float, torch.Tensor]:
        index = indexes[i]
        plan = AttentionPlan(heads, torch.bfloat16, workspace)
        plan.add(
            1,
            context,
            sequence.incoming(1),
            methods[i].visibility(),
            index.reading(context) if index else None,
        )
        begin = time.perf_counter()
        for layer in range(LAYERS):
            out = plan.attend(layer, q, new[0], new[1], heads.head_dim**-0.5)
        return (time.perf_counter() - begin) / LAYERS, out.float()

    times: list[list[float]] = [[] for _ in methods]
    errors: list[list[float]] = [[] for _ in methods]
    for turn in range(rounds):
        q = queries[turn % 32][None]
        exact = step(0, q)[1]
        for i in range(len(methods)):
            out = step(i, q)[1]  # the caches still hold another method's data
            errors[i].append(float(((out - exact).norm(dim=-1) / exact.norm(dim=-1)).mean()))
            times[i] += [step(i, q)[0] for _ in range(3)]
    row_bytes = 2 * heads.head_dim * 2
    dense_us = statistics.median(times[0])
    for i, (method, index) in enumerate(zip(methods, indexes, strict=True)):
        median = statistics.median(times[i])
        read, tokens, own = float(context), float(context), 0.0
        if index and isinstance(method, SparseMethod):
            counted = index.readings()
            read = counted.rows / counted.readings
            tokens = counted.head_rows / counted.readings / index.shape.group
            own = method.index_bytes(context, index.shape)
        moved = heads.kv_heads * (read * row_bytes + own)
        yield AttentionTiming(
            method=named[i],
            context=context,
            heads=f"{heads.q_heads}x{heads.kv_heads}x{heads.head_dim}",
            median_us=1e6 * median,
            speedup=dense_us / median,
            rows=read / context,
            tokens=tokens / context,
            error=statistics.mean(errors[i]),
            index_bytes=index.bytes / (LAYERS * heads.kv_heads * context) if index else 0.0,
            build_us=1e6 * builds[i] / (LAYERS * heads.kv_heads * context),
            bytes=moved,
            floor_ratio=median / (moved / machine.read),
        )
