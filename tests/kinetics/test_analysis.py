from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.errors import UsageError
from thresher.kinetics.analysis import accuracies, coverage, coverage_interval, lengths, majority
from thresher.kinetics.traces import Question, Sample, Trace


@given(n=st.integers(1, 8), data=st.data())
def test_coverage_is_that_of_all_choices(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    right = [i < c for i in range(n)]
    every = [any(chosen) for chosen in combinations(right, k)]
    assert coverage(n, c, k) == pytest.approx(sum(every) / len(every))
    assert coverage(n, c, 1) == pytest.approx(c / n)
    assert coverage(n, c, n) == (1 if c else 0)


def test_coverage_is_unbiased():
    rng = np.random.default_rng(0)
    p, n, k = 0.15, 12, 5
    found = [coverage(n, c, k) for c in rng.binomial(n, p, 20_000)]
    assert np.mean(found) == pytest.approx(1 - (1 - p) ** k, abs=4 * np.std(found) / len(found) ** 0.5)


def test_coverage_of_what_cannot_be():
    for n, c, k in ((4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1), (4, float("nan"), 1)):
        with pytest.raises(UsageError):
            coverage(n, c, k)
    assert coverage(4, 1.5, 2) == pytest.approx((coverage(4, 1, 2) + coverage(4, 2, 2)) / 2)


def vote(chosen, gold):
    counts = {a: chosen.count(a) for a in chosen if a is not None}
    top = [a for a, n in counts.items() if n == max(counts.values())]
    return (gold in top) / len(top) if top else 0.0


@given(answers=st.lists(st.sampled_from(["a", "b", "c", "d", None]), min_size=1, max_size=8), data=st.data())
def test_majority_is_that_of_all_choices(answers, data):
    k = data.draw(st.integers(1, len(answers)))
    every = [vote(list(chosen), "a") for chosen in combinations(answers, k)]
    assert majority(answers, "a", k) == pytest.approx(sum(every) / len(every))
    scores = [float(a == "a") for a in answers]
    assert majority(answers, None, k, scores) == pytest.approx(majority(answers, "a", k))


def test_majority_of_many():
    answers = ["a"] * 20 + ["b"] * 12
    assert majority(answers, "a", 32) == 1
    assert majority(answers, "a", 1) == pytest.approx(20 / 32)
    with pytest.raises(UsageError, match="majority of 33"):
        majority(answers, "a", 33)


def trace(questions=30, n=16, seed=0, known=True):
    rng = np.random.default_rng(seed)
    made = []
    for i, p in enumerate(rng.uniform(0, 0.7, questions)):
        right = rng.random(n) < p
        samples = [
            Sample(int(rng.integers(10, 100)), float(r), ("g" if r else str(rng.integers(5))) if known else None, j > 1)
            for j, r in enumerate(right)
        ]
        made.append(Question(str(i), "g", tuple(samples), 10))
    return Trace("qwen3-8b", "dense", "t", 100, tuple(made))


def test_accuracies_of_a_trace():
    one, four = accuracies(trace(), [1, 4], resamples=300)
    assert one.coverage.mean == pytest.approx(one.majority.mean)
    assert four.coverage.mean > four.majority.mean > one.majority.mean
    for interval in (one.coverage, four.coverage, four.majority):
        assert interval.low < interval.mean < interval.high
    assert accuracies(trace(known=False), [1])[0].majority is None
    with pytest.raises(UsageError, match="pass@17"):
        accuracies(trace(), [17])


def test_intervals_hold_the_truth():
    """Questions have chances drawn from 0 to 0.7: pass@1 is 0.35. 95 % intervals must hold it in about 95 of 100
    sets, here in at least 88 (below which 0.5 % of right ones fall) and not in all."""
    held = 0
    for seed in range(100):
        interval = coverage_interval(trace(30, 8, seed + 100).questions, 1, 200)
        held += interval.low <= 0.35 <= interval.high
    assert held >= 88


def test_intervals_know_that_samples_are_few():
    """One question: drawing questions again changes nothing, drawing its samples again does."""
    one = Question("a", "g", tuple(Sample(1, float(i < 8)) for i in range(16)))
    interval = coverage_interval([one], 1, 4000)
    spread = 1.96 * (0.25 / 16) ** 0.5
    assert interval.high - interval.low == pytest.approx(2 * spread, abs=0.07)


def test_lengths_of_a_trace():
    found = lengths(trace())
    assert found.unended == pytest.approx(2 / 16)
    assert found.median < found.ninetieth <= found.longest <= 100
