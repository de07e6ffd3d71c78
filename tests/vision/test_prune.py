import copy

import pytest
import torch
from torch import nn

pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")

from thresher.errors import ModelError, UsageError
from thresher.vision.layers import count_parameters, unwrap_logits
from thresher.vision.nets import make_net
from thresher.vision.prune import channel_groups, find_head, gated, masked, remove_channels, restrict_head


class Concatenated(nn.Module):
    """Two convolutions side by side, then one, then every pixel into a linear layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(3, 24, 3, padding=1)
        self.c, self.d = nn.Conv2d(40, 32, 3), nn.Linear(32 * 36, 7)

    def forward(self, x):
        both = torch.cat([self.a(x).relu(), self.b(x).relu()], 1)
        return self.d(self.c(both).relu().flatten(1))


def transformers_net(kind, **settings):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(num_labels=7, **settings)
    return getattr(transformers, f"{kind}ForImageClassification")(config)


NETS = {
    "vgg": lambda: (make_net("vgg", 7, 3), 28),
    "resnet": lambda: (make_net("resnet", 7, 3), 28),
    "concatenated": lambda: (Concatenated(), 8),
    "ResNet": lambda: (transformers_net("ResNet", embedding_size=16, hidden_sizes=[16, 32], depths=[2, 1]), 64),
    "MobileNetV2": lambda: (transformers_net("MobileNetV2", depth_multiplier=0.35), 64),
    "EfficientNet": lambda: (
        transformers_net(
            "EfficientNet", width_coefficient=0.5, depth_coefficient=0.3, hidden_dim=640, num_block_repeats=[1] * 7
        ),
        64,
    ),
}


def net_and_example(name):
    net, size = NETS[name]()
    g = torch.Generator().manual_seed(0)
    for module in net.modules():  # batch norms that do something
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(generator=g)
            module.running_var.uniform_(0.5, 2, generator=g)
            module.bias.data.normal_(generator=g)
    return net.eval(), torch.rand(1, 3, size, size, generator=g)


def random_half(groups):
    g = torch.Generator().manual_seed(1)
    return {q.name: torch.randperm(q.channels, generator=g)[: -(-q.channels // 2)].sort().values for q in groups}


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_what_is_removed_is_what_was_masked(name):
    net, example = net_and_example(name)
    groups, left = channel_groups(net, example, find_head(net, example, 7))
    assert not left
    kept = random_half(groups)
    images = torch.rand(3, *example.shape[1:])
    whole = unwrap_logits(net(images))
    with masked(net, groups, kept):
        expected = unwrap_logits(net(images))
    assert torch.equal(unwrap_logits(net(images)), whole)
    smaller = copy.deepcopy(net)
    remove_channels(smaller, example, groups, kept)
    assert (unwrap_logits(smaller(images)) - expected).abs().max() < 1e-5 * (1 + expected.abs().max())
    assert (expected - whole).abs().max() > 1e-3 * whole.abs().max()
    assert count_parameters(smaller) < 0.5 * count_parameters(net)
    assert all(p.requires_grad for p in smaller.parameters())


def test_groups_cover_all_convolutions_once():
    net, example = net_and_example("resnet")
    groups, _ = channel_groups(net, example, "head.2")
    makers = [m for g in groups for m in g.makers]
    assert sorted(makers) == sorted(n for n, m in net.named_modules() if isinstance(m, nn.Conv2d))
    assert [g.name for g in groups][:2] == ["stem.0.0", "blocks.0.first.0"]
    assert {n for n, _ in groups[0].readers} == {"blocks.0.first.0", "blocks.1.first.0", "blocks.1.shortcut.0"}


@torch.no_grad()
def test_gates_differ_between_images():
    net, example = net_and_example("vgg")
    groups, _ = channel_groups(net, example, "head")
    images = torch.rand(2, *example.shape[1:])
    gates = torch.ones(2, groups[1].channels)
    gates[1, :20] = 0
    with gated(net, groups[1], gates):
        both = net(images)
    with masked(net, groups, {groups[1].name: torch.arange(20, groups[1].channels)}):
        second = net(images[1:])
    assert torch.allclose(both[0], net(images[:1])[0], atol=1e-5)
    assert torch.allclose(both[1], second[0], atol=1e-5)


@pytest.mark.parametrize("name", ["vgg", "EfficientNet"])
@torch.no_grad()
def test_restricted_head(name):
    net, example = net_and_example(name)
    logits = unwrap_logits(net(example))
    restrict_head(net, find_head(net, example, 7), torch.tensor([5, 0, 2]))
    assert torch.allclose(unwrap_logits(net(example)), logits[:, [5, 0, 2]], atol=1e-6)


def test_layers_that_cannot_be_cut_say_why():
    net = transformers_net("ConvNext", hidden_sizes=[8, 16, 16, 16], depths=[1] * 4)
    groups, left = channel_groups(net, torch.rand(1, 3, 32, 32), "classifier")
    assert any("normalises over channels" in reason for reason in left.values())
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(16, 2)
    )
    groups, left = channel_groups(net, torch.rand(1, 3, 8, 8), "4")
    assert [g.name for g in groups] == ["2"]
    assert "2 groups" in left["0"]


def test_wrong_requests():
    net, example = net_and_example("vgg")
    groups, _ = channel_groups(net, example, "head")
    with pytest.raises(UsageError, match="no channels nowhere"):
        remove_channels(net, example, groups, {"nowhere": torch.tensor([0])})
    for kept in ([], [128]):
        with pytest.raises(UsageError, match="at least one must stay"):
            remove_channels(net, example, groups, {groups[-1].name: torch.tensor(kept, dtype=torch.int64)})
    with pytest.raises(ModelError, match="each of 9 classes"):
        find_head(net, example, 9)


def test_a_head_that_is_not_the_end():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(12, 3)

        def forward(self, x):
            return 2 * self.head(x.flatten(1))

    with pytest.raises(ModelError, match="changes what its last layer"):
        find_head(Scaled(), torch.rand(1, 3, 2, 2), 3)
    with pytest.raises(ModelError, match="none"):
        find_head(nn.Sequential(nn.Flatten()), torch.rand(1, 3, 1, 1), 3)


def test_a_graph_that_cannot_be_traced():
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 3)

        def forward(self, x):
            return torch.from_numpy(self.head(self.conv(x).mean((2, 3))).detach().numpy())

    with pytest.raises(ModelError, match="cannot be traced"):
        channel_groups(Detached(), torch.rand(1, 3, 8, 8), "head")
