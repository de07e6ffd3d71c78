"""One forward pass over a ragged batch: new tokens of several sequences, each over its own cache."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from thresher.cache.sequence import KVLayout, KVSequence
from thresher.kernels import _native
from thresher.kernels.attention import AttentionPlan, Visibility
from thresher.models.load import Model


@dataclass(frozen=True)
class Work:
    """New tokens of one sequence; `logits`: whether those of its last token are wanted. visibility None: dense."""

    sequence: KVSequence
    token_ids: Sequence[int]
    logits: bool
    visibility: Visibility | None = None


class Runner:
    """Runs batches on a model. Holds nothing of a sequence between passes but scratch memory."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.layout = KVLayout(model.layers, model.heads.kv_heads, model.heads.head_dim, model.dtype)
        self._workspace = _native.Workspace()

    def run(self, batch: Sequence[Work]) -> torch.Tensor:
        """Append the tokens to their sequences. Returns float32 logits `[work items with logits, vocab]`, in order.

        If the pass is interrupted, no sequence has changed.
        """
        plan = AttentionPlan(self.model.heads, self.model.dtype, self._workspace)
        token_ids: list[int] = []
        positions: list[int] = []
        logit_rows: list[int] = []
        for work in batch:
            sequence, n = work.sequence, len(work.token_ids)
            sequence.reserve(n)
            plan.add(n, sequence.length, sequence.incoming(n), work.visibility)
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
