"""The distribution of what is verified is the target's (spec: T2), on distributions small enough to count."""

import itertools

import numpy as np
import pytest
import torch

from thresher.decoding.sampler import SampleState, Stream
from thresher.decoding.sampling import SamplingParams
from thresher.kernels.sampling import reference_distribution
from thresher.speculation.verify import Draft, matched, rejected, verify

VOCAB = 6
DRAWS = 2_000  # of each distribution; a right one fails a test here with probability 0.001


def state_of(params, number=0):
    return SampleState(params, [0], request=0, sample=number, vocab_size=VOCAB, eos_token_ids=())


def chi_square(seen, expected):
    """Probability of being at least as far off as this by chance."""
    off = ((seen - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((seen.size - 1) / 2.0).double(), torch.tensor(off / 2).double()))


def markov(seed):
    """Logits of the next token by the last one: a model to sample from."""
    return np.random.default_rng(seed).normal(size=(VOCAB, VOCAB)).astype(np.float32) * 1.5


def distribution(logits, state):
    return reference_distribution(logits, state.draw())


def drafted(state, model, last, gamma, deterministic):
    """A draft of the model `[last token, next]` behind a token."""
    draft = Draft()
    for _ in range(gamma):
        if deterministic:
            token, weights = int(model[last].argmax()), None
        else:
            weights = distribution(model[last], state).astype(np.float32)
            u = state.uniform(stream=Stream.DRAFT)
            token = min(int(np.searchsorted(weights.cumsum(), u * weights.sum(), side="right")), VOCAB - 1)
        draft.token_ids.append(token)
        draft.weights.append(weights)
        state.push(token)
        last = token
    state.pop(gamma)
    return draft


def generated(state, target, drafter, gamma, length, deterministic):
    """The first tokens of a speculative run behind token 0; how likely the first draft's first token was to stand, and
    whether it did."""
    tokens, first = [0], None
    while len(tokens) <= length:
        draft = drafted(state, drafter, tokens[-1], gamma, deterministic)
        rows = torch.from_numpy(target[[tokens[-1], *draft.token_ids]])
        (verdict,) = verify(rows, [(state, draft, False)])
        first = first or (verdict.chances[0], verdict.accepted > 0)
        for choice in verdict.choices:
            tokens.append(choice.token)
            state.push(choice.token)
    return tokens[1 : length + 1], first


PARAMS = {
    "plain": {},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.2, "temperature": 0.7},
    "bias": {"logit_bias": {2: 1.0, 3: -2.0}},
    "penalties": {"frequency_penalty": 0.7, "presence_penalty": 0.4, "repetition_penalty": 1.3},
}


def expected_joint(target, params, length):
    """Probability of every string of tokens behind token 0, one at a time."""
    joint = np.zeros((VOCAB,) * length)
    for string in itertools.product(range(VOCAB), repeat=length):
        state, last, p = state_of(params), 0, 1.0
        for token in string:
            p *= distribution(target[last], state)[token]
            state.push(token)
            last = token
        joint[string] = p
    return joint


@pytest.mark.parametrize(
    ("name", "gamma", "deterministic"),
    [*((name, 2, False) for name in PARAMS), ("plain", 1, False), ("plain", 2, True), ("penalties", 2, True)],
)
def test_joint_distribution(name, gamma, deterministic):
    """Chi-square of three tokens in a row, over draws of independent samples."""
    params = SamplingParams(**({"temperature": 1.0} | PARAMS[name]), seed=7)
    target, drafter = markov(1), markov(2)
    draws = DRAWS
    counts = np.zeros((VOCAB,) * 3)
    accepted, sure = [], []
    for i in range(draws):
        tokens, (chance, stood) = generated(state_of(params, i), target, drafter, gamma, 3, deterministic)
        counts[tuple(tokens)] += 1
        sure.append(chance)
        accepted.append(stood)
    joint = expected_joint(target, params, 3)
    assert counts[joint == 0].sum() == 0
    expected, seen = joint[joint > 0] * draws, counts[joint > 0]
    rare = expected < 5
    expected = np.append(expected[~rare], expected[rare].sum())
    seen = np.append(seen[~rare], seen[rare].sum())
    keep = expected > 0
    assert chi_square(seen[keep], expected[keep]) > 0.001
    # As often as it says: the mean of a coin of that chance, within 3.3 standard errors.
    chance = np.mean(sure)
    assert abs(np.mean(accepted) - chance) < 3.3 * np.sqrt(max(chance * (1 - chance), 1e-9) / draws) + 1e-9


