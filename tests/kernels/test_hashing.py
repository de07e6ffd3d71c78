"""Signs of projections, LSH codes and tables against their references, at every instruction set."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.kernels.hashing import (
    MOST_DIRECTIONS,
    lsh_codes,
    lsh_tables,
    pack_signs,
    project,
    reference_codes,
    reference_project,
    unpack_bits,
)
from thresher.kernels.linear import pack_linear

# A sign may differ from the float64 product's where that is below a rounding error: as a share of |key| |direction|.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 4e-3}

# Bits a table and tables: all pairs of the two lists with at most MOST_DIRECTIONS bits in all.
TABLES = [(K, L) for K in (1, 2, 4, 8, 10, 11, 16) for L in (2, 50, 150) if K * L <= MOST_DIRECTIONS]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(
    ("planes", "n", "dim", "count"),
    [(1, 1, 16, 1), (3, 7, 20, 33), (2, 64, 64, 64), (2, 129, 80, 100), (1, 65, 128, 1500), (1, 3, 512, 4000)],
)
def test_projections(isa, dtype, planes, n, dim, count):
    torch.manual_seed(dim)
    keys = (torch.randn(planes, n, dim) + 2 * torch.randn(planes, 1, dim)).to(dtype)
    mean, directions = keys.float().mean(1) + 0.01 * torch.randn(planes, dim), torch.randn(count, dim)
    bits, norms, absolute = project(keys, mean, pack_linear([directions], dtype))
    signs, true_norms, true_absolute = reference_project(keys, mean, directions)
    rounded = directions.to(dtype).double()
    products = (keys.double() - mean.double()[:, None]) @ rounded.T
    doubtful = products.abs() < ROUNDING[dtype] * true_norms[..., None] * rounded.norm(dim=-1)
    got = unpack_bits(bits, count)
    assert ((got == signs) | doubtful).all()
    assert (got != signs).double().mean() < 0.01
    torch.testing.assert_close(norms.double(), true_norms, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(absolute.double(), true_absolute, rtol=ROUNDING[dtype] * 10, atol=1e-5)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_projections_leave_no_stray_bits(isa, dtype):
    """Bits beyond the directions are zero, whatever was in memory: packed directions are padded with zeros."""
    torch.manual_seed(1)
    for count in (1, 31, 32, 33, 63, 65, 97):
        bits, _, _ = project(
            torch.randn(2, 9, 16).to(dtype), torch.zeros(2, 16), pack_linear([torch.randn(count, 16)], dtype)
        )
        assert not unpack_bits(bits, bits.shape[-1] * 64)[..., count:].any()


@pytest.mark.parametrize("dtype", ROUNDING)
def test_projections_of_views_and_zeros(isa, dtype):
    """Planes may lie apart, as layers of a cache do. A key that is its own mean has no positive sign and norm 0."""
    torch.manual_seed(2)
    cache = torch.randn(4, 2, 50, 32).to(dtype)
    keys, mean = cache[:, 0], torch.randn(4, 32)
    packed = pack_linear([torch.randn(70, 32)], dtype)
    for a, b in zip(project(keys, mean, packed), project(keys.contiguous(), mean, packed), strict=True):
        assert torch.equal(a, b)
    same = mean.to(dtype)
    bits, norms, absolute = project(same[:, None].expand(-1, 3, -1).contiguous(), same.float(), packed)
    assert not bits.any()
    assert not norms.any()
    assert not absolute.any()
    with pytest.raises(ValueError, match="rows"):
        project(cache.transpose(2, 3)[:, 0], mean, packed)


@pytest.mark.parametrize(("planes", "n", "count"), [(1, 16, 32), (3, 48, 64), (2, 160, 512)])
def test_packed_signs(planes, n, count):
    """Bit b of word w of key 16 g + j, of direction 32 w + b, lies in [g, w, j]."""
    torch.manual_seed(count)
    signs = torch.rand(planes, n, count) < 0.5
    packed = pack_signs(signs).numpy().view(np.uint32)
    assert packed.shape == (planes, n // 16, count // 32, 16)
    for p, key, direction in torch.randint(0, 2**31, (300, 3)).tolist():
        p, key, direction = p % planes, key % n, direction % count
        word = packed[p, key // 16, direction // 32, key % 16]
        assert bool(word >> (direction % 32) & 1) == bool(signs[p, key, direction])


@pytest.mark.parametrize(("K", "L"), TABLES)
def test_codes(isa, K, L):
    torch.manual_seed(K * L)
    planes, n = 2, 37
    bits = torch.randint(-(2**63), 2**63 - 1, (planes, n, -(-K * L // 64)))
    codes = lsh_codes(bits, K, L)
    assert torch.equal(codes.long(), reference_codes(unpack_bits(bits, K * L), K, L))


def check_tables(codes, K):
    """Each table holds each id once, in its bucket, in order within it."""
    heads, ids = lsh_tables(codes, K)
    planes, tables, n = codes.shape
    assert heads.shape == (planes, tables, 2**K + 1)
    assert bool((heads[..., 0] == 0).all() & (heads[..., -1] == n).all())
    ids, codes = ids.long(), codes.long()
    # Keys sorted by code, equals in order, are the one right answer.
    assert torch.equal(ids, codes.sort(dim=-1, stable=True).indices)
    counts = torch.zeros(planes, tables, 2**K, dtype=torch.int64).scatter_add_(2, codes, torch.ones_like(codes))
    assert torch.equal(heads.long().diff(dim=-1), counts)


@pytest.mark.parametrize(("K", "L"), TABLES)
def test_tables(isa, K, L):
    torch.manual_seed(K + L)
    L = min(L, 8) if K == 16 else L  # 2^16 buckets each
    check_tables(torch.randint(0, 2**K, (2, L, 130)).to(torch.uint16), K)


def test_tables_of_skewed_codes(isa):
    torch.manual_seed(3)
    skewed = (torch.rand(2, 5, 3000).pow(8) * 2**10).to(
        torch.uint16
    )  # most keys in the first buckets, most buckets empty
    check_tables(skewed, 10)
    check_tables(torch.full((1, 3, 500), 1023, dtype=torch.uint16), 10)
    check_tables(torch.full((1, 3, 500), 65535, dtype=torch.uint16), 16)
    check_tables(torch.zeros(1, 2, 500, dtype=torch.uint16), 0)
    check_tables(torch.tensor([[[1]]], dtype=torch.uint16), 1)


def test_tables_of_most_tokens(isa):
    """All 65,536 ids fit, even in one bucket; one more is refused."""
    torch.manual_seed(4)
    check_tables(torch.randint(0, 2, (1, 2, 65536)).to(torch.uint16), 1)
    check_tables(torch.zeros(1, 1, 65536, dtype=torch.uint16), 4)
    with pytest.raises(ValueError, match="16-bit"):
        lsh_tables(torch.zeros(1, 1, 65537, dtype=torch.uint16), 4)


@settings(max_examples=80)
@given(
    st.integers(0, 12),
    st.integers(2, 20),
    st.integers(1, 3),
    st.integers(1, 300),
    st.integers(1, 9),
    st.integers(0, 2**31),
)
def test_any_tables(K, L, planes, n, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = (torch.rand(planes, L, n, generator=generator) ** spread * 2**K).long().clamp(max=2**K - 1)
    check_tables(codes.to(torch.uint16), K)
