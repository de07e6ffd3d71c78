"""How sure a mean is: percentile bootstrap intervals (Efron 1979), seeded, also of paired differences; Wilson's."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from thresher.errors import UsageError

_MOST_DRAWS = 1 << 24  # indices drawn at once: 128 MiB


@dataclass(frozen=True)
class Interval:
    """A mean and the bounds of its confidence interval, in the unit of the values."""

    mean: float
    low: float
    high: float


def bootstrap_mean(
    values: Sequence[float], confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """The mean of `values` with a percentile interval; the same seed gives the same bounds.

    Values are taken as independent. A single value, or values that are all the same, give bounds equal to the mean:
    that says nothing was seen to vary, not that nothing can. Raises UsageError without values.
    """
    if not len(values):
        raise UsageError("an interval needs at least one value")
    if not 0 < confidence < 1:
        raise UsageError(f"confidence={confidence}: must be between 0 and 1")
    sample = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    at_once = max(1, _MOST_DRAWS // len(sample))
    means = []
    for begin in range(0, resamples, at_once):
        drawn = rng.integers(0, len(sample), size=(min(at_once, resamples - begin), len(sample)))
        means.append(sample[drawn].mean(axis=1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Interval(float(sample.mean()), float(low), float(high))


def bootstrap_difference(
    values: Sequence[float],
    baseline: Sequence[float],
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """The mean of `values[i] - baseline[i]` with its interval: what both share, easy and hard samples, cancels.

    Raises UsageError if the two are not of the same length, or empty.
    """
    if len(values) != len(baseline):
        raise UsageError(f"paired values must be as many: {len(values)} and {len(baseline)}")
    differences = np.asarray(values, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    return bootstrap_mean(differences.tolist(), confidence, resamples, seed)


def wilson(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """The share of successes among independent trials with its Wilson score interval (1927), never a point.

    `mean` is the share itself, not the middle of the interval. Raises UsageError without trials, or if there cannot be
    as many successes.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise UsageError(f"{successes} successes of {trials} trials: no share can be made of that")
    if not 0 < confidence < 1:
        raise UsageError(f"confidence={confidence}: must be between 0 and 1")
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    share = successes / trials
    middle = share + z2 / (2 * trials)
    reach = (z2 * (share * (1 - share) + z2 / (4 * trials)) / trials) ** 0.5
    scale = 1 + z2 / trials
    low = 0.0 if successes == 0 else (middle - reach) / scale
    high = 1.0 if successes == trials else (middle + reach) / scale
    return Interval(share, low, high)
