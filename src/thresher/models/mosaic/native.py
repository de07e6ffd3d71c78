"""Persistent memory on packed weights: for each head a product with the stored keys, a softmax, one with the values.

Every row is computed alike whatever stands beside it, so answers do not depend on batches and chunks, as torch's
batched products do in their last bits.
"""

import copy

import torch
from torch import nn

from thresher.kernels.linear import PackedLinear, pack_linear
from thresher.kernels.memory import persistent_memory
from thresher.models.mosaic.memory import KeyExtractor, PersistentMemory, scale_of
from thresher.models.states import StateBatch


class NativePersistentMemory(nn.Module):
    """`PersistentMemory` for inference. Its scales are multiplied into the stored keys and values.

    stored_keys, stored_values: packed, one of each a head.
    """

    def __init__(self, memory: PersistentMemory, weights: torch.dtype) -> None:
        super().__init__()
        self.keys: KeyExtractor = memory.keys
        keys, values = memory.stored_keys.detach().float(), memory.stored_values.detach().float()
        keys = keys * scale_of(memory.key_scale.detach().float()).square()[:, None]
        values = values * scale_of(memory.value_scale.detach().float())[:, None]
        self.stored_keys = [pack_linear([k], weights) for k in keys]
        self.stored_values = [pack_linear([v.T.contiguous()], weights) for v in values]
        self.state_sizes = memory.state_sizes
        self.unscaled = torch.ones(memory.heads)

    @property
    def packed(self) -> list[PackedLinear]:
        return [*self.stored_keys, *self.stored_values]

    def recurrent(self, x: torch.Tensor, batch: StateBatch, before: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As PersistentMemory.recurrent."""
        keys, after = self.keys.recurrent(x, batch, before, self.unscaled)
        return persistent_memory(keys, self.stored_keys, self.stored_values).flatten(1), after


def native_persistent_memory(memory: PersistentMemory, weights: torch.dtype, tolerance: float) -> nn.Module | None:
    """The memory on packed weights, if in float32 it gives the numbers of the memory it replaces; else None."""
    if memory.size % 2 or memory.head_dim % 2:
        return None
    stock = copy.deepcopy(memory).float().eval()
    d = memory.heads * memory.head_dim
    generator = torch.Generator().manual_seed(0)
    x, before = torch.randn(5, d, generator=generator), torch.randn(2, d, generator=generator)
    batch = StateBatch.fresh((1, d), [4, 1])
    expected, _ = stock.recurrent(x, batch, before)
    answers, _ = NativePersistentMemory(stock, torch.float32).recurrent(x, batch, before)
    near = (answers - expected).abs().max() <= tolerance * expected.abs().max()
    return NativePersistentMemory(memory, weights) if near else None
