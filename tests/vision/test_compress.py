"""From a classifier to a smaller one: targets of every kind, by every way to choose ranks."""

import pytest
import torch

from thresher.errors import UsageError
from thresher.vision import compress as module
from thresher.vision.compress import Settings, compress, fold
from thresher.vision.data import Images
from thresher.vision.layers import count_macs
from thresher.vision.models import new_classifier
from thresher.vision.ranks import Costs, Target, counted_costs, log_probabilities

CLASSES = ("a", "b", "c")


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    pass


@pytest.fixture(scope="module")
def whole():
    """A net whose inputs lie in few directions, as those of trained nets do."""
    torch.manual_seed(0)
    classifier = new_classifier("resnet", CLASSES, (1, 20, 20))
    with torch.no_grad():
        for conv in (m for m in classifier.module.modules() if isinstance(m, torch.nn.Conv2d)):
            conv.weight *= torch.arange(1, conv.out_channels + 1)[:, None, None, None] ** -0.6
        for _ in range(3):
            classifier.module.train()(torch.rand(16, 1, 20, 20))
    classifier.module.eval()
    return classifier


@pytest.fixture(scope="module")
def images():
    g = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (300, 1, 5, 5), generator=g).float()
    pixels = torch.nn.functional.interpolate(pixels, 20, mode="bilinear").byte()
    return Images(pixels, torch.zeros(300, dtype=torch.long), CLASSES)


def harm(whole, made, images):
    x = images.pixels.float() / 255
    expected, given = (log_probabilities(m.module, x) for m in (whole, made.classifier))
    return float(torch.nn.functional.kl_div(given, expected, reduction="batchmean", log_target=True))


@pytest.mark.parametrize("cost", ["flops", "parameters"])
@pytest.mark.parametrize("method", ["sensitivity", "equal"])
def test_targets(whole, images, cost, method):
    made = compress(whole, Settings(Target(0.5, cost), method, multiple=4), images)
    assert made.reached == pytest.approx(made.shares[cost])
    assert 0.4 < made.reached <= 0.5
    assert made.classifier.about.ranks == {r.name: r.ranks for r in made.layers if r.kind != "kept"}


def test_calibrated_is_better_than_by_weights_and_that_than_equal(whole, images):
    calibrated = harm(whole, compress(whole, Settings(Target(0.4)), images), images)
    by_weights = harm(whole, compress(whole, Settings(Target(0.4))), images)
    equal = harm(whole, compress(whole, Settings(Target(0.4), "equal")), images)
    assert calibrated < equal
    assert by_weights < equal


def test_weighted_by_inputs_the_outputs_are_nearer(whole, images):
    ranks = compress(whole, Settings(Target(0.4), "equal")).classifier.about.ranks
    plain, weighted = (
        harm(whole, compress(whole, Settings(None, by_hand=ranks, weighted=w), images), images) for w in (False, True)
    )
    assert weighted < plain


@pytest.mark.parametrize("method", ["sensitivity", "equal"])
def test_a_target_of_latency_is_held_against_the_whole(whole, monkeypatch, method):
    """Layers alone take their multiply-adds, and among others half as much again where they are decomposed."""

    def costs(classifier, surveyed, target):
        counted = counted_costs(surveyed, "flops")
        return Costs(counted.whole, counted.of)

    def latencies(before, after, batches, runtime):
        full, less = (count_macs(c.module, c.example) for c in (before, after))
        return {b: {"before": full, "after": 1.2 * less} for b in batches}

    monkeypatch.setattr(module, "find_costs", costs)
    monkeypatch.setattr(module, "latencies", latencies)
    made = compress(whole, Settings(Target(0.5, "latency", 4), method, multiple=2))
    assert made.reached == pytest.approx(0.5, abs=0.02)
    assert made.shares["flops"] == pytest.approx(0.5 / 1.2, abs=0.02)


def test_vbmf_takes_no_target(whole):
    made = compress(whole, Settings(None, "vbmf"))
    assert made.reached is None
    assert made.shares["flops"] < 1


def test_what_is_refused(whole):
    with pytest.raises(UsageError, match="batch norms are folded"):
        compress(fold(whole), Settings())
    with pytest.raises(UsageError, match="a target is needed"):
        Settings(None)
    with pytest.raises(UsageError, match="choose one of"):
        Settings(method="magic")
    with pytest.raises(UsageError, match="images are needed"):
        compress(whole, Settings(weighted=True))
    with pytest.raises(UsageError, match="asked to be left, the first layer"):
        compress(whole, Settings(leave=("blocks",)))
    with pytest.raises(UsageError, match="no such convolution"):
        compress(whole, Settings(None, by_hand={"nothing": (1, 1)}))
