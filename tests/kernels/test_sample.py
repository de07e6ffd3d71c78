import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.kernels.sampling import Draw, Edits, reference_distribution, reference_sample, sample

SETTINGS = [
    {},
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 999},
    {"top_p": 0.95},
    {"top_p": 1e-6},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.02},
    {"top_p": 0.9, "min_p": 0.01},
]


@pytest.mark.parametrize("vocab", [1, 7, 64, 1000, 4133])
@pytest.mark.parametrize("temperature", [0.0, 0.01, 0.7, 1.0, 100.0])
def test_same_tokens_as_in_float64(isa, vocab, temperature):
    """All but the draws within rounding of a boundary: with these fixed seeds at most 1 in 500."""
    rng = np.random.default_rng(vocab)
    different = total = 0
    for chosen in SETTINGS:
        logits = (3 * rng.standard_normal((50, vocab))).astype(np.float32)
        draws = [Draw(temperature, uniform=u, **chosen) for u in rng.random(50)]
        tokens = sample(torch.from_numpy(logits), draws).tokens
        expected = [reference_sample(x, d) for x, d in zip(logits, draws, strict=True)]
        different += sum(a != b for a, b in zip(tokens, expected, strict=True))
        total += 50
    assert different <= total / 500


@settings(max_examples=300)
@given(
    st.lists(st.sampled_from([-math.inf, -3.0, -0.0, 0.0, 1.0, 1.5, 20.0]), min_size=1, max_size=200),
    st.sampled_from([0.01, 1.0, 50.0]),
    st.integers(0, 210),
    st.sampled_from([1.0, 0.999999, 0.5, 1e-9]),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from([0.0, 0.3, 1 - 2**-53]),
)
def test_a_token_is_possible(logits, temperature, top_k, top_p, min_p, uniform):
    """Many equals: whatever is drawn has a probability, also at both ends of the uniform numbers."""
    x = np.array(logits, np.float32)
    draw = Draw(temperature, top_k, top_p, min_p, uniform)
    (token,) = sample(torch.from_numpy(x)[None], [draw]).tokens
    if x.max() == -math.inf:
        assert token == -1
    else:
        assert 0 <= token < x.size
        # A token at the edge of top-p may fall on its other side by rounding: 1e-6 of the mass.
        wider = Draw(temperature, top_k, min(1.0, top_p + 1e-6), min_p, uniform)
        assert reference_distribution(x, wider)[token] > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 63, 64, 99])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_not_numbers(isa, bad, at, temperature):
    logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    logits[1, at] = bad
    tokens = sample(logits, [Draw(temperature, top_p=0.9, uniform=0.5)] * 3).tokens
    assert tokens[1] == -1
    assert tokens[0] >= 0
    assert tokens[2] >= 0


def test_edits_and_logsumexp(isa):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 1000, generator=generator)
    best = logits[0].topk(3).indices.numpy().astype(np.int32)
    edits = Edits(best[:2], np.array([1.0, 100.0], np.float32), np.array([-np.inf, 0], np.float32))
    draws = [Draw(0.0, edits=edits, logsumexp=True), Draw(0.0, logsumexp=True)]
    before = logits.clone()
    drawn = sample(logits, draws)
    tokens, logsumexp = drawn.tokens, drawn.logsumexp
    assert tokens == [best[2], int(logits[1].argmax())]
    assert torch.allclose(torch.tensor(logsumexp, dtype=torch.float64), logits.double().logsumexp(-1), atol=1e-6)
    assert torch.equal(logits, before)


def test_greedy_takes_the_first_of_equals(isa):
    logits = torch.zeros(1, 300)
    logits[0, [70, 71, 200]] = 2.0
    assert sample(logits, [Draw(0.0)]).tokens == [70]


@pytest.mark.parametrize("vocab", [1, 7, 64, 1000, 4133])
@pytest.mark.parametrize("chosen", SETTINGS, ids=str)
def test_weights_are_the_distribution(isa, vocab, chosen):
    rng = np.random.default_rng(vocab)
    logits = (3 * rng.standard_normal((6, vocab))).astype(np.float32)
    ids = np.arange(0, vocab, 3, dtype=np.int32)
    edits = Edits(ids, np.full(ids.size, 1.3, np.float32), np.full(ids.size, -0.2, np.float32))
    draws = [Draw(0.7, uniform=0.4, edits=edits, weights=i != 2, **chosen) for i in range(5)]
    draws.append(Draw(0.0, edits=edits, weights=True))
    drawn = sample(torch.from_numpy(logits), draws)
    for row, draw in enumerate(draws):
        if not draw.weights:
            continue
        weights = drawn.weights[row].double().numpy()
        assert weights.max() == 1
        assert weights[drawn.tokens[row]] > 0
        expected = (
            reference_distribution(logits[row], draw)
            if draw.temperature
            else np.eye(vocab)[reference_sample(logits[row], draw)]
        )
        assert np.abs(weights / weights.sum() - expected).max() < 1e-5
    assert sample(torch.from_numpy(logits), [Draw(1.0)] * 6).weights is None
