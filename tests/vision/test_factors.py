"""Decompositions of weights: exact at full rank, optimal among their kind, and layers that compute what they stand
for."""

import math

import numpy as np
import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.decomposition import partial_tucker
from torch import nn

from thresher.errors import UsageError
from thresher.vision.decompose import make_layers
from thresher.vision.factors import find_bases, svd, tucker2, vbmf_rank


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    pass


def random_weight(outputs, inputs, kernel, seed=0):
    """With a spectrum that falls, as trained weights have."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, outputs + 1)[:, None] ** -0.7 * torch.arange(1, inputs + 1)[None] ** -0.5
    return torch.randn(outputs, inputs, kernel, kernel, generator=g) * scale[:, :, None, None]


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_full_rank_is_the_layer(kernel, mode):
    for stride in (1, 2):
        for dilation in (1, 2):
            for bias in (False, True):
                torch.manual_seed(kernel)
                pad = dilation * (kernel // 2)
                conv = nn.Conv2d(6, 10, kernel, stride, pad, dilation, bias=bias, padding_mode=mode)
                bases = find_bases(conv.weight)
                layers = make_layers(conv, svd(bases, 6) if kernel == 1 else tucker2(bases, 10, 6))
                x = torch.randn(2, 6, 17, 15)
                expected, given = conv(x), layers(x)
                assert given.shape == expected.shape
                assert (given - expected).abs().max() < 1e-5
                assert len(layers) == (2 if kernel == 1 else 3)
                assert sum(layer.bias is not None for layer in layers) == bias


def test_a_1x1_with_padding_and_stride():
    conv = nn.Conv2d(6, 4, 1, 2, 1)
    layers = make_layers(conv, svd(find_bases(conv.weight), 4))
    x = torch.randn(1, 6, 9, 9)
    assert (layers(x) - conv(x)).abs().max() < 1e-5


def test_rectangular_kernels():
    conv = nn.Conv2d(6, 8, (1, 7), (1, 2), (0, 3))
    layers = make_layers(conv, tucker2(find_bases(conv.weight), 8, 6))
    x = torch.randn(1, 6, 9, 12)
    assert (layers(x) - conv(x)).abs().max() < 1e-5


@settings(max_examples=30)
@given(st.integers(2, 12), st.integers(2, 12), st.sampled_from([2, 3]), st.data())
def test_errors_are_what_is_lost(outputs, inputs, kernel, data):
    weight = random_weight(outputs, inputs, kernel, data.draw(st.integers(0, 99))).double()
    outer, inner = data.draw(st.integers(1, outputs)), data.draw(st.integers(1, inputs))
    bases = find_bases(weight)
    refined, plain = tucker2(bases, outer, inner), tucker2(bases, outer, inner, rounds=0)
    norm = weight.norm()
    for factors in (plain, refined):
        assert math.isclose(float((weight - factors.weight()).norm() / norm), factors.error, abs_tol=1e-7)
        kept = float(factors.core.square().sum() / norm**2)
        assert math.isclose(factors.error**2, max(0.0, 1 - kept), abs_tol=1e-9)
        for basis in (factors.outer, factors.inner):
            assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64), atol=1e-9)
    assert refined.error <= plain.error
    assert plain.error <= bases.expected_error(outer, inner) + 1e-6
    if outer < outputs:
        assert tucker2(bases, outer + 1, inner, rounds=0).error <= plain.error + 1e-6


@pytest.mark.parametrize(("outer", "inner"), [(3, 4), (8, 2), (6, 6)])
def test_as_good_as_tensorly(outer, inner):
    weight = random_weight(16, 12, 3, seed=5).double()
    with tensorly.backend_context("numpy"):
        (core, factors), _ = partial_tucker(weight.numpy(), (outer, inner), modes=[0, 1], n_iter_max=200, tol=1e-9)
        theirs = tensorly.tenalg.multi_mode_dot(core, factors, modes=[0, 1])
    error = np.linalg.norm(weight.numpy() - theirs) / np.linalg.norm(weight.numpy())
    assert tucker2(find_bases(weight), outer, inner, rounds=200, tolerance=1e-12).error == pytest.approx(
        error, abs=1e-5
    )
    assert tucker2(find_bases(weight), outer, inner).error == pytest.approx(error, abs=1e-3)


def test_an_svd_is_the_best_of_its_rank():
    weight = random_weight(9, 14, 1).double()
    values = torch.linalg.svdvals(weight[:, :, 0, 0])
    for rank in (1, 4, 9):
        factors = svd(find_bases(weight), rank)
        assert factors.error == pytest.approx(float(values[rank:].norm() / values.norm()), abs=1e-9)
        assert math.isclose(float((weight - factors.weight()).norm() / weight.norm()), factors.error, abs_tol=1e-9)


@pytest.mark.parametrize("kernel", [1, 3])
def test_weighted_by_inputs_outputs_are_nearer(kernel):
    g = torch.Generator().manual_seed(3)
    mixing = torch.randn(12, 12, generator=g) * torch.arange(1, 13) ** -1.5  # inputs that lie in few directions
    x = torch.einsum("ij,njhw->nihw", mixing, torch.randn(4, 12, 20, 20, generator=g))
    conv = nn.Conv2d(12, 12, kernel, padding=kernel // 2)
    flat = x.transpose(0, 1).flatten(1)
    errors = []
    for moments in (None, flat @ flat.T / flat.shape[1]):
        bases = find_bases(conv.weight, moments)
        layers = make_layers(conv, svd(bases, 4) if kernel == 1 else tucker2(bases, 4, 4))
        with torch.no_grad():
            errors.append(float((layers(x) - conv(x)).norm() / conv(x).norm()))
    assert errors[1] < 0.9 * errors[0]


def test_weights_of_zeros_and_of_unused_channels():
    assert tucker2(find_bases(torch.zeros(4, 4, 3, 3)), 2, 2).error == 0
    moments = torch.zeros(4, 4)
    factors = tucker2(find_bases(torch.randn(4, 4, 3, 3), moments), 2, 2)
    assert torch.isfinite(factors.weight()).all()


@pytest.mark.parametrize(("outer", "inner"), [(0, 1), (1, 0), (5, 1), (1, 7)])
def test_ranks_out_of_bounds(outer, inner):
    with pytest.raises(UsageError, match="not within the 4 and 6 channels"):
        tucker2(find_bases(torch.randn(4, 6, 3, 3)), outer, inner)


def test_weights_that_are_not_finite():
    with pytest.raises(UsageError, match="finite"):
        find_bases(torch.full((2, 2, 1, 1), float("nan")))
    with pytest.raises(UsageError, match="not within"):
        svd(find_bases(torch.randn(4, 6, 1, 1)), 5)


@pytest.mark.parametrize("rank", [0, 1, 5, 10])
@pytest.mark.parametrize(("rows", "columns"), [(40, 60), (64, 576), (200, 100)])
def test_vbmf_finds_the_rank_in_noise(rows, columns, rank):
    found = []
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        signal = torch.randn(rows, rank, generator=g) @ torch.randn(rank, columns, generator=g) * 2
        found.append(vbmf_rank(signal + torch.randn(rows, columns, generator=g)))
    assert found == [rank] * 5


def test_vbmf_of_the_scaled_is_the_same_and_of_zeros_none():
    g = torch.Generator().manual_seed(1)
    noisy = torch.randn(30, 4, generator=g) @ torch.randn(4, 50, generator=g) + 0.3 * torch.randn(30, 50, generator=g)
    assert vbmf_rank(noisy) == vbmf_rank(noisy * 1e-6) == vbmf_rank(noisy.T) == 4
    assert vbmf_rank(torch.zeros(3, 5)) == 0
