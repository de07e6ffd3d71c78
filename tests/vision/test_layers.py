"""Where convolutions are, what they cost, which are left alone; folding; and whole models decomposed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from thresher.errors import UsageError
from thresher.vision.decompose import all_bases, channel_moments, decompose
from thresher.vision.layers import count_macs, count_parameters, evaluating, fold_batch_norms, survey
from thresher.vision.nets import conv_bn, make_net
from thresher.vision.ranks import counted_costs, equal_ranks


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    pass


EXAMPLE = torch.rand(1, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def awake(model, seed=0):
    """With batch norms that have seen something, in eval mode."""
    g = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.copy_(torch.randn(m.num_features, generator=g) * 0.1)
            m.running_var.copy_(torch.rand(m.num_features, generator=g) + 0.5)
            m.weight.data.copy_(torch.rand(m.num_features, generator=g) + 0.5)
            m.bias.data.copy_(torch.randn(m.num_features, generator=g) * 0.1)
    return model.eval()


class Padded(nn.Conv2d):
    """Pads by itself, as some published nets do."""

    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Odd(nn.Module):
    """Everything that is left alone."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.deep = nn.Conv2d(8, 8, 3, groups=8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.padded = Padded(8, 8, 3)
        self.shared_a = nn.Conv2d(8, 8, 3, bias=False)
        self.shared_b = nn.Conv2d(8, 8, 3, bias=False)
        self.shared_b.weight = self.shared_a.weight
        self.asked = nn.Sequential(nn.Conv2d(8, 8, 3))
        self.good = nn.Conv2d(8, 6, 3, 2)
        self.never = nn.Conv2d(8, 8, 3)

    def forward(self, x):
        x = self.twice(self.twice(self.grouped(self.deep(self.stem(x)))))
        return self.good(self.asked(self.shared_b(self.shared_a(self.padded(x))))).mean((2, 3))


def test_which_are_left_alone_and_why():
    found = survey(Odd(), torch.rand(1, 3, 30, 30), leave=("asked",))
    assert {c.name: c.left for c in found.convolutions} == {
        "stem": "the first layer",
        "deep": "depth-wise",
        "grouped": "2 groups",
        "twice": "runs more than once",
        "padded": "Padded computes something of its own",
        "shared_a": "shares its weight",
        "shared_b": "shares its weight",
        "asked.0": "asked to be left",
        "good": "",
    }
    assert [c.name for c in survey(Odd(), torch.rand(1, 3, 30, 30), first=True).open] == ["stem", "asked.0", "good"]
    assert not survey(Odd(), torch.rand(1, 3, 30, 30), leave=("as*.0", "g??d")).open


