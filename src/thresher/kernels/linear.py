"""Weight-only linear layers on weights packed once at load: bf16, float32, or int8 with one scale per output."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from thresher.kernels import _native
from thresher.kernels.native import PANEL, TYPES, kernel_set, threads

Activation = Literal["none", "silu", "gelu_tanh"]
ACTIVATIONS: tuple[Activation, ...] = ("none", "silu", "gelu_tanh")


@dataclass(frozen=True)
class PackedLinear:
    """`y = x @ w.T * scale + bias`, or `y = act(gate(x)) * up(x)` when two matrices were packed with an activation.

    data: panels of 32 outputs, `[panels, in / pack, 32, pack]` with pack 2 (bf16, int8) or 1 (float32).
    scale, bias: float32 `[panels * 32]` or None.
    """

    data: torch.Tensor
    scale: torch.Tensor | None
    bias: torch.Tensor | None
    in_features: int
    out_features: int
    activation: Activation

    @property
    def bytes(self) -> int:
        """Bytes one pass over the weights reads."""
        extra = [t for t in (self.scale, self.bias) if t is not None]
        return sum(t.numel() * t.element_size() for t in (self.data, *extra))

    def __call__(self, x: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        """x `[rows, in]`, bf16 (bf16, int8 weights) or float32, rows contiguous -> `[rows, out]`."""
        if x.stride(-1) != 1 or x.shape[-1] != self.in_features:
            raise ValueError(f"x {tuple(x.shape)}: needs contiguous rows of {self.in_features}")
        if (x.dtype == torch.float32) != (self.data.dtype == torch.float32) or x.dtype not in TYPES:
            raise ValueError(f"x of {x.dtype} does not go with weights of {self.data.dtype}")
        y = torch.empty(x.shape[0], self.out_features, dtype=out_dtype or x.dtype)
        _native.linear(
            kernel_set(),
            TYPES[self.data.dtype],
            ACTIVATIONS.index(self.activation),
            x.data_ptr(),
            x.stride(0),
            x.shape[0],
            self.data.data_ptr(),
            0 if self.scale is None else self.scale.data_ptr(),
            0 if self.bias is None else self.bias.data_ptr(),
            y.data_ptr(),
            self.out_features,
            self.out_features,
            self.in_features,
            y.dtype == torch.float32,
            threads(),
        )
        return y


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 weights `[out, in]` and float32 scales `[out]`: round to nearest, the largest of a row becomes 127."""
    scale = weight.float().abs().amax(dim=1) / 127
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (weight.float() / divisor[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def pack_linear(
    weights: Sequence[torch.Tensor],
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    activation: Activation = "none",
) -> PackedLinear:
    """Pack one matrix, several stacked ones (q, k, v), or with an activation a pair (gate, up).

    weights: each `[out, in]` of one width; dtype: torch.bfloat16, float32 or int8; bias: `[sum of out]`.
    """
    pack = 1 if dtype == torch.float32 else 2
    matrix = torch.cat(list(weights))
    if matrix.shape[1] % pack:
        raise ValueError(f"packing needs an even number of inputs, not {matrix.shape[1]}")
    out = matrix.shape[0]
    scale = None
    if dtype == torch.int8:
        matrix, scale = quantize_rows(matrix)
    values = [t for t in (matrix.to(dtype), scale, bias) if t is not None]
    if activation == "none":
        rows = [_pad_rows(t) for t in values]
    else:  # panels alternate: gate, up, gate, up ...
        gates, ups = zip(*(map(_pad_rows, t.chunk(2)) for t in values), strict=True)
        rows = [
            torch.stack([g.unflatten(0, (-1, PANEL)), u.unflatten(0, (-1, PANEL))], dim=1).flatten(0, 2)
            for g, u in zip(gates, ups, strict=True)
        ]
        out //= 2
    packed, *rest = rows
    floats = [t.float().contiguous() for t in rest]
    return PackedLinear(
        data=packed.view(-1, PANEL, packed.shape[1] // pack, pack).transpose(1, 2).contiguous(),
        scale=floats.pop(0) if scale is not None else None,
        bias=floats.pop(0) if bias is not None else None,
        in_features=packed.shape[1],
        out_features=out,
        activation=activation,
    )


def packed_shape(out: int, inputs: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """The shape of `data` of a matrix `[out, inputs]`."""
    pack = 1 if dtype == torch.float32 else 2
    return -(-out // PANEL), inputs // pack, PANEL, pack


def _pad_rows(t: torch.Tensor) -> torch.Tensor:
    missing = -t.shape[0] % PANEL
    return F.pad(t, (0, 0) * (t.dim() - 1) + (0, missing))


def reference_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: Activation = "none"
) -> torch.Tensor:
    """What PackedLinear computes, in float64. x `[rows, in]`, weight `[out, in]` -> `[rows, out]`."""
    y = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    if activation == "none":
        return y
    gate, up = y.chunk(2, dim=-1)
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up
