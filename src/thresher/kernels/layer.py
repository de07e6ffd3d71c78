"""A whole decoder layer of the Llama family in one native call."""

from dataclasses import dataclass

import torch

from thresher.kernels import _native
from thresher.kernels.attention import AttentionPlan, Heads
from thresher.kernels.elementwise import check_rotary
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
        self.dtype = dtype
        self.head_dim = heads.head_dim
        head_norms = weights.head_norms
        _check_shapes(weights, heads)
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
        """x `[tokens, width]` contiguous, cos and sin `[tokens, rotary_dim]` contiguous, all of the layer's dtype.

        Raises ValueError for others.
        """
        width = self.weights.out.out_features
        if x.dtype != self.dtype or x.shape[1:] != (width,) or not x.is_contiguous():
            raise ValueError(f"x {x.dtype} {tuple(x.shape)}: needs {self.dtype} [tokens, {width}]")
        check_rotary(cos, sin, self.dtype, x.shape[0], self.head_dim)
        self._layer.run(plan.native, x.data_ptr(), x.shape[0], cos.data_ptr(), sin.data_ptr(), cos.shape[-1], threads())


def _check_shapes(weights: LayerWeights, heads: Heads) -> None:
    """ValueError for parts that do not fit each other: the native code goes by their addresses."""
    width, mixed, head_norms = weights.qkv.in_features, heads.q_heads * heads.head_dim, weights.head_norms or ()
    shapes = {
        "qkv": (weights.qkv, width, mixed + 2 * heads.kv_heads * heads.head_dim),
        "out": (weights.out, mixed, width),
        "gate_up": (weights.gate_up, width, weights.down.in_features),
        "down": (weights.down, weights.gate_up.out_features, width),
    }
    for name, (packed, needed_in, needed_out) in shapes.items():
        if (packed.in_features, packed.out_features) != (needed_in, needed_out):
            raise ValueError(
                f"a layer's {name}: {packed.in_features} -> {packed.out_features} where {needed_in} -> "
                f"{needed_out} is needed"
            )
        if packed.data.dtype != weights.qkv.data.dtype:
            raise ValueError(f"a layer's {name}: {packed.data.dtype} where {weights.qkv.data.dtype} is needed")
    gains = [(norm.gain, width) for norm in (weights.norm, weights.mlp_norm)]
    for gain, size in [*gains, *((norm.gain, heads.head_dim) for norm in head_norms)]:
        if gain.dtype != torch.float32 or gain.shape != (size,) or not gain.is_contiguous():
            raise ValueError(f"a layer's norm: {gain.dtype} {tuple(gain.shape)} where float32 ({size},) is needed")


def _addresses(p: PackedLinear) -> tuple[int, int, int, int, int]:
    scale = 0 if p.scale is None else p.scale.data_ptr()
    bias = 0 if p.bias is None else p.bias.data_ptr()
    return p.data.data_ptr(), scale, bias, p.in_features, p.out_features
