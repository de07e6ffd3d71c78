"""Losses against values worked out by hand, and zero where nothing is left to learn."""

import math

import pytest
import torch
import torch.nn.functional as F

from thresher.errors import UsageError
from thresher.vision.losses import (
    OBJECTIVES,
    Objective,
    angle_loss,
    attack_for_training,
    attention_loss,
    distance_loss,
    find_objective,
    hint_loss,
    logit_loss,
    objective_loss,
    similarity_loss,
    soft_loss,
)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_by_hand():
    s, t = torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([[2.0, 1.0], [0.0, 2.0]])
    assert logit_loss(s, t).item() == pytest.approx(((1 + 4) + 4) / 2 / 2)
    p = [1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(0.5))]  # of (2, 1) at T = 2
    q = [1 / (1 + math.exp(1)), 1 / (1 + math.exp(-1))]
    first = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    p2 = [1 / (1 + math.exp(1)), 1 / (1 + math.exp(-1))]
    second = sum(a * math.log(a / 0.5) for a in p2)
    assert soft_loss(s, t, 2.0).item() == pytest.approx(4 * (first + second) / 2, rel=1e-6)
    ours, theirs = torch.ones(1, 2, 1, 2), torch.zeros(1, 2, 1, 2)
    ours[0, :, 0, 1], theirs[0, 0, 0, 0] = 2.0, 3.0
    assert hint_loss([ours], [theirs]).item() == pytest.approx((4 + 1 + 4 + 4) / 4)
    # Squares summed over channels: (2, 8) and (9, 0); of length 1: (1, 4) / sqrt(17) and (1, 0).
    expected = ((1 / math.sqrt(17) - 1) ** 2 + 16 / 17) / 2
    assert attention_loss([ours], [theirs]).item() == pytest.approx(expected, rel=1e-6)


def test_similarity_by_hand():
    a, b = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    # Rows of products of length 1: the unit matrix, and all 1 / sqrt(2).
    expected = (2 * (1 - 1 / math.sqrt(2)) ** 2 + 2 / 2) / 4
    assert similarity_loss([a[:, :, None, None]], [b[:, :, None, None]]).item() == pytest.approx(expected, rel=1e-6)


def test_relations_against_loops():
    s, t = randn(6, 5), randn(6, 5, seed=1)

    def huber(x):
        return x * x / 2 if abs(x) < 1 else abs(x) - 0.5

    def distances(x):
        d = [[float((x[i] - x[j]).norm()) for j in range(6)] for i in range(6)]
        mean = sum(map(sum, d)) / 30
        return [[v / mean for v in row] for row in d]

    a, b = distances(s), distances(t)
    expected = sum(huber(a[i][j] - b[i][j]) for i in range(6) for j in range(6)) / 36
    assert distance_loss(s, t).item() == pytest.approx(expected, rel=1e-9)

    def angle(x, i, j, k):
        if i in (j, k):
            return 0.0
        return float(F.cosine_similarity(x[j] - x[i], x[k] - x[i], dim=0))

    triples = [(i, j, k) for i in range(6) for j in range(6) for k in range(6)]
    expected = sum(huber(angle(s, *n) - angle(t, *n)) for n in triples) / 216
    assert angle_loss(s, t).item() == pytest.approx(expected, rel=1e-9)


def test_distances_of_wide_features_are_the_same():
    s, t = randn(5, 70), randn(5, 70, seed=1)
    small = distance_loss(s[:, :64], t[:, :64])
    padded = [F.pad(x[:, :64], (0, 6)) for x in (s, t)]
    assert distance_loss(*padded).item() == pytest.approx(small.item(), rel=1e-9)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_nothing_to_learn_from_oneself(name):
    objective = OBJECTIVES[name]
    logits = randn(8, 4).requires_grad_()
    features = [randn(8, 3, 4, 4, seed=1).requires_grad_(), randn(8, 5, 2, 2, seed=2).requires_grad_()]
    labels = torch.arange(8) % 4
    taught = logits.detach()
    loss = objective_loss(objective, logits, labels, taught, (features, [f.detach() for f in features]), logits)
    rest = loss - objective.labels * F.cross_entropy(logits, labels)
    slopes = torch.autograd.grad(rest, [logits, *features], allow_unused=True)
    assert rest.item() == pytest.approx(0, abs=1e-9)
    for slope in slopes:
        assert slope is None or slope.abs().max() < 1e-6


def test_gradients_of_soft_targets_do_not_shrink_with_temperature():
    t = randn(64, 10, seed=1)
    sizes = []
    for temperature in (1.0, 4.0, 16.0):
        s = randn(64, 10).requires_grad_()
        (slope,) = torch.autograd.grad(soft_loss(s, t, temperature), s)
        sizes.append(float(slope.norm()))
    assert 0.5 < sizes[1] / sizes[0] < 2
    assert 0.5 < sizes[2] / sizes[1] < 2
    # In the limit of a high temperature it is the distance of the centred logits (Hinton 2015, 2.1).
    s = randn(64, 10)
    centred = ((s - s.mean(1, True)) - (t - t.mean(1, True))).square().sum(1).mean() / (2 * 10)
    assert soft_loss(s, t, 1000.0).item() == pytest.approx(centred.item(), rel=1e-2)


def test_weights_add_up():
    s, t, labels = randn(8, 4), randn(8, 4, seed=1), torch.arange(8) % 4
    parts = {"labels": 0.3, "logits": 0.2, "soft": 0.5}
    whole = objective_loss(Objective(**parts), s, labels, t)
    single = [w * objective_loss(Objective(**{n: 1.0}), s, labels, t) for n, w in parts.items()]
    assert whole.item() == pytest.approx(sum(single).item())


@pytest.mark.parametrize("name", ["ard", "rslad"])
def test_attacks_of_training_stay_within_bounds_and_raise_the_loss(name):
    objective = OBJECTIVES[name]
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 4))
    images, labels = torch.rand(32, 1, 4, 4), torch.arange(32) % 4
    taught = randn(32, 4).float()
    generator = torch.Generator().manual_seed(1)
    moved = attack_for_training(objective, model, images, labels, taught, 0.1, 7, generator)
    assert (moved - images).abs().max() <= 0.1 + 1e-6
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert not moved.requires_grad

    def loss(x):
        logits = model(x)
        return F.cross_entropy(logits, labels) if objective.inner == "labels" else soft_loss(logits, taught, 1.0)

    assert loss(moved) > loss(images) + 0.05
    assert all(p.grad is None for p in model.parameters())


def test_objectives_that_make_no_sense():
    for wrong in ({}, {"labels": -1.0}, {"labels": 1.0, "temperature": 0.0}, {"labels": 1.0, "inner": "x"}):
        with pytest.raises(UsageError):
            Objective(**wrong)
    with pytest.raises(UsageError, match="choose one of cross-entropy"):
        find_objective("magic")
