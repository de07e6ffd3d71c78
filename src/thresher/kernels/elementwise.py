"""RMS norm and rotary embedding as single native passes; a stock layer spends most of its overhead on these."""

import torch

from thresher.kernels import _native
from thresher.kernels.native import TYPES, kernel_set, threads


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension; x bf16 or float32, weight float32 `[width]`.

    Raises ValueError for other dtypes or shapes.
    """
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty_like(x)
    width = x.shape[-1]
    if x.dtype not in TYPES or weight.dtype != torch.float32 or weight.shape != (width,):
        raise ValueError(f"x {x.dtype} {tuple(x.shape)} does not go with a gain {weight.dtype} {tuple(weight.shape)}")
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
    dtype; heads = (q_heads, kv_heads, head_dim); q_norm, k_norm float32 `[head_dim]`, contiguous.

    Raises ValueError for other dtypes or shapes.
    """
    q_heads, kv_heads, head_dim = heads
    cos, sin = cos.contiguous(), sin.contiguous()
    if qkv.dim() != 2 or qkv.shape[1] != (q_heads + 2 * kv_heads) * head_dim or qkv.stride(1) != 1:
        raise ValueError(f"qkv {tuple(qkv.shape)}: needs contiguous rows of {q_heads} + 2 x {kv_heads} x {head_dim}")
    check_rotary(cos, sin, qkv.dtype, qkv.shape[0], head_dim)
    for gain in (q_norm, k_norm):
        if gain is not None and (gain.dtype != torch.float32 or gain.shape != (head_dim,) or gain.stride(0) != 1):
            raise ValueError(f"a norm of heads {gain.dtype} {tuple(gain.shape)}: needs float32 ({head_dim},)")
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


def check_rotary(cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype, tokens: int, head_dim: int) -> None:
    """ValueError unless cos and sin are contiguous `[tokens, rotary_dim]` of the dtype, for heads of this width."""
    rotary_dim = cos.shape[-1]
    for table in (cos, sin):
        if table.dtype != dtype or table.shape != (tokens, rotary_dim) or not table.is_contiguous():
            raise ValueError(f"rotary table {table.dtype} {tuple(table.shape)}: needs {dtype} ({tokens}, {rotary_dim})")
    if dtype not in TYPES or rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise ValueError(f"rotary embedding of {rotary_dim} values in {dtype} for heads of {head_dim}")


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
