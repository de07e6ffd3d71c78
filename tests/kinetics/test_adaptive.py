import numpy as np
import pytest

from thresher.errors import UsageError
from thresher.kinetics.adaptive import Stopping, leads, saving, taken_of
from thresher.kinetics.traces import Question, Sample, Trace


def test_leading_is_the_beta_distribution_above_a_half():
    rng = np.random.default_rng(0)
    for first, second in ((1, 0), (3, 1), (5, 5), (9, 2)):
        answers = ["a"] * first + ["b"] * second + [None] * 3 + ["c"] * min(second, 1)
        drawn = (rng.beta(first + 1, second + 1, 200_000) > 0.5).mean()
        assert leads(answers) == pytest.approx(drawn, abs=0.005)
    assert leads([None]) == leads([]) == 0


def sample(right, answer=None):
    return Sample(10, float(right), answer)


def test_when_sampling_stops():
    by_verifier = Stopping("verifier", step=2)
    samples = [sample(0), sample(0), sample(1), sample(0), sample(0)]
    assert taken_of(samples, by_verifier) == 4
    assert taken_of(samples[:2], by_verifier) == 2
    by_majority = Stopping("majority", step=4)
    assert taken_of([sample(1, "a")] * 12, by_majority) == 4
    mixed = [sample(i % 2, "ab"[i % 2]) for i in range(12)]
    assert taken_of(mixed, by_majority) == 12
    assert taken_of(mixed, Stopping()) == 12
    for wrong in (("luck",), ("majority", 0.4), ("majority", 1.0), ("majority", 0.9, 0)):
        with pytest.raises(UsageError):
            Stopping(*wrong)


def test_saving_keeps_accuracy():
    rng = np.random.default_rng(1)
    questions = []
    for i, p in enumerate(rng.uniform(0.05, 0.95, 40)):
        right = rng.random(16) < p
        samples = tuple(sample(r, "g" if r else str(rng.integers(4))) for r in right)
        questions.append(Question(str(i), "g", samples))
    trace = Trace("m", "dense", "t", 100, tuple(questions))
    for rule in ("verifier", "majority"):
        found = saving(trace, Stopping(rule))
        assert found.samples < 0.85
        assert found.tokens == pytest.approx(found.samples)
        assert found.accuracy > found.accuracy_of_all - 0.03
    everything = saving(trace, Stopping())
    assert everything.samples == 1
    assert everything.accuracy == everything.accuracy_of_all
