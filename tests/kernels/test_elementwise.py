import pytest
import torch

from thresher.kernels.elementwise import (
    leaky_average,
    reference_leaky_average,
    reference_rms_norm,
    reference_rope,
    rms_norm,
    rope_,
)

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [64, 576, 7, 100])
def test_rms_norm(isa, dtype, width):
    torch.manual_seed(width)
    x, weight = torch.randn(3, 40, width).to(dtype), torch.randn(width)
    reference = reference_rms_norm(x, weight, 1e-5)
    assert torch.allclose(rms_norm(x, weight, 1e-5).double(), reference, rtol=TOLERANCE[dtype], atol=1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("head_dim", "rotary"), [(64, 64), (20, 20), (80, 32)])
@pytest.mark.parametrize("tokens", [1, 33])
def test_rope(isa, dtype, head_dim, rotary, tokens):
    torch.manual_seed(0)
    q_heads, kv_heads = 6, 2
    qkv = torch.randn(tokens, (q_heads + 2 * kv_heads) * head_dim).to(dtype)
    before = qkv.clone().view(tokens, -1, head_dim)
    angle = torch.randn(tokens, rotary // 2).repeat(1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    rope_(qkv, cos, sin, (q_heads, kv_heads, head_dim))
    after = qkv.view(tokens, -1, head_dim)
    rotated = reference_rope(before[:, : q_heads + kv_heads], cos, sin)
    assert torch.allclose(
        after[:, : q_heads + kv_heads].double(), rotated, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )
    assert torch.equal(after[:, q_heads + kv_heads :], before[:, q_heads + kv_heads :])


def test_rope_with_head_norms(isa):
    torch.manual_seed(0)
    qkv = torch.randn(5, 4 * 32)
    before = qkv.clone().view(5, 4, 32)
    q_norm, k_norm = torch.randn(32), torch.randn(32)
    cos, sin = torch.randn(5, 32), torch.randn(5, 32)
    rope_(qkv, cos, sin, (2, 1, 32), q_norm, k_norm, 1e-6)
    for heads, weight in ((slice(0, 2), q_norm), (slice(2, 3), k_norm)):
        expected = reference_rope(reference_rms_norm(before[:, heads], weight, 1e-6), cos, sin)
        assert torch.allclose(qkv.view(5, 4, 32)[:, heads].double(), expected, atol=2e-6)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("counts", [[1], [1, 1, 1], [5, 1, 40], [0, 3, 0]])
@pytest.mark.parametrize(("heads", "head_dim"), [(4, 16), (3, 10), (1, 100)])
def test_leaky_average(isa, gated, counts, heads, head_dim):
    torch.manual_seed(0)
    starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
    x, before = torch.randn(starts[-1], heads, head_dim), torch.randn(len(counts), heads, head_dim)
    decay = torch.rand(starts[-1] if gated else 1, heads)
    reference = reference_leaky_average(x, decay, starts, before)
    assert torch.allclose(leaky_average(x, decay, starts, before).double(), reference, rtol=1e-5, atol=1e-6)


def test_leaky_averages_have_the_same_bits_however_a_sequence_is_cut(isa):
    torch.manual_seed(0)
    x, decay = torch.randn(100, 3, 20), torch.rand(100, 3)
    whole = leaky_average(x, decay, [0, 100], torch.zeros(1, 3, 20))
    before = torch.zeros(1, 3, 20)
    for begin, end in ((0, 1), (1, 30), (30, 31), (31, 100)):
        part = leaky_average(x[begin:end], decay[begin:end], [0, end - begin], before)
        assert torch.equal(part, whole[begin:end])
        before = part[-1:]


@pytest.mark.parametrize("wrong", ["decay", "before", "starts", "order", "dtype"])
def test_leaky_average_refuses(wrong):
    x, decay, starts, before = torch.randn(6, 2, 4), torch.rand(1, 2), [0, 2, 6], torch.zeros(2, 2, 4)
    leaky_average(x, decay, starts, before)
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
    with pytest.raises(ValueError, match="go together"):
        leaky_average(x, decay, starts, before)
