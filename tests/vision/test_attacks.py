import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from thresher.errors import ThresherError, UsageError
from thresher.evaluation.statistics import wilson
from thresher.vision import attacks
from thresher.vision.attacks import (
    ATTACKS,
    Attack,
    compare,
    evaluate,
    mcnemar,
    parse_attacks,
    transfer,
)
from thresher.vision.data import Images
from thresher.vision.masking import masking_checks
from thresher.vision.models import Classifier, Description
from thresher.vision.robustness import attack

pytest.importorskip("torchattacks")
SHAPE = (2, 4, 4)
SIZE = math.prod(SHAPE)
QUICK = [replace(attack, steps=min(attack.steps, 20), restarts=1) for attack in ATTACKS.values() if not attack.parts]
PGD1, PGD5 = Attack("pgd1", "pgd", 20, 1), Attack("pgd5", "pgd", 20, 5)


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    """Tiny models: a second thread only waits."""


def linear(classes, seed=0, scale=1.0, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(SIZE, classes)
    with torch.no_grad():
        layer.weight.copy_(scale * torch.randn(classes, SIZE, generator=generator))
        layer.bias.copy_(offset - 0.5 * layer.weight.sum(dim=1))  # grey lies on every boundary
    return nn.Sequential(nn.Flatten(), layer)


def pictures(count, low=0.0, high=1.0, seed=1):
    return low + (high - low) * torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def predicted(model, images):
    with torch.no_grad():
        return model(images).argmax(dim=1)


def margins(model, images, labels):
    """Logit of the label less that of each class, [N, classes]; weights of the class less those of the label."""
    with torch.no_grad():
        logits, weight = model(images), model[1].weight
        return logits.gather(1, labels[:, None]) - logits, weight[None] - weight[labels][:, None]


def blobs(count, seed):
    """Four classes, each around a pattern of its own."""
    generator = torch.Generator().manual_seed(seed)
    centres = 0.35 + 0.3 * torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(7))
    labels = torch.randint(0, 4, (count,), generator=generator)
    noisy = centres[labels] + 0.12 * torch.randn(count, *SHAPE, generator=generator)
    return noisy.clamp(0, 1), labels


