"""RMS norm and rotary embedding as single native passes; a stock layer spends most of its overhead on these."""

import torch

from thresher.kernels import _native
from thresher.kernels.native import TYPES, kernel_set, threads


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension; x contiguous bf16 or float32, weight float32."""
    x = x.contiguous()
    y = torch.empty_like(x)
    width = x.shape[-1]
    _native.rms_norm(
        kernel_set(),
        TYPES[x.dtype],
        x.data_ptr(),
        y.data_ptr(),
        weight.data_ptr(),
        x.numel() // width,
        width,
        eps,
        threads(),
    )
    return y


def rope_(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: tuple[int, int, int],
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Rotate q and k in place, after an optional RMS norm of each head.

    qkv `[tokens, (q_heads + 2 kv_heads) * head_dim]`, rows contiguous; cos, sin `[tokens, rotary_dim]` of the same
    dtype; heads = (q_heads, kv_heads, head_dim); q_norm, k_norm float32 `[head_dim]`.
    """
    q_heads, kv_heads, head_dim = heads
    cos, sin = cos.contiguous(), sin.contiguous()
    _native.rope(
        kernel_set(),
        TYPES[qkv.dtype],
        qkv.data_ptr(),
        qkv.stride(0),
        qkv.shape[0],
        q_heads,
        kv_heads,
        head_dim,
        cos.shape[-1],
        cos.data_ptr(),
        sin.data_ptr(),
        0 if q_norm is None else q_norm.data_ptr(),
        0 if k_norm is None else k_norm.data_ptr(),
        eps,
        threads(),
    )


def reference_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """What rms_norm computes, in float64."""
    x = x.double()
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight.double()


def reference_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x `[tokens, heads, head_dim]` by cos, sin `[tokens, rotary_dim]`, in float64."""
    rotary = cos.shape[-1]
    turned, rest = x[..., :rotary].double(), x[..., rotary:].double()
    first, second = turned.chunk(2, dim=-1)
    swapped = torch.cat([-second, first], dim=-1)
    return torch.cat([turned * cos[:, None].double() + swapped * sin[:, None].double(), rest], dim=-1)
