"""A whole decoder layer of the Llama family in one native call."""

from dataclasses import dataclass

import torch

from thresher.kernels import _native
from thresher.kernels.attention import AttentionPlan, Heads
from thresher.kernels.linear import ACTIVATIONS, PackedLinear
from thresher.kernels.native import TYPES, kernel_set, threads


@dataclass(frozen=True)
class Norm:
    """An RMS norm: float32 gain `[width]`."""

    gain: torch.Tensor
    eps: float


@dataclass(frozen=True)
class LayerWeights:
    """The parts of a layer: qkv stacks q, k, v; gate_up is a gated pair; head_norms are for each head of q and k."""

    norm: Norm
    qkv: PackedLinear
    head_norms: tuple[Norm, Norm] | None
    out: PackedLinear
    mlp_norm: Norm
    gate_up: PackedLinear
    down: PackedLinear


class NativeLayer:
    """`x += out(attention(norm(x))); x += down(gated(mlp_norm(x)))`, in place.

    layer: its number in the KV cache; scale: of the scores; window: its sliding window, 0 for none; dtype: of
    activations. Equal to running the parts one by one, but for one rounding less at each sum.
    """

    def __init__(
        self, weights: LayerWeights, heads: Heads, dtype: torch.dtype, layer: int, scale: float, window: int
    ) -> None:
        self.weights = weights  # holds the memory that the native layer points to
        head_norms = weights.head_norms
        self._layer = _native.Layer(
            kernel_set(),
            TYPES[dtype],
            TYPES[weights.qkv.data.dtype],
            ACTIVATIONS.index(weights.gate_up.activation),
            _addresses(weights.qkv),
            _addresses(weights.out),
            _addresses(weights.gate_up),
            _addresses(weights.down),
            (weights.norm.gain.data_ptr(), weights.norm.eps),
            (weights.mlp_norm.gain.data_ptr(), weights.mlp_norm.eps),
            (head_norms[0].gain.data_ptr(), head_norms[1].gain.data_ptr(), head_norms[0].eps)
            if head_norms
            else (0, 0, 0.0),
            (heads.q_heads, heads.kv_heads, heads.head_dim),
            layer,
            scale,
            window,
        )

    def run_(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, plan: AttentionPlan) -> None:
        """x `[tokens, width]` contiguous, cos and sin `[tokens, rotary_dim]` contiguous, all of the layer's dtype."""
        self._layer.run(plan.native, x.data_ptr(), x.shape[0], cos.data_ptr(), sin.data_ptr(), cos.shape[-1], threads())


def _addresses(p: PackedLinear) -> tuple[int, int, int, int, int]:
    scale = 0 if p.scale is None else p.scale.data_ptr()
    bias = 0 if p.bias is None else p.bias.data_ptr()
    return p.data.data_ptr(), scale, bias, p.in_features, p.out_features