def trained(seed, width=8):
    """A small convolutional net with batch norm and dropout, trained on blobs and left in train mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(SHAPE[0], width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(width * 16, 4),
        )
        images, labels = blobs(400, seed=seed + 10)
        optimizer = torch.optim.Adam(net.parameters(), 0.01)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images), labels).backward()
            optimizer.step()
        optimizer.zero_grad()
    return net


@pytest.fixture(scope="module")
def net():
    torch.set_num_threads(1)
    return trained(0)


# Robust accuracy


@pytest.mark.parametrize("attack", ["fgsm", "pgd20", "mifgsm", "apgd-ce"])
@pytest.mark.parametrize("epsilon", [0.01, 0.05, 0.2])
def test_two_linear_classes_fall_where_the_margin_says(attack, epsilon):
    """The worst change of each pixel is known, also where [0, 1] leaves less room than epsilon."""
    model, images = linear(2), pictures(200)
    labels = predicted(model, images)
    labels[:20] = 1 - labels[:20]  # misclassified: lost
    gap, pull = (v[torch.arange(200), 1 - labels] for v in margins(model, images, labels))
    flat = images.flatten(1)
    room = torch.where(pull > 0, 1 - flat, flat).clamp(max=epsilon)
    exact = gap - (pull.abs() * room).sum(dim=1)
    assert exact.abs().min() > 1e-4
    result = evaluate(model, images, labels, attack, [epsilon], batch=64)
    assert result.outcomes[0].survived == tuple((exact > 0).tolist())
    assert result.outcomes[0].accuracy == wilson(int((exact > 0).sum()), 200)
    assert result.clean.accuracy.mean == 0.9
    assert result.clean.survived[:21] == (False,) * 20 + (True,)


def test_targeted_attacks_find_the_exact_set_of_five_linear_classes():
    """Inside the box an image falls where some class i has less margin than epsilon |w_i - w_y|_1: not always the
    runner-up, as weights differ in size."""
    model, images, epsilon = linear(5), pictures(60, 0.3, 0.7), 0.012
    with torch.no_grad():
        model[1].weight[3:] *= 4
        model[1].bias.copy_(torch.tensor([0, 0, 0, -1, -1]) - 0.5 * model[1].weight.sum(dim=1))
    labels = predicted(model, images)
    gap, pull = margins(model, images, labels)
    left = (gap - epsilon * pull.abs().sum(dim=2)).scatter(1, labels[:, None], math.inf)
    nearest, runner_up = left.argmin(dim=1), gap.scatter(1, labels[:, None], math.inf).argmin(dim=1)
    left = left.amin(dim=1)
    chosen = left.abs() > 0.05
    images, labels, left = images[chosen], labels[chosen], left[chosen]
    assert ((nearest != runner_up)[chosen] & (left < 0)).any()
    assert 5 < (left > 0).sum() < len(left) - 5
    parts = [replace(attack, steps=50) for attack in ATTACKS["autoattack"].parts]
    tried = [replace(ATTACKS["autoattack"], parts=tuple(parts)), parts[1], parts[2]]
    for outcome in evaluate(model, images, labels, tried, [epsilon]).outcomes:
        assert outcome.survived == tuple((left > 0).tolist()), outcome.attack


def test_autoattack_is_the_standard_set():
    parts = ATTACKS["autoattack"].parts
    assert [(a.kind, a.steps) for a in parts] == [("apgd-ce", 100), ("apgd-t", 100), ("fab-t", 100), ("square", 5000)]
    pgd = {name: (a.steps, a.restarts) for name, a in ATTACKS.items() if a.kind == "pgd"}
    assert pgd == {"pgd20": (20, 5), "pgd100": (100, 5)}


@pytest.mark.parametrize("attack", QUICK, ids=lambda a: a.name)
def test_every_attack_stays_within_its_bounds_and_changes_nothing(net, attack, monkeypatch):
    """The model's modes, flags, gradients and buffers, torch's random state, and images that are misclassified."""
    images, labels = blobs(30, seed=2)
    attacked, before = [], images.clone()
    original = attacks._checked

    def seen(attack, images, made, epsilon):
        attacked.append((images, original(attack, images, made, epsilon)))
        return attacked[-1][1]

    monkeypatch.setattr(attacks, "_checked", seen)
    net.train()
    net[1].eval()
    net[0].weight.requires_grad_(False)
    net[5].bias.grad = torch.ones(4)
    buffers = {name: value.clone() for name, value in net.state_dict().items()}
    torch.manual_seed(99)
    state = torch.get_rng_state()
    with torch.no_grad():
        first = evaluate(net, images, labels, [attack], [0.1], seed=3, batch=16)
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(5)
        assert evaluate(net, images, labels, [attack], [0.1], seed=3, batch=16) == first
    assert [module.training for module in net] == [True, False, True, True, True, True]
    assert [p.requires_grad for p in net.parameters()] == [False] + [True] * 5
    assert all(p.grad is None for p in net.parameters() if p is not net[5].bias)
    assert torch.equal(net[5].bias.grad, torch.ones(4))
    assert all(torch.equal(value, buffers[name]) for name, value in net.state_dict().items())
    assert torch.equal(images, before)
    net[0].weight.requires_grad_(True)
    net[5].bias.grad = None
    right = int((predicted(net.eval(), images) == labels).sum())
    assert sum(len(of) for of, _ in attacked) == 2 * right  # two evaluations, nothing that is lost already
    for of, made in attacked:
        assert made.min() >= 0
        assert made.max() <= 1
        assert attack.minimal or (made - of).abs().max() <= 0.1 + 1e-6


def test_models_in_train_mode_are_measured_in_eval_mode(net):
    images, labels = blobs(60, seed=3)
    results = []
    for training in (False, True):
        net.train(training)
        results.append(evaluate(net, images, labels, "fgsm,pgd20", [0.05, 0.1], batch=16))
    assert results[0] == results[1]
    expected = predicted(net.eval(), images) == labels
    assert results[0].clean.survived == tuple(expected.tolist())


def test_epsilon_zero_leaves_accuracy_unchanged(net):
    images, labels = blobs(40, seed=4)
    labels[:5] = (labels[:5] + 1) % 4
    result = evaluate(net, images, labels, [a for a in QUICK if not a.minimal], [0.0])
    assert {o.survived for o in result.outcomes} == {result.clean.survived}
    assert transfer(net, net, images, labels, ATTACKS["fgsm"], 0.0).survived == result.clean.survived


def test_larger_epsilons_take_more_and_batches_do_not_matter(net):
    images, labels = blobs(50, seed=5)
    result = evaluate(net, images, labels, "fgsm,pgd20", [0.02, 0.05, 0.1, 0.5])
    accuracies = [o.accuracy.mean for o in result.outcomes if o.attack == "pgd20"]
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[0] > 0.5
    assert accuracies[-1] == 0
    assert [(o.attack, o.epsilon) for o in result.outcomes[:5]] == [
        *(("fgsm", e) for e in (0.02, 0.05, 0.1, 0.5)),
        ("pgd20", 0.02),
    ]
    again = evaluate(net, images, labels, "fgsm", [0.05], batch=7)
    assert again.outcomes[0] == result.outcomes[1]


class Ripples(nn.Module):
    """Class 1 in narrow valleys: where a walk ends depends on where it starts."""

    def forward(self, images):
        height = torch.sin(9 * images.flatten(1)).sum(dim=1)
        return torch.stack([height + 6, torch.zeros_like(height)], dim=1)


def test_more_restarts_are_never_weaker():
    images = pictures(60, seed=6)
    labels = predicted(Ripples(), images)
    kept = [
        np.array(evaluate(Ripples(), images, labels, [attack], [0.3], batch=25).outcomes[0].survived)
        for attack in (PGD1, replace(PGD1, restarts=2), PGD5)
    ]
    assert (kept[1] <= kept[0]).all()
    assert (kept[2] <= kept[1]).all()
    assert kept[2].sum() < kept[0].sum()


def test_every_restart_has_a_start_of_its_own(monkeypatch):
    """A model whose logits are constant: what PGD makes is where it started."""
    starts = []
    original = attacks._checked

    def seen(*given):
        starts.append(original(*given))
        return starts[-1]

    monkeypatch.setattr(attacks, "_checked", seen)
    images = pictures(3, 0.4, 0.6)
    evaluate(linear(2, scale=0.0), images, torch.zeros(3, dtype=torch.int64), [PGD5], [0.1])
    assert len(torch.stack(starts).unique(dim=0)) == 5


def test_seeds_matter():
    images = pictures(60, seed=6)
    labels = predicted(Ripples(), images)
    one, two = (evaluate(Ripples(), images, labels, [PGD1], [0.3], seed=seed).outcomes[0] for seed in (0, 1))
    assert one.survived != two.survived


def test_outputs_of_transformers_are_unwrapped(net):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, images):
            return SimpleNamespace(logits=self.net(images))

    images, labels = blobs(30, seed=8)
    chosen = [a for a in QUICK if a.kind in ("fgsm", "apgd-t", "deepfool")]
    assert evaluate(Wrapped(), images, labels, chosen, [0.05]) == evaluate(net, images, labels, chosen, [0.05])


def test_progress_rises_to_the_whole(net):
    images, labels = blobs(30, seed=8)
    calls = []
    evaluate(net, images, labels, "fgsm,pgd20", [0, 0.05], batch=8, progress=lambda *call: calls.append(call))
    assert calls == sorted(calls)
    assert len(calls) > 8
    assert calls[-1] == (120, 120)


# Distances


@pytest.mark.parametrize(("attack", "within"), [("deepfool", 1.025), ("cw", 1.1)])
@pytest.mark.parametrize("offset", [0.0, -50.0])
def test_distances_of_linear_classes(attack, within, offset):
    """To the boundary it is margin / |w_1 - w_0|; also where all logits are negative, as CW's loss is wrong there."""
    model, images = linear(2, offset=offset), pictures(30, 0.2, 0.8)
    labels = predicted(model, images)
    labels[:3] = 1 - labels[:3]
    gap, pull = (v[torch.arange(30), 1 - labels] for v in margins(model, images, labels))
    exact = (gap / pull.norm(dim=1))[3:]
    (found,) = evaluate(model, images, labels, attack, []).distances
    assert found.distances[:3] == (0, 0, 0)
    ratio = torch.tensor(found.distances[3:]) / exact
    assert ratio.min() >= 0.999
    assert ratio.median() < within
    assert (found.attacked, found.failed) == (27, 0)
    assert found.median == pytest.approx(np.median(found.distances[3:]))


