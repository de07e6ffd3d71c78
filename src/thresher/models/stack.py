"""The plain loop over native layers, in place of transformers' forward: the same operations without its overhead.

Transformers spends Python on every token (masks, modules, outputs, one copy a layer). Where all layers are native
nothing of that is needed. The loop stands in for a model's forward only if both give the same bits.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from thresher.kernels import _native
from thresher.kernels.attention import AttentionPlan, Heads
from thresher.kernels.layer import NativeLayer
from thresher.models.fuse import DecoderLayer, layer_types, rotary_arguments, text_model
from thresher.models.interface import forward

TOKENS = 6  # of a proof


@dataclass(frozen=True)
class Stack:
    """A decoder-only model as its parts. kinds: each layer's argument to the rotary embedding, () if it takes none."""

    embedding: nn.Module
    rotary: nn.Module
    kinds: tuple[tuple[str, ...], ...]
    layers: tuple[NativeLayer, ...]
    norm: nn.Module
    head: nn.Module

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, plan: AttentionPlan, logit_rows: torch.Tensor
    ) -> torch.Tensor:
        """As interface.forward: int64 `[tokens]` each -> float32 logits `[logit_rows, vocab]`."""
        x: torch.Tensor = self.embedding(token_ids).contiguous()
        tables = {}
        for kind in set(self.kinds):
            cos, sin = self.rotary(x[None], positions[None], *kind)
            tables[kind] = cos[0].to(x.dtype).contiguous(), sin[0].to(x.dtype).contiguous()
        for layer, kind in zip(self.layers, self.kinds, strict=True):
            layer.run_(x, *tables[kind], plan)
        # x[logit_rows] would use torch's threads from 3,000 numbers on, beside those of the kernels: 5 ms a pass.
        logits: torch.Tensor = self.head(self.norm(x.index_select(0, logit_rows)))
        return logits.float()


def plain_stack(module: Any, heads: Heads) -> Stack | None:
    """The loop for a model whose layers are all native, if it gives the bits of the model's own forward; else None."""
    text = text_model(module)
    layers = getattr(text, "layers", None)
    parts: list[Any] = [getattr(text, name, None) for name in ("embed_tokens", "rotary_emb", "norm")]
    head = module.get_output_embeddings()
    if not layers or head is None or None in parts or not all(type(layer) is DecoderLayer for layer in layers):
        return None
    arguments, types = rotary_arguments(module), layer_types(module)
    if len(types) != len(layers) or not set(types) <= set(arguments):
        return None
    kinds = tuple(arguments[kind] for kind in types)
    stack = Stack(parts[0], parts[1], kinds, tuple(layer.native for layer in layers), parts[2], head)
    with torch.inference_mode():
        try:
            outputs = [_prove(run, module, heads, len(layers)) for run in (partial(forward, module), stack.forward)]
        except Exception:  # a part that is called another way than ours
            return None
    return stack if all(torch.equal(a, b) for a, b in zip(*outputs, strict=True)) else None


def _prove(run: Any, module: Any, heads: Heads, layers: int) -> list[torch.Tensor]:
    """Logits and cached rows of two passes, the second after the first, with some of the logits."""
    dtype = next(module.parameters()).dtype
    rows = torch.zeros(layers, 2, heads.kv_heads, 2 * TOKENS, heads.head_dim, dtype=dtype)
    token_ids = torch.arange(2 * TOKENS) * 7 % module.config.get_text_config().vocab_size
    outputs = [rows]
    for begin, wanted in ((0, torch.arange(TOKENS)), (TOKENS, torch.tensor([TOKENS - 1]))):
        plan = AttentionPlan(heads, dtype, _native.Workspace())
        plan.add(TOKENS, begin, [(rows, begin + TOKENS)])
        positions = torch.arange(begin, begin + TOKENS)
        outputs.append(run(token_ids[positions], positions, plan, wanted))
    return outputs
