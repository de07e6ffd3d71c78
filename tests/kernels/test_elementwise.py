import pytest
import torch

from thresher.kernels.elementwise import reference_rms_norm, reference_rope, rms_norm, rope_

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
