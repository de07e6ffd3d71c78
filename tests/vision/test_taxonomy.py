"""Losses that follow a taxonomy: their values, their gradients, and what a few steps of each do to a network."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.errors import UsageError
from thresher.vision.data import Images
from thresher.vision.finetune import Settings, finetune, predict, read_by
from thresher.vision.hierarchy import Tree
from thresher.vision.nets import ResNet
from thresher.vision.taxonomy import METHODS, Taxonomy, align_loss, label_loss, level_loss, levels_of


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    pass


SIMILARITY = torch.tensor(
    [[1, 0.9, 0.2, 0.1, 0.3], [0.9, 1, 0.25, 0.1, 0.3], [0.2, 0.25, 1, 0.6, 0.4], [0.1, 0.1, 0.6, 1, 0.5],
     [0.3, 0.3, 0.4, 0.5, 1]]
)  # fmt: skip
BALANCED = Tree((0, 1, 2, 3), (Tree((0, 1), (Tree((0,)), Tree((1,))), 1), Tree((2, 3), (Tree((2,)), Tree((3,))), 1)), 2)
UNEVEN = Tree(
    (0, 1, 2, 3, 4),
    (Tree((0, 1), (), 0.5), Tree((2, 3, 4), (Tree((2,)), Tree((3, 4), (Tree((3,)), Tree((4,))), 1.0)), 1.5)),
    2.0,
)


def random_case(seed, count=11, classes=5, width=6):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(count, classes, generator=g, dtype=torch.float64),
        torch.randint(classes, (count,), generator=g),
        torch.randn(count, width, generator=g, dtype=torch.float64),
    )


def log_softmax(x):
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def test_values_by_hand():
    even = torch.zeros(1, 3)
    flat = torch.eye(3)
    assert label_loss(even, torch.tensor([0]), flat, 1.0) == pytest.approx(math.log(3))
    logits = torch.tensor([[math.log(6), math.log(3), 0.0]])  # probabilities 0.6, 0.3, 0.1
    near = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1.0]])
    near_t = 1 / math.log(2)  # e^(1/t) = 2: targets 0.4, 0.4, 0.2
    expected = -(0.4 * math.log(0.6) + 0.4 * math.log(0.3) + 0.2 * math.log(0.1))
    assert label_loss(logits, torch.tensor([1]), near, near_t) == pytest.approx(expected, rel=1e-6)
    pair = torch.tensor([0, 0, 1])
    assert level_loss(logits, torch.tensor([1]), [pair]) == pytest.approx(-math.log(0.9), rel=1e-6)
    two = level_loss(logits, torch.tensor([1]), [pair, torch.arange(3)])
    assert two == pytest.approx(-(math.log(0.9) + math.log(0.3)) / 2, rel=1e-6)
    features = torch.tensor([[2.0, 0], [0, 2], [3, 3]])  # the means of two classes: (1, 1) and (3, 3); cosine 1
    assert align_loss(features, torch.tensor([0, 0, 2]), flat) == pytest.approx(1, rel=1e-6)
    assert align_loss(features, torch.tensor([0, 1, 2]), flat) == pytest.approx(1 / 3, rel=1e-6)  # 0, 1/2, 1/2 squared


@pytest.mark.parametrize("seed", range(3))
def test_values_against_numpy(seed):
    logits, labels, features = random_case(seed)
    x, y, f, s = logits.numpy(), labels.numpy(), features.numpy(), SIMILARITY.double().numpy()
    logs = log_softmax(x)
    targets = np.exp(log_softmax(s / 0.2))
    expected = np.mean([-(targets[c] * row).sum() for c, row in zip(y, logs, strict=True)])
    assert float(label_loss(logits, labels, SIMILARITY, 0.2)) == pytest.approx(expected, rel=1e-6)
    levels = levels_of(UNEVEN, 5)
    expected = np.mean([
        -np.log(sum(np.exp(row[k]) for k in range(5) if level[k] == level[c]))
        for level in levels
        for c, row in zip(y, logs, strict=True)
    ])  # fmt: skip
    assert float(level_loss(logits, labels, levels)) == pytest.approx(expected, rel=1e-12)
    present = sorted(set(y.tolist()))
    means = {c: f[y == c].mean(0) for c in present}
    squares = [
        (means[a] @ means[b] / np.linalg.norm(means[a]) / np.linalg.norm(means[b]) - s[a, b]) ** 2
        for a in present
        for b in present
        if a != b
    ]
    assert float(align_loss(features, labels, SIMILARITY.double())) == pytest.approx(np.mean(squares), rel=1e-12)


def test_limits():
    logits, labels, features = random_case(5)
    assert float(label_loss(logits, labels, SIMILARITY, 1e-3)) == pytest.approx(float(F.cross_entropy(logits, labels)))
    uniform = float(-logits.log_softmax(1).mean())
    assert float(label_loss(logits, labels, SIMILARITY, 1e6)) == pytest.approx(uniform, rel=1e-5)
    assert float(level_loss(logits, labels, [torch.zeros(5, dtype=torch.int64)])) == pytest.approx(0, abs=1e-12)
    singles = float(level_loss(logits, labels, [torch.arange(5)]))
    assert singles == pytest.approx(float(F.cross_entropy(logits, labels)))
    alone = features.requires_grad_()
    loss = align_loss(alone, torch.full_like(labels, 3), SIMILARITY)
    loss.backward()
    assert float(loss.detach()) == 0
    assert (alone.grad == 0).all()


def test_gradients():
    logits, labels, features = random_case(7, count=6)
    logits.requires_grad_()
    features.requires_grad_()
    similarity = SIMILARITY.double()
    assert torch.autograd.gradcheck(lambda x: label_loss(x, labels, similarity, 0.3), logits)
    assert torch.autograd.gradcheck(lambda x: level_loss(x, labels, levels_of(UNEVEN, 5)), logits)
    assert torch.autograd.gradcheck(lambda x: align_loss(x, labels, similarity), features)


def test_gradients_of_a_group_that_seems_impossible_are_finite():
    logits = torch.tensor([[200.0, -200.0, -200.0]], requires_grad=True)
    level_loss(logits, torch.tensor([1]), [torch.tensor([0, 1, 1])]).backward()
    assert torch.allclose(logits.grad, torch.tensor([[1.0, -0.5, -0.5]]))


def same(levels, *expected):
    return [t.tolist() for t in levels] == [list(e) for e in expected]


def test_levels_of_trees():
    assert same(levels_of(BALANCED, 4), (0, 0, 1, 1))  # below them are classes alone
    assert same(levels_of(UNEVEN, 5), (0, 0, 1, 1, 1), (0, 0, 1, 2, 2), (0, 0, 1, 2, 3))
    flat = Tree((0, 1, 2), (Tree((0,)), Tree((1,)), Tree((2,))), 1.0)
    assert levels_of(flat, 3) == levels_of(Tree((0, 1, 2)), 3) == []
    mixed = Tree((0, 1, 2, 3), (Tree((1, 3), (Tree((1,)), Tree((3,))), 1.0), Tree((0,)), Tree((2,))), 1.0)
    assert same(levels_of(mixed, 4), (1, 0, 2, 0))


@st.composite
def trees(draw, classes=None):
    classes = classes or tuple(range(draw(st.integers(1, 9))))
    if len(classes) < 2 or draw(st.booleans()):
        return Tree(classes)
    place = {c: draw(st.integers(0, 2)) for c in classes}
    shares = [tuple(c for c in classes if place[c] == i) for i in range(3)]
    shares = [s for s in shares if s]
    if len(shares) < 2:
        return Tree(classes)
    return Tree(classes, tuple(draw(trees(s)) for s in shares))


@given(trees())
def test_levels_are_finer_and_finer_groups_of_the_tree(tree):
    levels = levels_of(tree, len(tree.classes))
    nodes = {node.classes for node in tree.nodes()}
    before = torch.zeros(len(tree.classes), dtype=torch.int64)
    for level in levels:
        groups = [tuple((level == g).nonzero()[:, 0].tolist()) for g in level.unique()]
        assert set(groups) <= nodes
        assert max(map(len, groups)) > 1
        assert all(len(before[list(g)].unique()) == 1 for g in groups)
        assert len(groups) > len(before.unique())
        before = level
    inner = [n for n in tree.nodes()[1:] if len(n.classes) > 1]
    seen = {tuple((t == g).nonzero()[:, 0].tolist()) for t in levels for g in t.unique()}
    assert {n.classes for n in inner} <= seen


BASE = Taxonomy("levels", 0.5, SIMILARITY, UNEVEN, "head.2")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": "magic"}, "choose one of labels, levels, align"),
        ({"weight": -0.1}, "not negative"),
        ({"weight": math.nan}, "not negative"),
        ({"weight": math.inf}, "not negative"),
        ({"temperature": 0.0}, "above 0"),
        ({"temperature": math.nan}, "above 0"),
        ({"tree": Tree((0, 1, 2, 3, 4))}, "no groups of several classes"),
    ],
)
def test_what_makes_no_sense_is_refused(change, said):
    with pytest.raises(UsageError, match=said):
        replace(BASE, **change)


def test_a_tree_without_groups_serves_the_other_ways():
    for method in ("labels", "align"):
        replace(BASE, method=method, tree=Tree((0, 1, 2, 3, 4)))


def test_every_setting_is_in_the_name():
    changed = SIMILARITY.clone()
    changed[3, 1] += 1e-6
    moved = replace(UNEVEN, distance=2.5)
    others = [
        replace(BASE, **change)
        for change in (
            {"method": "labels"}, {"weight": 0.5000001}, {"similarity": changed}, {"tree": moved},
            {"tree": replace(UNEVEN, synset="entity.n.01")}, {"head": "head.1"}, {"temperature": 0.2},
        )
    ]  # fmt: skip
    assert len({t.name for t in [BASE, *others]}) == 8
    assert replace(BASE, similarity=SIMILARITY.clone()).name == BASE.name


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_is_that_of_its_way_weighted(method):
    logits, labels, features = random_case(3)
    taxonomy = replace(BASE, method=method, weight=0.25, temperature=0.3)
    value = {
        "labels": label_loss(logits, labels, SIMILARITY, 0.3),
        "levels": level_loss(logits, labels, levels_of(UNEVEN, 5)),
        "align": align_loss(features, labels, SIMILARITY),
    }[method]
    assert float(taxonomy.loss(logits, labels, features)) == pytest.approx(0.25 * float(value), rel=1e-12)
    assert float(taxonomy.loss(logits, labels, features[:, :, None, None])) == pytest.approx(0.25 * float(value))


def blobs(count, seed):
    """Five classes of 12 x 12, each a pattern in noise."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 5
    bases = torch.rand(5, 1, 12, 12, generator=torch.Generator().manual_seed(99))
    pixels = 0.6 * bases[labels] + 0.4 * torch.rand(count, 1, 12, 12, generator=g)
    return Images((pixels * 255).byte(), labels, tuple("abcde"))