@pytest.mark.parametrize("attack", ["deepfool", "cw"])
def test_distances_where_pixels_are_black(attack):
    """Clipped steps of DeepFool end before the boundary in the library, and CW moves no pixel that is 0 or 1."""
    model = linear(4, seed=3)
    images = pictures(40, -0.7, 0.7).clamp(min=0)
    images[:2] = images[:2].round()
    (found,) = evaluate(model, images, predicted(model, images), attack, []).distances
    assert found.failed == 0
    assert 0 < found.median < 2


class Stairs(nn.Module):
    """A linear model behind a quantiser: its gradients are zero."""

    def __init__(self, inner, steps=8):
        super().__init__()
        self.inner, self.steps = inner, steps

    def forward(self, images):
        return self.inner((self.steps * images).round() / self.steps)


def test_an_attack_that_gives_nan_has_failed():
    """DeepFool divides by a gradient that is zero, and NaN is classified as class 0."""
    model, images = Stairs(linear(4)), pictures(20)
    (found,) = evaluate(model, images, predicted(model, images), "deepfool", []).distances
    assert (found.attacked, found.failed, found.median) == (20, 20, math.inf)


def test_nothing_classified_correctly():
    model, images = linear(2), pictures(5)
    result = evaluate(model, images, 1 - predicted(model, images), "fgsm,deepfool", [0.1])
    assert result.outcomes[0].accuracy.mean == 0
    assert math.isnan(result.distances[0].median)
    assert result.distances[0].distances == (0,) * 5