def test_acceptance_is_the_overlap():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(VOCAB)), rng.dirichlet(np.ones(VOCAB))
    params = SamplingParams(temperature=1.0, seed=1)
    stood = []
    for i in range(4 * DRAWS):
        state = state_of(params, i)
        token = min(int(np.searchsorted(q.cumsum(), state.uniform(stream=Stream.DRAFT), side="right")), VOCAB - 1)
        draft = Draft([token], [q.astype(np.float32)])
        tokens, chances = rejected(state, draft, p[None].astype(np.float32), 0)
        stood.append(len(tokens) == 2)
    overlap = np.minimum(p, q).sum()
    assert chances[0] == pytest.approx(overlap, abs=1e-6)
    assert abs(np.mean(stood) - overlap) < 3.3 * np.sqrt(overlap * (1 - overlap) / (4 * DRAWS))


def test_equal_distributions_always_stand():
    weights = np.array([0.1, 1.0, 0.3, 0.0, 0.2, 0.7], np.float32)
    params = SamplingParams(temperature=1.0, seed=1)
    for i in range(DRAWS):
        state = state_of(params, i)
        u = state.uniform(stream=Stream.DRAFT)
        token = int(np.searchsorted(weights.cumsum(), u * weights.sum(), side="right"))
        tokens, _ = rejected(state, Draft([token], [weights]), weights[None], 0)
        assert len(tokens) == 2
        assert tokens[0] == token


def test_matched():
    assert matched(Draft([1, 2, 3]), [1, 2, 3, 4]) == ([1, 2, 3, 4], [1.0, 1.0, 1.0])
    assert matched(Draft([1, 2, 3]), [1, 5, 3, 4]) == ([1, 5], [1.0, 0.0])
    assert matched(Draft([1]), [0, 7]) == ([0], [0.0])
    assert matched(Draft(), [9]) == ([9], [])


@pytest.mark.parametrize("seed", range(20))
def test_greedy_and_matching_are_plain_decoding(seed):
    """Whatever was drafted: tokens are those drawn one by one with the same state."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=(5, VOCAB)).astype(np.float32))
    for chosen in ({}, {"temperature": 1.1, "seed": 3}, {"temperature": 0.8, "seed": 3, "frequency_penalty": 1.5}):
        state = state_of(SamplingParams(**chosen, logprobs=2))
        draft = Draft(rng.integers(0, VOCAB, 4).tolist(), [None] * 4)
        (verdict,) = verify(logits, [(state, draft, True)])
        expected = []
        for i in range(5):
            (one,) = verify(logits[i : i + 1], [(state, Draft(), True)])
            expected += one.choices
            if i == 4 or one.choices[0].token != draft.token_ids[i]:
                break
            state.push(one.choices[0].token)
        assert verdict.choices == expected
        assert verdict.accepted == len(expected) - 1


def test_logits_that_are_not_numbers():
    logits = torch.zeros(3, VOCAB)
    logits[:, 1] = 1
    logits[1] = torch.nan
    for chosen in ({}, {"temperature": 1.0, "seed": 3}):
        for matching in (True, False):
            state = state_of(SamplingParams(**chosen, logit_bias={1: 100}))
            (verdict,) = verify(logits, [(state, Draft([1, 1], [None, None]), matching)])
            assert verdict.choices[0].token == 1
            assert isinstance(verdict.choices[1], Exception)
