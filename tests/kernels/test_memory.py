"""Keys, values and learned pairs of associative memories against their float64 references, at every instruction set."""

import pytest
import torch

from thresher.kernels.linear import pack_linear
from thresher.kernels.memory import (
    memory_keys,
    memory_values,
    persistent_memory,
    reference_memory_keys,
    reference_memory_values,
    reference_persistent_memory,
)

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
SHAPES = pytest.mark.parametrize(("heads", "head_dim"), [(4, 16), (3, 10), (1, 100)])
COUNTS = pytest.mark.parametrize("counts", [[1], [1, 1, 1], [5, 1, 40], [0, 3, 0]])


def case(counts, heads, head_dim, dtype=torch.float32):
    torch.manual_seed(sum(counts))
    starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
    x, before = torch.randn(starts[-1], heads, head_dim).to(dtype), torch.randn(len(counts), heads, head_dim)
    return starts, x, before, torch.rand(heads), 0.5 + torch.rand(heads)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gated", [False, True])
@COUNTS
@SHAPES
def test_keys(isa, dtype, gated, counts, heads, head_dim):
    starts, x, before, _, scale = case(counts, heads, head_dim, dtype)
    decay = torch.rand(starts[-1] if gated else 1, heads)
    expected, expected_averages = reference_memory_keys(x, decay, starts, before, scale)
    keys, averages = memory_keys(x, decay, starts, before, scale)
    assert keys.dtype == dtype
    assert torch.allclose(averages.double(), expected_averages, rtol=1e-5, atol=1e-5)
    assert (keys.double() - expected).abs().max() < TOLERANCE[dtype] * 2


@pytest.mark.parametrize("dtype", TOLERANCE)
@COUNTS
@SHAPES
def test_values(isa, dtype, counts, heads, head_dim):
    starts, x, before, share, scale = case(counts, heads, head_dim, dtype)
    values = memory_values(x, starts, before, share, scale)
    assert values.dtype == dtype
    expected = reference_memory_values(x, starts, before, share, scale)
    assert (values.double() - expected).abs().max() < TOLERANCE[dtype] * 2


def test_zeros_have_no_direction(isa):
    starts, x, before, share, scale = case([3], 2, 16)
    nothing = torch.zeros_like(x)
    keys, averages = memory_keys(nothing, torch.rand(1, 2), starts, torch.zeros_like(before), scale)
    values = memory_values(nothing, starts, torch.zeros_like(before), share, scale)
    assert not keys.any()
    assert not averages.any()
    assert not values.any()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_bits_are_the_same_however_a_sequence_is_cut(isa, dtype):
    _, x, before, share, scale = case([100], 3, 20, dtype)
    decay = torch.rand(100, 3)
    keys, averages = memory_keys(x, decay, [0, 100], before, scale)
    values = memory_values(x, [0, 100], before, share, scale)
    average, raw = before, before
    for begin, end in ((0, 1), (1, 30), (30, 31), (31, 100)):
        part, sums = memory_keys(x[begin:end], decay[begin:end], [0, end - begin], average, scale)
        assert torch.equal(part, keys[begin:end])
        assert torch.equal(sums, averages[begin:end])
        assert torch.equal(memory_values(x[begin:end], [0, end - begin], raw, share, scale), values[begin:end])
        average, raw = sums[-1:], x[end - 1 : end].float()


@pytest.mark.parametrize("wrong", ["decay", "before", "starts", "order", "dtype", "scale", "share"])
def test_refusals(wrong):
    starts, x, before, share, scale = case([2, 4], 2, 4)
    decay = torch.rand(1, 2)
    memory_keys(x, decay, starts, before, scale)
    if wrong == "decay":
        decay = torch.rand(3, 2)
    if wrong == "before":
        before = before[:1]
    if wrong == "starts":
        starts = [0, 2, 7]
    if wrong == "order":
        starts, before = [0, 7, 3, 6], torch.zeros(3, 2, 4)
    if wrong == "dtype":
        x = x.double()
    if wrong == "scale":
        scale = scale[:1]
    if wrong == "share":
        share = share.double()
    if wrong != "share":
        with pytest.raises(ValueError, match="go together|needs float32"):
            memory_keys(x, decay, starts, before, scale)
    if wrong != "decay":
        with pytest.raises(ValueError, match="go together|needs float32"):
            memory_values(x, starts, before, share, scale)


@pytest.mark.parametrize(
    ("dtype", "weights", "tolerance"),
    [("float32", "float32", 2e-6), ("bfloat16", "bfloat16", 2e-2), ("bfloat16", "int8", 4e-2)],
)
@pytest.mark.parametrize(("heads", "pairs", "head_dim"), [(3, 448, 16), (2, 70, 64), (1, 6, 10)])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_persistent_memory(isa, dtype, weights, tolerance, heads, pairs, head_dim, rows):
    torch.manual_seed(pairs)
    dtype, weights = getattr(torch, dtype), getattr(torch, weights)
    x = torch.randn(rows, heads, head_dim).to(dtype)
    keys, values = (torch.randn(heads, pairs, head_dim).to(dtype) for _ in range(2))
    packed_keys = [pack_linear([k], weights) for k in keys]
    packed_values = [pack_linear([v.T.contiguous()], weights) for v in values]
    answers = persistent_memory(x, packed_keys, packed_values)
    reference = reference_persistent_memory(x, keys, values)
    assert (answers.double() - reference).abs().max() < tolerance * (1 + reference.abs().max())
    alone = torch.cat([persistent_memory(row[None], packed_keys, packed_values) for row in x])
    assert torch.equal(alone, answers)


def test_persistent_memory_refuses():
    x = torch.randn(2, 3, 16)
    keys = [pack_linear([torch.randn(8, 16)], torch.float32) for _ in range(3)]
    values = [pack_linear([torch.randn(16, 8)], torch.float32) for _ in range(3)]
    persistent_memory(x, keys, values)
    for wrong in ((x[:, :2], keys, values), (x.bfloat16(), keys, values), (x, keys, keys), (x, keys[:2], values)):
        with pytest.raises(ValueError, match="does not go with"):
            persistent_memory(*wrong)
