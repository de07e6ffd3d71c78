"""Exact attention of a ragged batch over keys and values that lie in several runs of memory."""

from dataclasses import dataclass
from typing import Any

import torch

from thresher.kernels import _native
from thresher.kernels.native import TYPES, kernel_set, threads


@dataclass(frozen=True)
class Heads:
    """Shape of an attention layer. `q_heads` is a multiple of `kv_heads`."""

    q_heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Visibility:
    """What a query at position q may read beyond causality: keys > q - window, and keys < sinks. None: all."""

    window: int
    sinks: int


@dataclass(frozen=True)
class SparseReading:
    """What one new token reads: an index's choice of `budget` tokens a query head before position `end`, and all rows
    outside of what the index covers. In layers that the index does not cover, and in those with a sliding window,
    all."""

    index: _native.Index
    end: int
    budget: int


class AttentionPlan:
    """What one forward pass reads, worked out once and used by every layer.

    Add the sequences in the order of their tokens in the flattened batch, then call `attend` for each layer. Rows that
    several sequences share are read once for all of them. Nothing may move or grow a sequence in between.
    """

    def __init__(self, heads: Heads, dtype: torch.dtype, workspace: _native.Workspace) -> None:
        self.heads = heads
        self.dtype = dtype
        self.tokens = 0
        self.states: Any = None  # of the recurrent layers of a model that has them (models/states.py)
        self._segments: list[torch.Tensor] = []  # and votes, kept alive, as the native plan has their addresses
        self._threads = threads()
        self.native = _native.Plan(
            kernel_set(),
            workspace,
            TYPES[dtype],
            heads.q_heads,
            heads.kv_heads,
            heads.head_dim,
            self._threads,
        )

    def add(
        self,
        queries: int,
        past: int,
        segments: list[tuple[torch.Tensor, int]],
        visibility: Visibility | None = None,
        sparse: SparseReading | None = None,
        votes: torch.Tensor | None = None,
    ) -> None:
        """A sequence of `past` cached tokens and `queries` new ones (one if it is read sparsely).

        segments: `(data [layers, 2, kv_heads, capacity, head_dim], used rows)` in order of position; the used rows of
        the last one count the new tokens, whose keys and values `attend` writes there. votes: float32 `[layers,
        kv_heads, rows]` that `attend` adds to how much the new tokens' query heads weigh each row, for at most 16 that
        read densely. Raises ValueError if a segment is that of another model: other heads, dtype or number of layers.
        """
        runs = []
        start = 0
        heads = self.heads
        layers = segments[0][0].shape[0] if segments else 0
        for data, used in segments:
            expected = (layers, 2, heads.kv_heads, data.shape[3] if data.dim() == 5 else 0, heads.head_dim)
            if data.shape != expected or data.dtype != self.dtype or not data.is_contiguous():
                raise ValueError(
                    f"a segment {tuple(data.shape)} of {data.dtype} is not that of this model: [{layers} layers, 2, "
                    f"{heads.kv_heads} KV heads, capacity, {heads.head_dim}] of {self.dtype}, contiguous"
                )
            runs.append((data.data_ptr(), data.shape[3], start, start + used))
            start += used
        window, sinks = (visibility.window, visibility.sinks) if visibility else (0, 0)
        index, end, budget = (sparse.index, sparse.end, sparse.budget) if sparse else (None, 0, 0)
        voted, rows = 0, 0
        if votes is not None:
            if votes.dtype != torch.float32 or votes.shape[:2] != (layers, heads.kv_heads) or not votes.is_contiguous():
                raise ValueError(
                    f"votes {votes.dtype} {tuple(votes.shape)}: need float32 [{layers}, {heads.kv_heads}, rows]"
                )
            voted, rows = votes.data_ptr(), votes.shape[2]
            self._segments.append(votes)
        self.native.add(queries, past, window, sinks, layers, runs, index, end, budget, voted, rows)
        self._segments.extend(data for data, _ in segments)
        self.tokens += queries

    def rows_read(self, layer_window: int = 0) -> int:
        """Rows of K (and as many of V) that a layer reads for each KV head."""
        return self.native.rows_read(layer_window)

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        layer_window: int = 0,
        blank: int = 0,
    ) -> torch.Tensor:
        """Store k, v behind the cached rows, then softmax(q k^T scale) v over what each query may see.

        q `[tokens, q_heads, head_dim]`, k and v `[tokens, kv_heads, head_dim]`, last dimension contiguous, the plan's
        dtype. layer_window: a sliding window of the model's own (0: none). blank: so many first rows of the layer hold
        nothing and are seen by nobody; a query that sees no row gives 0. Returns `[tokens, q_heads, head_dim]`.
        """
        for x, count in ((q, self.heads.q_heads), (k, self.heads.kv_heads), (v, self.heads.kv_heads)):
            if x.shape != (self.tokens, count, self.heads.head_dim) or x.dtype != self.dtype or x.stride(2) != 1:
                raise ValueError(
                    f"{tuple(x.shape)} of {x.dtype}: the plan is for [{self.tokens}, {count}, {self.heads.head_dim}] "
                    f"of {self.dtype}, the last dimension contiguous"
                )
        out = torch.empty(self.tokens, self.heads.q_heads, self.heads.head_dim, dtype=self.dtype)
        self.native.attend(
            layer,
            q.data_ptr(),
            q.stride(0),
            q.stride(1),
            k.data_ptr(),
            k.stride(0),
            k.stride(1),
            v.data_ptr(),
            v.stride(0),
            v.stride(1),
            out.data_ptr(),
            scale,
            layer_window,
            blank,
        )
        return out


def reference_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    layer_window: int = 0,
    visibility: Visibility | None = None,
    blank: int = 0,
) -> torch.Tensor:
    """What `attend` computes for one sequence, in float64.

    q `[n, q_heads, head_dim]` are the queries of the last n rows of k, v `[kv_heads, length, head_dim]`; returns the
    shape of q.
    """
    n, length, group = q.shape[0], k.shape[1], q.shape[1] // k.shape[0]
    query = torch.arange(length - n, length)[:, None]
    key = torch.arange(length)[None, :]
    seen = key <= query
    if layer_window:
        seen &= key > query - layer_window
    if visibility:
        seen &= (key > query - visibility.window) | (key < visibility.sinks)
    seen &= key >= blank
    k, v = (t.double().repeat_interleave(group, dim=0) for t in (k, v))
    scores = torch.einsum("nhd,hld->hnl", q.double(), k) * scale
    weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    weights = weights.masked_fill(~seen.any(dim=-1)[:, None], 0)  # of no rows the answer is 0
    return torch.einsum("hnl,hld->nhd", weights, v)
