"""One forward pass over a ragged batch: new tokens of several sequences, each over its own cache."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

import torch

from thresher.attention.base import AttentionMethod
from thresher.attention.index import Index
from thresher.attention.sparse import Shape, SparseMethod
from thresher.cache.sequence import KVLayout, KVSequence
from thresher.errors import UsageError
from thresher.kernels import _native
from thresher.kernels.attention import AttentionPlan, SparseReading, Visibility
from thresher.machine.cost import ModelShape
from thresher.models.load import Model
from thresher.models.states import StateBatch


@dataclass(frozen=True)
class Work:
    """New tokens of one sequence; `logits`: of how many of its last tokens they are wanted.

    method: how the new tokens read the cache, each as if it came alone, None for densely. Prompts are read densely;
    several tokens with a method are a draft that is verified. draft: the token may be taken back, so the sequence's
    index stays as it is. votes: see `AttentionPlan.add`.
    """

    sequence: KVSequence
    token_ids: Sequence[int]
    logits: int
    method: AttentionMethod | None = None
    draft: bool = False
    votes: torch.Tensor | None = None


@dataclass(frozen=True)
class Captured:
    """What the layers of one pass attended with and to, `[layers, tokens, q_heads, head_dim]` each: queries,
    outputs, and what dense attention makes of the same queries."""

    queries: torch.Tensor
    outputs: torch.Tensor
    dense: torch.Tensor


class Runner:
    """Runs batches on a model, one at a time whoever calls. Holds nothing of a sequence between passes but scratch
    memory."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.layout = KVLayout(model.layers, model.heads.kv_heads, model.heads.head_dim, model.dtype, model.state_shape)
        self.shape = model_shape(model)
        self.index_shape = Shape(model.heads, model.dtype)
        self._workspace = _native.Workspace()  # of one pass at a time
        self._passes = threading.RLock()

    def run(self, batch: Sequence[Work]) -> torch.Tensor:
        """Append the tokens to their sequences. Returns float32 logits `[rows that are wanted, vocab]`, in order.

        If the pass is interrupted, no sequence has gained or lost a token (its memory may have grown, and its index may
        know more of its keys).
        """
        return self._run(batch, self._plan())

    def run_captured(self, batch: Sequence[Work]) -> tuple[torch.Tensor, Captured]:
        """`run`, and what the layers attended with."""
        plan = self._plan()
        captured = Captured(*(self._captured_like(batch) for _ in range(3)))
        plan.native.capture(captured.queries.data_ptr(), captured.outputs.data_ptr(), captured.dense.data_ptr())
        return self._run(batch, plan), captured

    def run_with_queries(self, batch: Sequence[Work]) -> tuple[torch.Tensor, torch.Tensor]:
        """`run`, and the queries of all tokens `[layers, tokens, q_heads, head_dim]`."""
        plan = self._plan()
        queries = self._captured_like(batch)
        plan.native.capture(queries.data_ptr(), 0, 0)
        return self._run(batch, plan), queries

    def dense_up_to(self, method: AttentionMethod | None) -> int:
        """Contexts of up to this many tokens are read densely, as a sparse method would not win there."""
        if not isinstance(method, SparseMethod) or method.visibility():
            return 0
        return method.least_context(self.shape)

    def fitted(self, method: SparseMethod) -> SparseMethod:
        """The method as this model needs it: first rows of a cache that hold nothing are not to be chosen from."""
        return replace(method, sinks=max(method.sinks, self.model.blank)) if self.model.blank else method

    def index_for(
        self, sequence: KVSequence, method: AttentionMethod | None, length: int | None = None
    ) -> Index | None:
        """The sequence's index for the method, as far as it is built (at first, nothing); None if the method reads
        the sequence densely at its length, or at another."""
        if not isinstance(method, SparseMethod) or method.visibility():
            return None
        length = sequence.length if length is None else length
        if length <= self.dense_up_to(method):
            return None
        method = self.fitted(method)
        index = sequence.index
        if not isinstance(index, Index) or not index.serves(method):
            index = Index(method, self.index_shape, self.model.layers)
            sequence.index = index
        index.use(method, length)
        return index

    def verifiable(self, sequence: KVSequence, method: AttentionMethod | None, most: int) -> int:
        """How many new tokens, 1 to `most`, a pass can verify: each reads as it would alone up to where the index of
        a sparse method begins or grows, as it does by itself."""
        if not isinstance(method, SparseMethod) or method.visibility():
            return most
        index = self.index_for(sequence, method)
        if index is None:
            return min(most, self.dense_up_to(method) - sequence.length + 1)
        n = 1
        while n < most and index.target(sequence.length + n) <= index.covered:
            n += 1
        return n

    def prepare(self, sequence: KVSequence, method: AttentionMethod | None) -> Index | None:
        """`index_for`, built as far as the next token needs it, and the recurrent state at the end of the sequence.

        Called before every pass, and worth calling before a sequence is forked, so that its forks share what is built.
        """
        self.catch_up(sequence)
        index = self.index_for(sequence, method)
        if index:
            index.extend(sequence, lru_cache(lambda n: self.recent_queries(sequence, n)))
        return index

    def recent_queries(self, sequence: KVSequence, n: int) -> torch.Tensor:
        """The queries of the last n tokens (or all), `[layers, n, q_heads, head_dim]`: computed again, densely."""
        n = min(n, sequence.length)
        again = sequence.view(sequence.length - n)
        return self.run_with_queries([Work(again, sequence.token_ids[-n:], logits=0)])[1]

    def _plan(self) -> AttentionPlan:
        return AttentionPlan(self.model.heads, self.model.dtype, self._workspace)

    def _captured_like(self, batch: Sequence[Work]) -> torch.Tensor:
        heads, tokens = self.model.heads, sum(len(work.token_ids) for work in batch)
        return torch.zeros(self.model.layers, tokens, heads.q_heads, heads.head_dim, dtype=self.model.dtype)

    def _run(self, batch: Sequence[Work], plan: AttentionPlan) -> torch.Tensor:
        with self._passes:
            return self._pass(batch, plan)

    def catch_up(self, sequence: KVSequence) -> None:
        """Compute the recurrent state at the end of a sequence that was cropped to where no snapshot is, from the last
        one before: the tokens since then once more, whose rows are those that are there. Every pass does so itself."""
        if (known := sequence.state_length) == sequence.length:
            return
        again = sequence.view(known)
        self.run([Work(again, sequence.token_ids[known:], logits=0)])
        sequence.states = again.states

    def _states(self, batch: Sequence[Work]) -> tuple[StateBatch | None, list[list[int]]]:
        """The recurrent states of a pass, and at which positions of each sequence they are kept."""
        if not self.layout.state_bytes:
            return None, [[] for _ in batch]
        kept = [self.layout.states_of(w.sequence.length, w.sequence.length + len(w.token_ids)) for w in batch]
        starts = [0, *accumulate(len(w.token_ids) for w in batch)]
        begins = [start - w.sequence.length for start, w in zip(starts, batch, strict=False)]
        tokens = [begin + p - 1 for begin, positions in zip(begins, kept, strict=True) for p in positions]
        layers, size = self.layout.state
        states = StateBatch(
            starts,
            torch.tensor(tokens, dtype=torch.int64),
            before=torch.stack([w.sequence.state() for w in batch], dim=1),
            after=torch.empty(layers, len(tokens), size, dtype=torch.float32),
        )
        return states, kept

    def _pass(self, batch: Sequence[Work], plan: AttentionPlan) -> torch.Tensor:
        for work in batch:
            self.catch_up(work.sequence)
        token_ids: list[int] = []
        positions: list[int] = []
        logit_rows: list[int] = []
        for work in batch:
            sequence, n = work.sequence, len(work.token_ids)
            if sequence.layout != self.layout:
                raise UsageError("the context is of another model; read the document with this one")
            readings = self._readings(work)
            sequence.reserve(n)
            if readings:
                for i, (visibility, sparse) in enumerate(readings):
                    plan.add(1, sequence.length + i, sequence.incoming(i + 1), visibility, sparse)
            else:
                plan.add(n, sequence.length, sequence.incoming(n), votes=work.votes)
            token_ids.extend(work.token_ids)
            positions.extend(range(sequence.length, sequence.length + n))
            logit_rows.extend(range(len(token_ids) - work.logits, len(token_ids)))
        plan.states, kept = self._states(batch)
        with torch.inference_mode():
            logits = self.model.forward(
                torch.tensor(token_ids), torch.tensor(positions), plan, torch.tensor(logit_rows, dtype=torch.int64)
            )
        for work in batch:
            work.sequence.check()
        at = 0
        for work, positions in zip(batch, kept, strict=True):
            # Copies, each with memory of its own: snapshots of one pass are let go at different times.
            snapshots = {p: plan.states.after[:, at + i].clone() for i, p in enumerate(positions)}
            at += len(positions)
            work.sequence.advance(work.token_ids, snapshots)
        return logits

    def _readings(self, work: Work) -> list[tuple[Visibility | None, SparseReading | None]]:
        """What each new token reads; nothing if all read densely."""
        method, sequence = work.method, work.sequence
        if method is None:
            return []
        if visibility := method.visibility():
            return [(visibility, None)] * len(work.token_ids)
        if not work.draft:
            self.prepare(sequence, method)
        found: list[SparseReading | None] = []
        for length in range(sequence.length, sequence.length + len(work.token_ids)):
            index = self.index_for(sequence, method, length)
            found.append(index.reading(length) if index else None)
        return [(None, sparse) for sparse in found] if any(found) else []


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
        state_bytes=4 * model.state_shape[0] * model.state_shape[1],
    )