# Two models


def test_transfer(net):
    """From a model to itself it is the attack; to another it is weaker, and what the target misclassifies is lost."""
    other = trained(1, width=6)
    images, labels = blobs(100, seed=9)
    attack, epsilon = ATTACKS["pgd20"], 0.05
    white = evaluate(net, images, labels, [attack], [epsilon])
    assert transfer(net, net, images, labels, attack, epsilon) == white.outcomes[0]
    moved = transfer(other, net, images, labels, attack, epsilon)
    assert white.outcomes[0].accuracy.mean < moved.accuracy.mean < white.clean.accuracy.mean
    wrong = 1 - predicted(net.eval(), images).clamp(max=1)
    assert sum(transfer(other, net, images, wrong, attack, epsilon).survived) == 0
    with pytest.raises(UsageError, match="takes no epsilon"):
        transfer(other, net, images, labels, ATTACKS["cw"], epsilon)


def test_transfer_attacks_images_that_the_source_misclassifies():
    """Mirrored weights: the source is wrong about everything, so its attack drives images into the target's class."""
    model = linear(2)
    mirrored = linear(2, scale=-1.0)
    images = pictures(50, 0.3, 0.7)
    labels = predicted(model, images)
    assert sum(transfer(mirrored, model, images, labels, ATTACKS["fgsm"], 0.1).survived) == 50
    assert sum(transfer(model, model, images, labels, ATTACKS["fgsm"], 0.1).survived) < 25


