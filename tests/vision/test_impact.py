import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")

from thresher.errors import StorageError, UsageError
from thresher.vision import impact as module
from thresher.vision.data import Images
from thresher.vision.impact import METHODS, Impact, measure_impact, needed_channels
from thresher.vision.nets import make_net
from thresher.vision.prune import ChannelGroup, channel_groups, gated


def random_images(count, classes, channels=1, size=12):
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, channels, size, size), generator=g, dtype=torch.uint8)
    return Images(pixels, torch.arange(count) % classes, tuple(f"c{i}" for i in range(classes)))


def groups_of(net, size=12, head="head"):
    return channel_groups(net, torch.rand(1, 1, size, size), head)[0]


@pytest.fixture
def net():
    made = make_net("vgg", 3, 1, seed=1).eval()
    with torch.no_grad():
        made.features[3][0].weight[:, 5] = 0  # nothing reads channel 5 of the first group
    return made


@pytest.mark.parametrize("method", ["ablation", "taylor"])
def test_a_filter_that_nothing_reads_has_no_impact(net, method):
    groups = groups_of(net)
    scores = measure_impact(net, groups[:1], random_images(30, 3), method).scores[groups[0].name]
    assert scores.shape == (3, 32)
    assert (scores[:, 5] == 0).all()
    assert (scores != 0).sum() > 60


@pytest.mark.parametrize("method", METHODS)
def test_scores_against_their_definition(net, method):
    """One image and channel at a time; taylor by differences of the margin around a gate of 1."""
    groups, images = groups_of(net), random_images(9, 3)
    scores = measure_impact(net, groups, images, method, batch=4).scores
    group, exact = groups[1], copy.deepcopy(net).double()
    for channel in (0, 17, 63):
        for label in range(3):
            found = []
            for i in (images.labels == label).nonzero()[:, 0]:
                x = images.pixels[i : i + 1].double() / 255

                def logits(at, x=x, channel=channel):
                    gates = torch.ones(group.channels).double()
                    gates[channel] = at
                    with torch.no_grad(), gated(exact, group, gates):
                        return exact(x)

                def margin(at, label=label, logits=logits):
                    return logits(at)[0, label] - logits(at).mean()

                if method == "ablation":
                    found.append(margin(1.0) - margin(0.0))
                elif method == "taylor":
                    found.append((margin(1 + 1e-6) - margin(1 - 1e-6)) / 2e-6)
                else:
                    with torch.no_grad():
                        found.append(exact.features[:6](x)[0, channel].clamp(min=0).mean())
            expected = torch.stack(found).mean()
            assert scores[group.name][label, channel] == pytest.approx(float(expected), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_filter_that_feeds_one_class(method):
    """Filter i answers to brightness and feeds class i alone."""
    net = nn.Sequential(
        nn.Conv2d(1, 3, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3, bias=False)
    )
    levels = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    with torch.no_grad():
        net[0].weight.fill_(0)
        net[0].bias.fill_(1)
        net[4].weight.copy_(3 * levels)
    scores = measure_impact(net, groups_of(net, head="4"), random_images(12, 3), method).scores["0"]
    if method == "activation":
        assert torch.allclose(scores, torch.ones(3, 3))  # it sees no class
    else:
        assert (scores.diag() > 0).all()
        others = scores[~torch.eye(3, dtype=torch.bool)]
        assert torch.allclose(others, -scores.diag().mean() / 2)  # without it their margins gain
        expected = torch.eye(3).double() / 4 + 0.25
        assert torch.allclose(Impact(method, {"0": scores}).vectors("0"), expected)


def test_goes_on_where_it_was_stopped(net, tmp_path, monkeypatch):
    groups, images, path = groups_of(net), random_images(12, 3), tmp_path / "impact.safetensors"
    whole = measure_impact(net, groups, images, "ablation")
    calls = []

    def stop(done, total):
        calls.append(done)
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_impact(net, groups, images, "ablation", path, progress=stop)
    computed = []
    original = module._ablation
    monkeypatch.setattr(
        module,
        "_ablation",
        lambda model, bundle, *rest: computed.append(bundle[0].name) or original(model, bundle, *rest),
    )
    again = measure_impact(net, groups, images, "ablation", path)
    assert computed == [g.name for g in groups[2:]]
    assert all(torch.equal(again.scores[g.name], whole.scores[g.name]) for g in groups)
    other = random_images(15, 3)
    measure_impact(net, groups, other, "ablation", path)
    assert computed == [g.name for g in groups[2:]] + [g.name for g in groups]  # of other images nothing is taken


def test_the_model_stays_as_it_is(net):
    net.train()
    next(net.parameters()).requires_grad_(False)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    measure_impact(net, groups_of(net), random_images(9, 3))
    assert net.training
    assert not next(net.parameters()).requires_grad
    assert net.head.weight.requires_grad
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def test_bad_input(net, tmp_path):
    groups, images = groups_of(net), random_images(9, 3)
    with pytest.raises(UsageError, match="unknown method"):
        measure_impact(net, groups, images, "magic")
    with pytest.raises(UsageError, match="no images of c2"):
        measure_impact(net, groups, images.subset(torch.tensor([0, 1, 3])))
    path = tmp_path / "impact.safetensors"
    for content in (b"", b"x" * 100):
        path.write_bytes(content)
        with pytest.raises(StorageError, match="remove it"):
            measure_impact(net, groups, images, path=path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(StorageError, match="remove it"):
        measure_impact(net, groups, images, path=path)


SCORES = st.lists(st.lists(st.floats(-1, 1, width=32), min_size=12, max_size=12), min_size=3, max_size=3)


@given(SCORES, st.floats(0, 1), st.sampled_from([1, 4, 8]), st.sets(st.integers(0, 2), min_size=1))
def test_needed_channels_hold_their_share(rows, share, multiple, classes):
    group = ChannelGroup("g", "g", 12, ("g",), ())
    impact = Impact("taylor", {"g": torch.tensor(rows)})
    (kept,) = needed_channels(impact, [group], sorted(classes), share, multiple).values()
    assert 1 <= len(kept) <= 12
    assert len(kept) % multiple == 0 or len(kept) == 12
    assert (kept[1:] > kept[:-1]).all()
    vectors = impact.vectors("g")
    assert torch.allclose(vectors.sum(1), torch.ones(3).double())
    scores = vectors[sorted(classes)].mean(0)
    assert scores[kept].sum() >= share * scores.sum() * (1 - 1e-9)
    gone = [i for i in range(12) if i not in kept]
    if gone:
        assert scores[gone].max() <= scores[kept].min()
    if multiple == 1 and len(kept) > 1:
        assert scores[kept].sum() - scores[kept].min() < share * scores.sum() * (1 + 1e-9)