TRAIN, VALIDATION = blobs(150, 0), blobs(50, 1)
QUICK = Settings("cross-entropy", epochs=2, batch=50, lr=0.02, pad=0)


def fresh():
    torch.manual_seed(0)
    return ResNet(5, 1, (8, 8, 8))  # oneDNN issue 6035: fewer inputs of a strided 1x1 crash in channels_last


def tuned(taxonomy, model=None, steps=QUICK, **more):
    model = model or fresh()
    curve = finetune(model, TRAIN, VALIDATION, steps, taxonomy=taxonomy, **more)
    return model, curve


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.fixture(scope="module")
def trained():
    torch.set_num_threads(1)
    return tuned(None, steps=Settings("cross-entropy", epochs=6, batch=25, lr=0.05, pad=0))[0]


def copy_of(model):
    made = fresh()
    made.load_state_dict(model.state_dict())
    return made


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_of_0_changes_nothing(method):
    plain, curve = tuned(None)
    same, again = tuned(replace(BASE, method=method, weight=0.0))
    assert equal(plain, same)
    assert [(e.loss, e.accuracy) for e in curve] == [(e.loss, e.accuracy) for e in again]
    other, _ = tuned(replace(BASE, method=method))
    assert not equal(plain, other)


FEW = Settings("cross-entropy", epochs=4, batch=50, lr=0.05, pad=0)


