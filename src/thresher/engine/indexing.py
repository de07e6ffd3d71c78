"""Indexes of sparse methods are built beside the passes, by a thread of their own."""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import lru_cache

import torch

from thresher.attention.base import AttentionMethod
from thresher.attention.index import Growth, Index, index_bytes_per_token
from thresher.attention.snapkv import SnapKV
from thresher.attention.sparse import RECENT_QUERIES
from thresher.decoding.runner import Runner
from thresher.engine.requests import Request
from thresher.engine.sample import Holder


class IndexBuilder:
    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._thread = ThreadPoolExecutor(1, "thresher-index")  # started when there is something to build

    def ready(self, holder: Holder, method: AttentionMethod | None) -> bool:
        """Whether the index of a sequence is built as far as its next token needs; begins what will be needed next.
        Which token first reads a block does not depend on when it was ready."""
        sequence = holder.sequence
        index = self._runner.index_for(sequence, method)
        if index is None:
            return True
        target, growth = index.target(sequence.length), holder.growth
        if growth is not None and target > index.covered and growth.done():
            holder.growth = None
            if holder.growth_target == target:
                index.adopt(growth.result())
                return True
            growth = None
        if growth is None:
            wanted = target if target > index.covered else index.ahead(sequence.length)
            if wanted > index.covered:
                holder.growth, holder.growth_target = self._begin(holder, index, wanted), wanted
        return target <= index.covered

    def wait(self, holders: Iterable[Holder], seconds: float) -> None:
        """Until one of their indexes is built, or the time is over."""
        growing = [holder.growth for holder in holders if holder.growth is not None]
        if growing:
            wait(growing, timeout=seconds, return_when="FIRST_COMPLETED")

    def observed(self, request: Request, holder: Holder) -> int:
        """The last tokens of a prompt whose queries its index is fitted to, 0 if it needs none."""
        method, index = request.indexed, holder.sequence.index
        if request.grow or method is None or len(request.token_ids) < RECENT_QUERIES:
            return 0
        if request.prompt_length <= self._runner.dense_up_to(method):
            return 0
        if not index_bytes_per_token(method, self._runner.index_shape, self._runner.model.layers):
            return 0
        if isinstance(index, Index) and index.blocks and index.serves(method):
            return 0
        return max(RECENT_QUERIES, method.observe if isinstance(method, SnapKV) else 0)

    def _begin(self, holder: Holder, index: Index, target: int) -> Future[Growth]:
        snapshot, captured = holder.sequence.view(holder.sequence.length), holder.queries

        @lru_cache
        def queries(n: int) -> torch.Tensor:
            if captured is not None and captured.shape[1] >= min(n, snapshot.length):
                return captured[:, -n:]
            return self._runner.recent_queries(snapshot, n)

        return self._thread.submit(index.grown, snapshot, target, queries)
