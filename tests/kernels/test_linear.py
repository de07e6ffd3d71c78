import pytest
import torch

from thresher.kernels.linear import pack_linear, quantize_rows, reference_linear


def rounded(weight, dtype):
    """The matrix that packing as `dtype` stands for, in float64."""
    if dtype == torch.int8:
        q, scale = quantize_rows(weight)
        return q.double() * scale.double()[:, None]
    return weight.to(dtype).double()


def compare(y, reference, dtype):
    tolerance = 2e-6 if dtype == torch.float32 else (1e-4 if y.dtype == torch.float32 else 1e-2)
    assert (y.double() - reference).abs().max() < tolerance * (1 + reference.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("out", "width"), [(96, 64), (33, 30), (1, 2), (200, 578)])
def test_matches_reference(isa, dtype, out, width):
    torch.manual_seed(out)
    weight, bias = torch.randn(out, width), torch.randn(out)
    act = torch.float32 if dtype == torch.float32 else torch.bfloat16
    packed = pack_linear([weight], dtype, bias)
    for rows in [1, 2, 3, 5, 11, 12, 13, 16, 100, 300]:
        x = torch.randn(rows, width).to(act)
        reference = reference_linear(x, rounded(weight, dtype), bias)
        compare(packed(x), reference, dtype)
        compare(packed(x, torch.float32), reference, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("out", [64, 40])
def test_gated(isa, dtype, activation, out):
    torch.manual_seed(0)
    gate, up = torch.randn(out, 64), torch.randn(out, 64)
    act = torch.float32 if dtype == torch.float32 else torch.bfloat16
    packed = pack_linear([gate, up], dtype, activation=activation)
    x = torch.randn(14, 64).to(act)
    reference = reference_linear(x, rounded(torch.cat([gate, up]), dtype), None, activation)
    assert packed(x).shape == (14, out)
    compare(packed(x), reference, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("width", [128, 1030])  # panels of integers are widened 512 columns at a time
def test_a_row_is_the_same_bits_in_any_batch(isa, dtype, width):
    torch.manual_seed(0)
    packed = pack_linear([torch.randn(70, width)], dtype)
    x = torch.randn(40, width).to(torch.float32 if dtype == torch.float32 else torch.bfloat16)
    whole = packed(x)
    for rows in [1, 3, 12, 17]:
        assert torch.equal(torch.cat([packed(c) for c in x.split(rows)]), whole)


def test_strided_rows(isa):
    x = torch.randn(5, 200)
    packed = pack_linear([torch.eye(64)], torch.float32)
    assert torch.equal(packed(x[:, 10:74]), x[:, 10:74])


def test_quantized_rows_are_within_half_a_step():
    weight = torch.randn(50, 64)
    weight[3] = 0
    q, scale = quantize_rows(weight)
    assert ((q * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all()


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="even"):
        pack_linear([torch.randn(4, 3)], torch.bfloat16)
    with pytest.raises(ValueError, match="contiguous"):
        pack_linear([torch.randn(4, 4)], torch.float32)(torch.randn(2, 6))
