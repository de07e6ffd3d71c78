"""Signs of random projections of keys, packed for scanning, and LSH codes and tables made of them."""

import torch

from thresher.kernels import _native
from thresher.kernels.linear import PackedLinear
from thresher.kernels.native import TYPES, kernel_set, threads

MOST_DIRECTIONS = 4000  # what one query is projected on at most
MOST_SIGNS = 512
TABLE_TOKENS = 65536  # ids in a table have 16 bits


def project(
    keys: torch.Tensor, mean: torch.Tensor, directions: PackedLinear
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Signs of `(keys - mean) @ directions.T` for keys `[planes, n, head_dim]` (bf16 or float32), mean `[planes,
    head_dim]`.

    Returns the signs as bits of int64 words `[planes, n, ceil(count / 64)]`, lowest first; float32 norms of the
    centred keys `[planes, n]`; and float32 sums of the absolute products `[planes, n]`.
    """
    planes, n, dim = keys.shape
    if keys.stride(2) != 1 or keys.stride(1) != dim or dim > 512:
        raise ValueError("rows of a plane must lie together, with at most 512 numbers each")
    count = directions.out_features
    bits = torch.empty(planes, n, -(-count // 64), dtype=torch.int64)
    norms, absolute = torch.empty(planes, n), torch.empty(planes, n)
    mean = mean.float().contiguous()
    _native.project(
        kernel_set(),
        TYPES[keys.dtype],
        keys.data_ptr(),
        planes,
        n,
        keys.stride(0),
        dim,
        mean.data_ptr(),
        directions.data.data_ptr(),
        count,
        bits.data_ptr(),
        norms.data_ptr(),
        absolute.data_ptr(),
        threads(),
    )
    return bits, norms, absolute


def reference_project(
    keys: torch.Tensor, mean: torch.Tensor, directions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `project` computes, in float64; directions `[count, head_dim]`. Signs come as bool `[planes, n, count]`."""
    centred = keys.double() - mean.double()[:, None]
    products = centred.to(keys.dtype).double() @ directions.to(keys.dtype).double().T
    return products > 0, centred.norm(dim=-1), products.abs().sum(-1)


def unpack_bits(bits: torch.Tensor, count: int) -> torch.Tensor:
    """int64 words `[..., words]` -> bool `[..., count]`."""
    spread = bits[..., None] >> torch.arange(64) & 1
    return spread.flatten(-2)[..., :count].bool()


def pack_signs(signs: torch.Tensor) -> torch.Tensor:
    """bool `[planes, n, count]` as the scan wants them, 16 keys together: int32 `[planes, n / 16, count / 32, 16]`.

    n is a multiple of 16, count one of 32.
    """
    planes, n, count = signs.shape
    bits = signs.view(planes, n // 16, 16, count // 32, 4, 8).to(torch.uint8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    packed = (bits * weights).sum(-1, dtype=torch.uint8).view(torch.int32)[..., 0]
    return packed.transpose(2, 3).contiguous()


def lsh_codes(bits: torch.Tensor, key_bits: int, tables: int) -> torch.Tensor:
    """Bits `[planes, n, words]` -> uint16 codes `[planes, tables, n]`; bit b of code l is bit l * key_bits + b."""
    planes, n, _ = bits.shape
    codes = torch.empty(planes, tables, n, dtype=torch.uint16)
    _native.codes(kernel_set(), bits.data_ptr(), planes, n, key_bits, tables, codes.data_ptr(), threads())
    return codes


def reference_codes(signs: torch.Tensor, key_bits: int, tables: int) -> torch.Tensor:
    """bool `[planes, n, key_bits * tables]` -> int64 codes `[planes, tables, n]`."""
    fields: torch.Tensor = signs.view(*signs.shape[:2], tables, key_bits).long() << torch.arange(key_bits)
    return fields.sum(-1).transpose(1, 2)


def lsh_tables(codes: torch.Tensor, key_bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """uint16 codes `[planes, tables, n]` -> heads `[planes, tables, 2^K + 1]` (uint32 as int32) and ids uint16 like
    codes: the keys of bucket c of a table are `ids[heads[c] : heads[c + 1]]`, in order."""
    planes, tables, n = codes.shape
    if n > TABLE_TOKENS:
        raise ValueError(f"{n} keys in tables of 16-bit ids")
    heads = torch.empty(planes, tables, 2**key_bits + 1, dtype=torch.int32)
    ids = torch.empty_like(codes)
    _native.tables(
        kernel_set(), codes.data_ptr(), planes, n, key_bits, tables, heads.data_ptr(), ids.data_ptr(), threads()
    )
    return heads, ids
