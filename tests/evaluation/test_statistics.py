import numpy as np
import pytest

from thresher.errors import UsageError
from thresher.evaluation.statistics import bootstrap_difference, bootstrap_mean


def test_intervals_cover_the_true_mean():
    """95 % intervals of 40 values: the percentile bootstrap covers about 94 %. Of 400 trials with a fixed seed,
    coverage below 91 % or above 98 % would happen by chance less than once in 100."""
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(400):
        interval = bootstrap_mean(rng.normal(3, 2, 40).tolist(), resamples=1000, seed=trial)
        covered += interval.low <= 3 <= interval.high
    assert 0.91 <= covered / 400 <= 0.98


def test_pairs_cancel_what_they_share():
    rng = np.random.default_rng(1)
    shared = rng.normal(0, 100, 50)
    values, baseline = shared + 1 + rng.normal(0, 0.1, 50), shared
    paired = bootstrap_difference(values.tolist(), baseline.tolist())
    assert 0.9 < paired.low < paired.mean < paired.high < 1.1


def test_seeds_and_shapes():
    values = [0.0, 1.0, 1.0, 0.5]
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean([2.0]) == bootstrap_mean([2.0, 2.0])
    wide, narrow = bootstrap_mean(values, 0.99), bootstrap_mean(values, 0.5)
    assert wide.low <= narrow.low <= narrow.mean <= narrow.high <= wide.high
    with pytest.raises(UsageError, match="at least one"):
        bootstrap_mean([])
    with pytest.raises(UsageError, match="as many"):
        bootstrap_difference([1.0], [])
    with pytest.raises(UsageError, match="confidence"):
        bootstrap_mean([1.0], confidence=1)


def test_many_values_are_drawn_in_pieces(monkeypatch):
    values = np.random.default_rng(2).random(100).tolist()
    whole = bootstrap_mean(values, resamples=500)
    monkeypatch.setattr("thresher.evaluation.statistics._MOST_DRAWS", 1000)
    assert bootstrap_mean(values, resamples=500).low == pytest.approx(whole.low, abs=0.01)