def test_align_brings_the_means_of_classes_to_their_similarities(trained):
    def apart(model):
        with torch.no_grad(), read_by(model.eval(), "head.2") as read:
            model(VALIDATION.pixels.float() / 255)
        return float(align_loss(read[0].flatten(1), VALIDATION.labels, SIMILARITY))

    plain, _ = tuned(None, copy_of(trained), FEW)
    aligned, curve = tuned(replace(BASE, method="align", weight=10.0), copy_of(trained), FEW)
    assert apart(aligned) < 0.5 * min(apart(plain), apart(trained))
    assert curve[-1].accuracy > 0.9


@pytest.mark.parametrize("method", ["labels", "levels"])
def test_relatives_get_the_probability(trained, method):
    """Of what the right class has not: more goes to its group."""

    def to_relatives(model):
        rates, y = predict(model, VALIDATION).softmax(1), VALIDATION.labels
        group = levels_of(UNEVEN, 5)[0]
        near = (group[y][:, None] == group[None]) & ~F.one_hot(y, 5).bool()
        wrong = 1 - rates.gather(1, y[:, None])[:, 0]
        return float(((rates * near).sum(1) / wrong).mean())

    plain, _ = tuned(None, copy_of(trained), FEW)
    similarity = torch.where(levels_of(UNEVEN, 5)[0][:, None] == levels_of(UNEVEN, 5)[0][None], 0.9, 0.1)
    taxonomy = replace(BASE, method=method, weight=2.0, similarity=similarity.fill_diagonal_(1))
    related, _ = tuned(taxonomy, copy_of(trained), FEW)
    assert to_relatives(related) > to_relatives(plain) + 0.1