def test_comparisons_are_paired(net):
    images, labels = blobs(80, seed=11)
    other = trained(1, width=6)
    a, b = (evaluate(m, images, labels, "fgsm", [0.08]).outcomes[0] for m in (net, other))
    found = compare(a, b, resamples=500)
    assert found.difference.mean == pytest.approx(a.accuracy.mean - b.accuracy.mean)
    assert found.only_a - found.only_b == sum(a.survived) - sum(b.survived)
    assert found.only_a == sum(x and not y for x, y in zip(a.survived, b.survived, strict=True))
    assert found.p == mcnemar(found.only_a, found.only_b)
    same = compare(a, a, resamples=100)
    assert (same.difference.low, same.difference.high, same.only_a, same.p) == (0, 0, 0, 1)
    reverse = compare(b, a, resamples=500)
    assert (reverse.only_a, reverse.only_b, reverse.p) == (found.only_b, found.only_a, found.p)
    for changed in ((images.flip(0), labels), (images, labels.flip(0))):
        with pytest.raises(UsageError, match="different images"):
            compare(a, evaluate(net, *changed, "fgsm", [0.08]).outcomes[0])


def test_mcnemar_by_hand():
    assert mcnemar(0, 0) == mcnemar(1, 0) == mcnemar(1, 1) == mcnemar(7, 7) == 1
    assert mcnemar(5, 0) == 2 / 32
    assert mcnemar(2, 8) == mcnemar(8, 2) == 2 * (1 + 10 + 45) / 1024
    assert mcnemar(10, 0) == 2 / 1024
    assert mcnemar(5200, 4800) == pytest.approx(math.erfc(3.99 / 2**0.5), rel=0.01)  # normal, corrected


# Intervals


def test_wilson_against_known_values():
    """Newcombe 1998, table I: 81/263, 15/148, 0/20, 1/29."""
    known = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0, 0.1611), (1, 29): (0.0061, 0.1718)}
    for (successes, trials), bounds in known.items():
        interval = wilson(successes, trials)
        assert (interval.low, interval.high) == pytest.approx(bounds, abs=5e-5)
        assert interval.mean == successes / trials
        mirror = wilson(trials - successes, trials)
        assert (1 - mirror.high, 1 - mirror.low) == pytest.approx(bounds, abs=5e-5)
    assert wilson(0, 1).low == 0
    assert wilson(1, 1).high == 1
    assert wilson(5, 10, 0.99).high > wilson(5, 10).high > wilson(5, 10, 0.5).high
    for wrong in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(UsageError, match="no share"):
            wilson(*wrong)
    with pytest.raises(UsageError, match="confidence"):
        wilson(1, 2, 1.0)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_wilson_covers_the_true_share(share):
    """4,000 samples of 200: coverage is known to lie between 93 and 97 % here; three sigma of the estimate are 1 %."""
    drawn = np.random.default_rng(5).binomial(200, share, 4000)
    covered = [interval.low <= share <= interval.high for interval in (wilson(int(k), 200) for k in drawn)]
    assert 0.92 <= np.mean(covered) <= 0.98


# Masked gradients


