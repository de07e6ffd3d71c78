"""Statistics of methods that sample, over many seeds: means are right, errors stay within what was asked for.

Every test draws hundreds of samples of fixed seeds; the comment beside a bound says how far off it would be by chance.
"""

import pytest
import torch
from harness import Case, attend, text_like

from thresher.attention.registry import parse_method
from thresher.attention.verified import Verified
from thresher.kernels.attention import Heads

pytestmark = pytest.mark.usefixtures("set_threads")

HEADS = Heads(2, 1, 16)


def with_seeds(case, text, seeds):
    """The output of the case's next token for each seed, `[seeds, q_heads, head_dim]`. What is built stays the same."""
    outs = []
    for seed in seeds:
        case.index.use(parse_method(f"{text},seed={seed},dense_layers=none"), case.sequence.length)
        outs.append(attend([case])[0][0].double())
    return torch.stack(outs)


def candidate_weights(case):
    """Softmax weights of all rows, `[q_heads, n]`, and which rows are sampled from."""
    keys, _ = case.rows()
    logits = torch.einsum("hd,nd->hn", case.q[0].double(), keys[0].double()) * case.scale
    return logits.softmax(-1), slice(case.method.sinks, case.reading.end)


@pytest.mark.parametrize("draws", [3, 40])
def test_draws_are_unbiased(draws):
    """500 seeds x 32 numbers of an output; a mean is off by more than 4.5 standard errors once in 4000 such tests."""
    text = f"sample:draws={draws}"
    case = Case(f"{text},dense_layers=none", HEADS, 400, seed=31)
    outs = with_seeds(case, text, range(500))
    errors = (outs.mean(0) - case.dense()[0]).abs() / (outs.std(0) / 500**0.5)
    assert errors.max() < 4.5
    # The spread is that of independent draws: the variance of a value among candidates, over the number of draws.
    weights, here = candidate_weights(case)
    values = case.rows()[1][0].double()[here]
    share = weights[:, here].sum(1, keepdim=True)
    inside = weights[:, here] / share
    variance = (inside @ values.square() - (inside @ values).square()) * share**2 / draws
    ratio = (outs.var(0) / variance).mean()
    assert abs(ratio - 1) < 0.08  # of 32 variances of 500 outputs each, somewhat correlated: 0.011 to 0.063


@pytest.mark.parametrize("draws", [5, 60])
def test_expected_number_of_rows_drawn(draws):
    """A row of weight w is read with probability 1 - (1 - w)^draws; 400 seeds."""
    text = f"sample:draws={draws}"
    case = Case(f"{text},dense_layers=none", HEADS, 400, seed=32)
    case.index.clear_readings()
    with_seeds(case, text, range(400))
    weights, here = candidate_weights(case)
    inside = weights[:, here] / weights[:, here].sum(1, keepdim=True)
    expected = float((1 - (1 - inside) ** draws).sum())
    fixed = HEADS.q_heads * (401 - (here.stop - here.start))
    found = case.index.readings().head_rows / 400 - fixed
    assert abs(found - expected) < 4 * (HEADS.q_heads * draws / 4 / 400) ** 0.5


def test_every_row_is_drawn_as_often_as_it_weighs():
    """One draw, 600 seeds: chi-squared over 12 bins of about equal weight, 11 degrees of freedom."""
    case = Case("sample:draws=1,dense_layers=none", Heads(1, 1, 16), 200, seed=33)
    weights, here = candidate_weights(case)
    inside = (weights[:, here] / weights[:, here].sum(1, keepdim=True))[0]
    bins = (inside.cumsum(0) * 12).clamp(max=11.999).long()
    expected = torch.zeros(12, dtype=torch.float64).index_add_(0, bins, inside) * 600
    # The one drawn row is found by its value: the bin's number in the first channel.
    kv = case.sequence.rows(0, 200)
    kv[:, 1] = 0
    kv[0, 1, 0, here, 0] = 1 + bins.float()
    marked = Case("sample:draws=1,dense_layers=none", Heads(1, 1, 16), 200, kv=kv)
    marked.q, marked.k, marked.v = case.q, case.k, torch.zeros_like(case.v)
    share = float(weights[:, here].sum())
    found = (with_seeds(marked, "sample:draws=1", range(600))[:, 0, 0] / share).round().long() - 1
    counts = torch.bincount(found, minlength=12)
    chi = float(((counts - expected) ** 2 / expected).sum())
    assert chi < 31.3  # exceeded once in 1000


KEYS = {
    "gaussian": lambda kv: kv[:, 0].mul_(1.0),
    "peaked": lambda kv: kv[:, 0].mul_(2.5),
    "flat": lambda kv: kv[:, 0].mul_(0.1),
}


def violations(kind, epsilon, delta, seeds=40, contexts=4):
    """The share of outputs whose relative error exceeds epsilon, over seeds x query heads x contexts.

    Values have a mean (`text_like`): an error relative to a sum of pure noise is not bounded by less than all rows.
    """
    heads = Heads(8, 4, 16)
    text = f"verified:heavy=16,epsilon={epsilon},delta={delta}"
    bad = total = sampled = 0
    for context in range(contexts):
        kv = text_like(2000, heads, 1, seed=40 + context)
        KEYS[kind](kv)
        case = Case(f"{text},dense_layers=none", heads, 2000, kv=kv, seed=50 + context)
        case.index.clear_readings()
        dense = case.dense()[0]
        outs = with_seeds(case, text, range(seeds))
        errors = (outs - dense).norm(dim=-1) / dense.norm(dim=-1)
        counted = case.index.readings()
        assert counted.checked == seeds * heads.kv_heads
        sampled += counted.checked - counted.escalated
        bad += int((errors > epsilon).sum())
        total += errors.numel()
    assert sampled > 0
    return bad / total


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize(("epsilon", "delta"), [(0.5, 0.3), (0.3, 0.1), (0.25, 0.25)])
def test_errors_are_within_epsilon_as_often_as_stated(kind, epsilon, delta):
    """1280 outputs: a true rate of delta would come out above delta + 3.1 sqrt(delta (1 - delta) / 1280) once in
    1000 tests if all were independent; the bound is far from tight, so delta itself is asserted."""
    assert violations(kind, epsilon, delta) <= delta


@pytest.mark.parametrize(("kind", "epsilon", "delta"), [("peaked", 0.3, 0.1), ("peaked", 0.25, 0.25)])
def test_a_sample_that_is_too_small_is_noticed(monkeypatch, kind, epsilon, delta):
    """The same measure with the sample cut to its pilot: then more than delta of the outputs are off, so the test
    above can fail."""
    parameters = Verified.parameters
    monkeypatch.setattr(Verified, "parameters", lambda *a: parameters(*a) | {"confidence": 0.0, "pilot": 1e-6})
    assert violations(kind, epsilon, delta) > delta


def test_a_smaller_epsilon_or_delta_reads_more():
    rows = []
    for epsilon, delta in ((0.8, 0.5), (0.4, 0.5), (0.4, 0.05), (0.2, 0.05)):
        text = f"verified:heavy=16,epsilon={epsilon},delta={delta},dense_layers=none"
        kv = text_like(4000, HEADS, 1, seed=60)
        case = Case(text, HEADS, 4000, kv=kv, seed=60)
        case.attend()
        rows.append(case.index.readings().rows)
    assert rows == sorted(rows)
    assert rows[0] < rows[-1]