class Stopped(Exception):
    pass


def test_an_interruption_changes_nothing_and_another_taxonomy_is_refused(tmp_path):
    taxonomy = replace(BASE, method="align")
    whole, curve = tuned(taxonomy)

    def stop(done, total):
        if done == 5:
            raise Stopped

    with pytest.raises(Stopped):
        tuned(taxonomy, folder=tmp_path, progress=stop)
    for other in (None, replace(taxonomy, weight=0.6), replace(taxonomy, similarity=torch.eye(5))):
        with pytest.raises(UsageError, match="other settings, data or models"):
            tuned(other, folder=tmp_path)
    again, resumed = tuned(taxonomy, folder=tmp_path)
    assert equal(whole, again)
    assert [(e.loss, e.accuracy) for e in resumed] == [(e.loss, e.accuracy) for e in curve]


def test_hooks_are_gone_afterwards():
    model, _ = tuned(BASE)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@settings(max_examples=50)
@given(st.integers(0, 1000), st.floats(0.01, 10))
def test_label_loss_is_never_below_the_entropy_of_its_targets(seed, temperature):
    logits, labels, _ = random_case(seed, 4)
    targets = (SIMILARITY.double() / temperature).softmax(1)
    entropy = -(targets * targets.clamp(min=1e-300).log()).sum(1)[labels].mean()
    assert label_loss(logits, labels, SIMILARITY.double(), temperature) >= entropy - 1e-12
    best = targets.clamp(min=1e-300).log()[labels]
    assert float(label_loss(best, labels, SIMILARITY.double(), temperature)) == pytest.approx(float(entropy), abs=1e-9)
