import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from thresher.engine.sampler import next_token, processed_probabilities, random_stream
from thresher.engine.sampling import SamplingParams
from thresher.errors import ModelError, UsageError

BAD = {
    "max_new_tokens": [-1, 1.5, "3", True, None],
    "temperature": [-0.1, math.nan, math.inf, "1", None, True],
    "top_k": [-1, 2.0],
    "top_p": [0, -1, 1.1, math.nan],
    "min_p": [-0.1, 1.1],
    "repetition_penalty": [0, -1, math.inf],
    "presence_penalty": [math.nan, 1e9],
    "stop": [("",), (3,), ""],
    "stop_token_ids": [(-1,), ("a",), (1.0,)],
    "logprobs": [-1, 1.5],
    "seed": [-1, 0.5],
    "n": [0, 5000],
}


@pytest.mark.parametrize(("name", "value"), [(k, v) for k, values in BAD.items() for v in values])
def test_nonsense_is_refused_by_name(name, value):
    with pytest.raises(UsageError, match=name) as error:
        SamplingParams(**{name: value})
    assert "\n" not in str(error.value)


def test_stop_is_normalised():
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([0.3, 1.0, 1.7]),
    st.sampled_from([0, 1, 5, 1000]),
    st.sampled_from([1.0, 0.9, 0.5, 0.01]),
    st.sampled_from([0.0, 0.05, 0.5]),
    st.sampled_from([1.0, 1.3, 0.8]),
)
def test_same_distribution_as_transformers(seed, temperature, top_k, top_p, min_p, repetition):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(200, generator=generator)
    seen = torch.randint(0, 200, (30,), generator=generator).tolist()
    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition
    )
    processors = LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(repetition), TemperatureLogitsWarper(temperature)]
    )
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    if min_p:
        processors.append(MinPLogitsWarper(min_p))
    expected = processors(torch.tensor([seen]), logits[None].double())[0].softmax(0)
    got = processed_probabilities(logits, params, seen, ())
    assert np.allclose(got, expected.numpy(), atol=1e-6)


def test_presence_penalty_counts_a_token_once():
    logits = torch.zeros(10)
    got = processed_probabilities(logits, SamplingParams(temperature=1, presence_penalty=2.0), (), [3, 3, 3, 7])
    assert got[3] == pytest.approx(got[7])
    assert got[0] / got[3] == pytest.approx(math.exp(2))


def test_draws_follow_the_distribution():
    """Chi-square over 20,000 draws; with this seed fixed it holds or not for good, error rate 0.1 %."""
    logits = 2 * torch.randn(30, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(temperature=0.8, top_p=0.95)
    p = processed_probabilities(logits, params, (), ())
    rng = random_stream(1, 0)
    draws = 20_000
    counts = np.bincount([next_token(logits, params, (), (), rng).token for _ in range(draws)], minlength=30)
    assert counts[p == 0].sum() == 0
    live = p > 0
    chi = ((counts[live] - draws * p[live]) ** 2 / (draws * p[live])).sum()
    k = live.sum() - 1
    limit = k * (1 - 2 / (9 * k) + 3.09 * math.sqrt(2 / (9 * k))) ** 3  # Wilson and Hilferty
    assert chi < limit


def test_one_uniform_per_token():
    logits = torch.randn(50)
    rng, same = random_stream(3, 1), random_stream(3, 1)
    next_token(logits, SamplingParams(temperature=1.0, top_k=5), (), (), rng)
    same.random()
    assert rng.random() == same.random()


def test_streams_differ():
    first = {random_stream(s, i).random() for s in range(5) for i in range(5)}
    assert len(first) == 25


def test_greedy_and_logprobs():
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0])
    choice = next_token(logits, SamplingParams(logprobs=2), (), (), random_stream(0, 0))
    assert choice.token == 1
    assert choice.logprob == pytest.approx(float(logits.log_softmax(0)[1]))
    assert [t for t, _ in choice.top] == [1, 3]
    assert next_token(logits, SamplingParams(repetition_penalty=10.0), [1], (), random_stream(0, 0)).token == 3
    assert next_token(logits, SamplingParams(logprobs=1000), (), (), random_stream(0, 0)).top[3][0] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_numbers(bad):
    logits = torch.randn(10)
    logits[4] = bad
    with pytest.raises(ModelError, match="not numbers"):
        next_token(logits, SamplingParams(), (), (), random_stream(0, 0))
    with pytest.raises(ModelError):
        next_token(torch.full((10,), -math.inf), SamplingParams(), (), (), random_stream(0, 0))