def test_a_subclass_that_computes_the_same_is_plain():
    class Same(nn.Conv2d):
        def forward(self, x):
            return super().forward(x)

    net = nn.Sequential(nn.Conv2d(1, 8, 3), Same(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert [c.name for c in survey(net, EXAMPLE).open] == ["1"]


@pytest.mark.parametrize("name", ["vgg", "resnet"])
@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_counted_costs_are_those_of_the_layers(name, ratio):
    model = awake(make_net(name, 10, 1))
    found = survey(model, EXAMPLE, first=True)
    assert found.macs == sum(c.macs for c in found.convolutions) + 128 * 10
    ranks = {
        c.name: (max(1, int(c.outputs * ratio)), max(1, int(c.inputs * ratio)))
        if not c.pointwise
        else (int(min(c.outputs, c.inputs) * ratio),) * 2
        for c in found.open
    }
    result, reports = decompose(model, found, all_bases(model, found), ranks)
    assert count_macs(result, EXAMPLE) - count_macs(model, EXAMPLE) == sum(r.macs[1] - r.macs[0] for r in reports)
    change = sum(r.parameters[1] - r.parameters[0] for r in reports)
    assert count_parameters(result) - count_parameters(model) == change
    kinds = {r.kind for r in reports if r.name != found.convolutions[0].name}  # the first has one channel
    assert kinds == ({"tucker", "svd"} if name == "resnet" else {"tucker"})
    assert all(0 < r.error < 1 for r in reports if r.kind != "kept")


def test_full_rank_is_the_model_and_the_original_is_untouched():
    model = awake(make_net("resnet", 10, 1))
    before = copy.deepcopy(model.state_dict())
    found = survey(model, EXAMPLE)
    full = {c.name: (min(c.outputs, c.inputs),) * 2 if c.pointwise else (c.outputs, c.inputs) for c in found.open}
    result, reports = decompose(model, found, all_bases(model, found), full)
    x = torch.rand(4, 1, 28, 28)
    with torch.no_grad():
        assert (result(x) - model(x)).abs().max() < 1e-4 * model(x).abs().max()
    assert max(r.error for r in reports) < 1e-6
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == len(found.convolutions)


def test_moments_are_those_of_the_inputs():
    model = awake(make_net("vgg", 10, 1))
    found = survey(model, EXAMPLE)
    images = torch.rand(70, 1, 28, 28)
    moments = channel_moments(model, found, images)
    seen = []
    handle = model.features[6][0].register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    with torch.no_grad():
        model(images)
    handle.remove()
    flat = seen[0].transpose(0, 1).flatten(1).double()
    assert torch.allclose(moments["features.6.0"], flat @ flat.T / flat.shape[1], rtol=1e-4)


@pytest.mark.parametrize("name", ["vgg", "resnet", "resnet18"])
def test_folding_is_exact(name):
    channels = 3 if name == "resnet18" else 1
    model = awake(make_net(name, 10, channels))
    x = torch.rand(2, channels, 64, 64)
    with torch.no_grad():
        expected = model(x)
        norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        pairs = fold_batch_norms(model, x[:1])
        assert len(pairs) == norms
        assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        assert (model(x) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_fold_that_changes_the_result_is_taken_back():
    class Twice(nn.Module):
        """The output of the convolution goes to the norm and elsewhere."""

        def __init__(self):
            super().__init__()
            self.first, self.conv, self.norm = conv_bn(1, 4), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(self.first(x))
            return (self.norm(y) + y).mean((2, 3))

    model = awake(Twice())
    with torch.no_grad():
        expected = model(EXAMPLE)
        assert fold_batch_norms(model, EXAMPLE) == [("first.0", "first.1")]
        assert torch.allclose(model(EXAMPLE), expected, atol=1e-6)
    assert isinstance(model.norm, nn.BatchNorm2d)


def test_folding_a_decomposed_model():
    model = awake(make_net("resnet", 10, 1))
    found = survey(model, EXAMPLE)
    costs = counted_costs(found, "flops")
    ranks = equal_ranks(found, costs, 0.5)
    result, _ = decompose(model, found, all_bases(model, found), ranks)
    x = torch.rand(2, 1, 28, 28)
    with torch.no_grad():
        expected = result.eval()(x)
        pairs = fold_batch_norms(result, EXAMPLE)
        assert len(pairs) == 9
        assert (result(x) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_bad_models_and_ranks():
    with pytest.raises(UsageError, match="no Conv2d"):
        survey(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), EXAMPLE)
    broken = make_net("vgg", 10, 1)
    broken.head.weight.data[0, 0] = float("nan")
    with pytest.raises(UsageError, match=r"head\.weight .* not finite"):
        survey(broken, EXAMPLE)
    with pytest.raises(UsageError, match="no logits"):
        survey(nn.Conv2d(1, 4, 3), EXAMPLE)
    model = make_net("vgg", 10, 1)
    found = survey(model, EXAMPLE)
    bases = all_bases(model, found)
    with pytest.raises(UsageError, match="no such convolution"):
        decompose(model, found, bases, {"nothing": (1, 1)})
    with pytest.raises(UsageError, match=r"features\.0\.0, which is left alone: the first layer"):
        decompose(model, found, bases, {"features.0.0": (1, 1)})
    with pytest.raises(UsageError, match=r"features\.3\.0: ranks 65, 1 are not within the 64 and 32"):
        decompose(model, found, bases, {"features.3.0": (65, 1)})


TRANSFORMERS = {
    "ResNet": {"embedding_size": 16, "hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1]},
    "RegNet": {"embedding_size": 16, "hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1], "groups_width": 8},
    "MobileNetV1": {"depth_multiplier": 0.25, "image_size": 64},
    "MobileNetV2": {"depth_multiplier": 0.35, "image_size": 64},
    "ConvNext": {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1]},
    "EfficientNet": {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320, "image_size": 64},
}


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_families_of_transformers(family):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(num_labels=7, **TRANSFORMERS[family])
    model = awake(getattr(transformers, f"{family}ForImageClassification")(config))
    x = torch.rand(2, 3, 64, 64)
    found = survey(model, x[:1])
    assert len(found.open) >= 2
    bases = all_bases(model, found)
    full = {c.name: (min(c.outputs, c.inputs),) * 2 if c.pointwise else (c.outputs, c.inputs) for c in found.open}
    whole, _ = decompose(model, found, bases, full)
    quarter = {name: tuple(max(1, r // 4) for r in ranks) for name, ranks in full.items()}
    less, _ = decompose(model, found, bases, quarter)
    with torch.no_grad():
        expected = model(x).logits
        assert (whole(x).logits - expected).abs().max() < 1e-4 * expected.abs().max()
        given = less(x).logits
        pairs = fold_batch_norms(less, x[:1])
        assert (less(x).logits - given).abs().max() < 1e-4 * given.abs().max()
    assert count_macs(less, x[:1]) < found.macs
    assert bool(pairs) == any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_evaluating_gives_every_module_its_mode_back():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Sequential(nn.Dropout(), nn.BatchNorm2d(2)))
    model[2].eval()
    before = [m.training for m in model.modules()]
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == before == [True, True, True, False, False, False]
    with pytest.raises(RuntimeError), evaluating(model):
        model(torch.rand(1, 3, 9, 9))  # three channels
    assert [m.training for m in model.modules()] == before == [True, True, True, False, False, False]