class Saturated(nn.Module):
    """Logits so far apart that the gradient of cross-entropy is zero in float32. Classifies as what is inside."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images):
        return 1e4 * self.inner(images)


def failures(checks):
    return {check.name for check in checks if not check.passed}


def test_a_plain_model_passes_the_checks_and_masked_ones_do_not(net):
    images, labels = blobs(50, seed=12)
    surrogate = trained(1, width=6)
    calls = []
    plain = masking_checks(net, images, labels, 0.08, surrogate=surrogate, progress=lambda *call: calls.append(call))
    assert not failures(plain)
    assert len(plain) == 7
    assert calls[-1] == (350, 350)
    assert calls == sorted(calls)
    by_name = {check.name: check for check in plain}
    assert by_name["a large epsilon reaches 0"].numbers["bim20"] == 0
    assert all(0 <= number <= 1 for check in plain for number in check.numbers.values())
    box = {f"black box ({kind}) is no stronger than white box" for kind in ("Square", "transfer")}
    for masked in (Stairs(net), Saturated(net)):
        found = failures(masking_checks(masked, images, labels, 0.08, surrogate=surrogate))
        assert box | {"a large epsilon reaches 0"} <= found
    assert len(masking_checks(net, images[:5], labels[:5], 0.08)) == 6  # without a surrogate


@pytest.mark.parametrize(
    ("weak", "better", "failed"),
    [
        ("pgd20 once", "fgsm", "iterative beats single-step"),
        ("pgd100 once", "pgd20 once", "more steps never help the defender"),
        ("pgd20", "pgd20 once", "more restarts never help the defender"),
        ("pgd20", "noise", "noise is nearly harmless"),
        ("pgd20", "square", "black box (Square) is no stronger than white box"),
    ],
)
def test_each_check_sees_the_order_it_is_about(net, monkeypatch, weak, better, failed):
    """One attack loses 10 images of 50, the others 20, noise none: what compares these two must fail."""
    lost = dict.fromkeys(("fgsm", "pgd20", "pgd20 once", "pgd100 once", "square"), 20) | {"noise": 0}
    lost |= {weak: 10, better: 20}

    def outcome(self, attack, epsilon, seed, report):
        count = 50 if epsilon == 1 else lost[attack.name]
        return self.judge(attack.name, epsilon, torch.arange(50) >= count)

    monkeypatch.setattr(attacks._Target, "outcome", outcome)
    images = pictures(50)
    checks = masking_checks(net, images, predicted(net.eval(), images), 0.1)
    assert failed in failures(checks)
    lost |= {weak: 20, "noise": 5}
    assert not failures(masking_checks(net, images, predicted(net.eval(), images), 0.1))
    lost["noise"] = 6  # over a quarter
    assert failures(masking_checks(net, images, predicted(net.eval(), images), 0.1)) == {"noise is nearly harmless"}


# Errors


def test_names():
    assert [a.name for a in parse_attacks("fgsm, PGD20,fgsm,cw")] == ["fgsm", "pgd20", "cw"]
    with pytest.raises(UsageError, match="unknown attack 'pgd'; known: noise, fgsm, pgd20"):
        parse_attacks("fgsm,pgd")
    with pytest.raises(UsageError, match="unknown attack ''"):
        parse_attacks("")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(0, *SHAPE), "labels": torch.zeros(0, dtype=torch.int64)}, "no images"),
        ({"images": torch.full((3, *SHAPE), math.nan)}, "NaN"),
        ({"images": torch.full((3, *SHAPE), 1.1)}, r"in \[0, 1\]"),
        ({"images": torch.full((3, *SHAPE), -0.1)}, r"in \[0, 1\]"),
        ({"images": torch.zeros(3, SIZE)}, "float32"),
        ({"images": torch.zeros(3, *SHAPE, dtype=torch.uint8)}, "float32"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, r"int64 \[3\]"),
        ({"labels": torch.zeros(3)}, r"int64 \[3\]"),
        ({"labels": torch.tensor([0, 1, 3])}, "label 3: the model has 3 classes"),
        ({"labels": torch.tensor([0, -1, 2])}, "label -1"),
        ({"epsilons": [-0.1]}, "epsilon=-0.1"),
        ({"epsilons": [8]}, "8/255"),
        ({"epsilons": [math.nan]}, "epsilon=nan"),
        ({"epsilons": []}, "nothing to do"),
        ({"attacks": []}, "nothing to do"),
        ({"attacks": "autoattack"}, "at least 4 classes; the model has 3"),
        ({"attacks": [Attack("own", "magic")]}, "unknown kind 'magic'"),
        ({"batch": 0}, "batch=0"),
        ({"model": nn.Flatten(0)}, "logits"),
        ({"model": nn.Identity()}, "logits"),
        ({"model": linear(3, offset=math.inf)}, "not finite"),
    ],
)
def test_bad_input_is_a_usage_error(change, message):
    model, images = linear(3).train(), pictures(3)
    given = {"model": model, "images": images, "labels": predicted(model, images), "attacks": "fgsm", "epsilons": [0.1]}
    with pytest.raises(UsageError, match=message) as error:
        evaluate(**given | change)
    assert "\n" not in str(error.value)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_checks_need_something_to_attack():
    model, images = linear(2), pictures(3)
    with pytest.raises(UsageError, match="epsilon=0"):
        masking_checks(model, images, predicted(model, images), 0)
    with pytest.raises(UsageError, match="no image is classified"):
        masking_checks(model, images, 1 - predicted(model, images), 0.1)
    with pytest.raises(UsageError, match="8/255"):
        transfer(model, model, images, predicted(model, images), ATTACKS["fgsm"], 8)


def test_models_without_gradients_or_parameters():
    class Detached(nn.Module):
        def forward(self, images):
            return images.detach().flatten(1)[:, :4].contiguous()

    images = pictures(10)
    labels = predicted(Detached(), images)
    with pytest.raises(UsageError, match="no gradients"):
        evaluate(Detached(), images, labels, "fgsm", [0.1])
    square = [replace(ATTACKS["square"], steps=50)]
    assert evaluate(Detached(), images, labels, square, [0.5]).outcomes[0].accuracy.mean < 1


def test_logits_that_are_nan_are_wrong():
    class Cracks(nn.Module):
        """NaN where the mean is above a half: argmax says class 0."""

        def forward(self, images):
            mean = images.flatten(1).mean(dim=1)
            broken = torch.where(mean > 0.5, math.nan, 0.0)
            return torch.stack([2 - mean + broken, mean], dim=1)

    images, labels = torch.full((4, *SHAPE), 0.45), torch.zeros(4, dtype=torch.int64)
    assert evaluate(Cracks(), images, labels, "fgsm", [0.1]).outcomes[0].accuracy.mean == 0


def test_an_attack_beyond_its_bounds_is_an_error(monkeypatch):
    images = pictures(5, 0.2, 0.8)
    labels = predicted(linear(2), images)
    for size, epsilon in ((0.11, 0.1), (0.9, 1.0)):
        monkeypatch.setattr(attacks, "_prepare", lambda *_, size=size: lambda x, y: x + size)
        with pytest.raises(ThresherError, match="left its bounds") as error:
            evaluate(linear(2), images, labels, "fgsm", [epsilon])
        assert not isinstance(error.value, UsageError)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    images = pictures(5)
    with pytest.raises(UsageError, match=r"pip install 'thresher\[vision\]'"):
        evaluate(linear(2), images, predicted(linear(2), images), "fgsm", [0.1])


def test_a_report_in_which_every_attack_failed_is_json():
    class Sure(torch.nn.Module):
        """The first class, whatever it sees."""

        def __init__(self):
            super().__init__()
            self.logits = torch.nn.Parameter(torch.tensor([5.0, 0.0]))

        def forward(self, x):
            return self.logits.expand(len(x), 2) + 0 * x.flatten(1).sum(1, keepdim=True)

    classifier = Classifier(Sure(), Description("test", ("a", "b"), (1, 4, 4)))
    images = Images(torch.randint(256, (4, 1, 4, 4), dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), ("a", "b"))
    report = attack(classifier, images, "deepfool", [], check=False)
    assert [(d["median"], d["attacked"], d["failed"]) for d in report.distances] == [(None, 4, 4)]
    json.dumps(report.summary(), allow_nan=False)
