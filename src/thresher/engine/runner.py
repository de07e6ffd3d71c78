"""One forward pass over a ragged batch: new tokens of several sequences, each over its own cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from thresher.attention.base import AttentionMethod
from thresher.attention.index import Index
from thresher.attention.sparse import Shape, SparseMethod
from thresher.cache.sequence import KVLayout, KVSequence
from thresher.kernels import _native
from thresher.kernels.attention import AttentionPlan, SparseReading
from thresher.machine.cost import ModelShape
from thresher.models.load import Model


@dataclass(frozen=True)
class Work:
    """New tokens of one sequence; `logits`: whether those of its last token are wanted.

    method: how a single new token reads the cache, None for densely; several new tokens (a prompt) always do.
    """

    sequence: KVSequence
    token_ids: Sequence[int]
    logits: bool
    method: AttentionMethod | None = None


@dataclass(frozen=True)
class Captured:
    """What the layers of one pass attended with and to, `[layers, tokens, q_heads, head_dim]` each: queries,
    outputs, and what dense attention makes of the same queries."""

    queries: torch.Tensor
    outputs: torch.Tensor
    dense: torch.Tensor


class Runner:
    """Runs batches on a model. Holds nothing of a sequence between passes but scratch memory."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.layout = KVLayout(model.layers, model.heads.kv_heads, model.heads.head_dim, model.dtype)
        self.shape = model_shape(model)
        self._workspace = _native.Workspace()

    def run(self, batch: Sequence[Work]) -> torch.Tensor:
        """Append the tokens to their sequences. Returns float32 logits `[work items with logits, vocab]`, in order.

        If the pass is interrupted, no sequence has gained or lost a token (its memory may have grown, and its index may
        know more of its keys).
        """
        return self._run(batch, AttentionPlan(self.model.heads, self.model.dtype, self._workspace))

    def run_captured(self, batch: Sequence[Work]) -> tuple[torch.Tensor, Captured]:
        """`run`, and what the layers attended with."""
        plan = AttentionPlan(self.model.heads, self.model.dtype, self._workspace)
        tokens = sum(len(work.token_ids) for work in batch)
        heads = self.model.heads
        shape = (self.model.layers, tokens, heads.q_heads, heads.head_dim)
        captured = Captured(*(torch.zeros(shape, dtype=self.model.dtype) for _ in range(3)))
        plan.native.capture(captured.queries.data_ptr(), captured.outputs.data_ptr(), captured.dense.data_ptr())
        return self._run(batch, plan), captured

    def prepare(self, sequence: KVSequence, method: AttentionMethod | None) -> Index | None:
        """The sequence's index for the method, built up to its last rows; None if the method reads it densely.

        Called before every pass, and worth calling before a sequence is forked, so that its forks share what is built.
        """
        if not isinstance(method, SparseMethod) or method.visibility():
            return None
        if sequence.length <= method.least_context(self.shape):
            return None
        index = sequence.index
        if not isinstance(index, Index) or not index.serves(method):
            index = Index(method, Shape(self.model.heads, self.model.dtype), self.model.layers)
            sequence.index = index
        index.use(method)
        index.extend(sequence, lru_cache(lambda n: self.recent_queries(sequence, n)))
        return index

    def recent_queries(self, sequence: KVSequence, n: int) -> torch.Tensor:
        """The queries of the last n tokens (or all), `[layers, n, q_heads, head_dim]`: computed again, densely."""
        n = min(n, sequence.length)
        token_ids = sequence.token_ids[-n:]
        again = sequence.fork()
        again.crop(sequence.length - n)
        return self.run_captured([Work(again, token_ids, logits=False)])[1].queries

    def _run(self, batch: Sequence[Work], plan: AttentionPlan) -> torch.Tensor:
        token_ids: list[int] = []
        positions: list[int] = []
        logit_rows: list[int] = []
        for work in batch:
            sequence, n = work.sequence, len(work.token_ids)
            visibility, sparse = None, None
            if work.method and n == 1:
                visibility = work.method.visibility()
                sparse = self._reading(sequence, work.method)
            sequence.reserve(n)
            plan.add(n, sequence.length, sequence.incoming(n), visibility, sparse)
            token_ids.extend(work.token_ids)
            positions.extend(range(sequence.length, sequence.length + n))
            if work.logits:
                logit_rows.append(len(token_ids) - 1)
        with torch.inference_mode():
            logits = self.model.forward(
                torch.tensor(token_ids), torch.tensor(positions), plan, torch.tensor(logit_rows, dtype=torch.int64)
            )
        for work in batch:
            work.sequence.advance(work.token_ids)
        return logits

    def _reading(self, sequence: KVSequence, method: AttentionMethod) -> SparseReading | None:
        index = self.prepare(sequence, method)
        return index.reading(sequence.length) if index else None


def model_shape(model: Model) -> ModelShape:
    """What the cost of running a model depends on."""
    size = {"bf16": 2, "int8": 1, "float32": 4}[model.weights]
    return ModelShape(
        layers=model.layers,
        q_heads=model.heads.q_heads,
        kv_heads=model.heads.kv_heads,
        head_dim=model.heads.head_dim,
        weight_bytes=model.weight_bytes,
        weight_count=model.weight_bytes // size,
        value_bytes=model.dtype.itemsize,
    )
