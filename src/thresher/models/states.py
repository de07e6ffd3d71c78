"""Recurrent state of a model's sequences in one pass: blocks of fixed size a layer, beside the KV cache.

A model that has such states says so by a property `state_shape`, (layers, numbers of a layer). Its forward finds the
`StateBatch` of a pass as `states` of the plan that travels through it (models/interface.py).
"""

from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch


def state_shape_of(module: Any) -> tuple[int, int]:
    """(layers, float32 numbers of a layer) that a sequence of this model carries; (0, 0): none."""
    layers, size = getattr(module, "state_shape", (0, 0))
    return int(layers), int(size)


@dataclass(eq=False)
class StateBatch:
    """States of the sequences whose new tokens lie one behind the other in a flattened batch.

    starts: where each sequence's tokens begin, and the end of the last. kept: int64, the tokens of the batch after
    which the state is wanted. before `[layers, sequences, size]` and after `[layers, len(kept), size]` are float32.
    """

    starts: list[int]
    kept: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor
    _lags: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @classmethod
    def fresh(cls, shape: tuple[int, int], counts: list[int]) -> "StateBatch":
        """Sequences that begin here with so many tokens each, of which the last states are kept."""
        layers, size = shape
        starts = [0, *accumulate(counts)]
        kept = torch.tensor([end - 1 for end in starts[1:]])
        states = torch.zeros(2, layers, len(counts), size, dtype=torch.float32)
        return cls(starts, kept, *states)

    def lagged(self, x: torch.Tensor, before: torch.Tensor, lag: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A stream `[tokens, ...]` as it was `lag` tokens ago in its sequence, and the last `lag` rows at each of the
        kept tokens `[kept, lag, ...]`. before `[sequences, lag, ...]`: the last rows of each sequence so far."""
        if lag not in self._lags:
            self._lags[lag] = self._gather(lag)
        then, last = self._lags[lag]
        pool = torch.cat([before.flatten(0, 1).to(x.dtype), x])
        return pool[then], pool[last]

    def _gather(self, lag: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where in [rows of before, new rows] the rows of `lagged` are."""
        sequences = len(self.starts) - 1
        starts = torch.tensor(self.starts)
        tokens = torch.arange(self.starts[-1])
        which = torch.repeat_interleave(torch.arange(sequences), starts.diff())

        def at(token: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
            new = token >= starts[sequence]
            return torch.where(new, sequences * lag + token, (sequence + 1) * lag + token - starts[sequence])

        back = torch.arange(1 - lag, 1)
        return at(tokens - lag, which), at(self.kept[:, None] + back, which[self.kept][:, None])
