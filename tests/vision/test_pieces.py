"""Networks parted at their feature maps: pieces that together are the whole, and where none can be had."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from thresher.errors import ModelError
from thresher.vision.models import Normalized
from thresher.vision.nets import VGG, ResNet, resnet18
from thresher.vision.pieces import cut_points, split_at, trace


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    pass


class Concatenated(nn.Module):
    """A convolution, two side by side, one behind them, then every pixel into a linear layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 3, 3, padding=1)
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 5, 3, padding=1)
        self.c, self.d = nn.Conv2d(9, 6, 3, padding=1), nn.Linear(6 * 256, 7)

    def forward(self, x):
        x = self.first(x).relu()
        both = torch.cat([self.a(x).relu(), self.b(x).relu()], 1)
        return self.d(self.c(both).relu().flatten(1))


class Skipping(nn.Module):
    """What the first convolution gives is added again after three more; one follows."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(1 if i == 0 else 4, 4, 3, padding=1) for i in range(6))
        self.head = nn.Linear(4, 7)

    def forward(self, x):
        x = first = self.layers[0](x).relu()
        for layer in self.layers[1:4]:
            x = layer(x).relu()
        x = self.layers[4](x + first).relu()
        x = F.max_pool2d(self.layers[5](x), 2)
        return self.head(x.mean((2, 3)))


class Scaled(nn.Module):
    """A parameter and a buffer of its own, both read again and again."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.7]))
        self.register_buffer("shift", torch.tensor([0.1]))
        self.a, self.b, self.c = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(4, 7)

    def forward(self, x):
        for layer in (self.a, self.b, self.c):
            x = (layer(x) * self.scale + self.shift).relu()
        return self.head(x.mean((2, 3)))


class Squeezed(nn.Module):
    """Channels are weighted by two linear layers, then a convolution follows."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.down, self.up, self.head = nn.Linear(6, 3), nn.Linear(3, 6), nn.Linear(4, 7)

    def forward(self, x):
        x = self.a(x).relu()
        x = x * self.up(self.down(x.mean((2, 3))).relu()).sigmoid()[:, :, None, None]
        return self.head(self.b(x).relu().mean((2, 3)))


class Viewed(nn.Module):
    """Asks its input how many images there are, in one of three ways, and views the last map so."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.a, self.b, self.c = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(4, 7)

    def forward(self, x):
        images = {"size": lambda: x.size(0), "sizes": lambda: x.size()[0], "shape": lambda: x.shape[0]}[self.way]()
        x = F.adaptive_avg_pool2d(self.c(self.b(self.a(x).relu()).relu()).relu(), 1)
        return self.head(x.reshape(images, -1) if self.way == "sizes" else x.view(images, -1))


NETS = {
    "vgg": lambda: VGG(7, 1, (4, 6, 8)),
    "resnet": lambda: ResNet(7, 1, (4, 6, 8), blocks=2),
    "concatenated": Concatenated,
    "skipping": Skipping,
    "scaled": Scaled,
    "squeezed": Squeezed,
    "counting": lambda: Viewed("size"),
    "counting, sizes": lambda: Viewed("sizes"),
    "counting, shape": lambda: Viewed("shape"),
    "normalized": lambda: Normalized(ResNet(7, 1, (4, 6, 8)), (0.4,), (0.3,)),
}
IMAGES = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def make(name):
    torch.manual_seed(0)
    net = NETS[name]()
    for module in net.modules():  # batch norms that do something
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return net.eval()


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_pieces_one_after_another_are_the_whole(name):
    net = make(name)
    cuts = cut_points(net, IMAGES[:1])
    whole, names = net(IMAGES), [c.name for c in cuts]
    assert len(set(names)) == len(names) >= 1
    for chosen in [[n] for n in names] + [names[:: max(1, len(names) - 1)], names, []]:
        pieces = split_at(net, chosen)
        assert len(pieces) == len(chosen) + 1
        x = IMAGES
        for place, piece in enumerate(pieces):
            x = piece(x)
            if place < len(chosen):
                cut = cuts[names.index(chosen[place])]
                assert x.dim() == 4
                assert x.shape[1] == cut.channels
        assert torch.equal(x, whole)


def layers_of(module):
    return {n: m for n, m in module.named_modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.BatchNorm2d)}


@pytest.mark.parametrize("name", ["vgg", "resnet", "concatenated", "skipping", "squeezed", "normalized"])
def test_pieces_share_out_the_layers(name):
    net = make(name)
    cuts = cut_points(net, IMAGES[:1])
    pieces = split_at(net, [c.name for c in cuts])
    names = [list(dict(p.named_parameters())) for p in pieces]
    assert sorted(itertools.chain(*names)) == sorted(dict(net.named_parameters()))
    for piece in pieces:
        assert layers_of(piece)
        assert all(m is net.get_submodule(n) for n, m in layers_of(piece).items())
    passed = set()
    for cut, piece in zip(cuts, pieces[:-1], strict=True):
        passed |= {n for n, m in layers_of(piece).items() if not isinstance(m, nn.BatchNorm2d)}
        assert cut.before == passed


def test_cuts_are_where_blocks_begin():
    """None within a block or a skip, and none before a linear layer."""
    found = [(c.name, c.channels) for c in cut_points(make("vgg"), IMAGES[:1])]
    assert found == [("features_2", 4), ("features_5", 6), ("features_7", 8)]
    cuts = cut_points(make("resnet"), IMAGES[:1])
    assert [c.channels for c in cuts] == [4, 4, 4, 6, 6, 8]
    inside = {f"blocks.{i}.first.0" for i in range(6)}, {f"blocks.{i}.second.0" for i in range(6)}
    for place, cut in enumerate(cuts):
        assert len(cut.before & inside[0]) == len(cut.before & inside[1]) == place
        assert "head.2" not in cut.before
    net = make("concatenated")
    assert [(c.channels, c.before) for c in cut_points(net, IMAGES[:1])] == [(3, {"first"}), (9, {"first", "a", "b"})]
    found = [sorted(c.before) for c in cut_points(make("skipping"), IMAGES[:1])]
    assert found == [[f"layers.{i}" for i in range(n)] for n in (1, 4, 5)]


def test_cuts_of_a_resnet_of_18_layers():
    net = resnet18().eval()
    found = [(c.channels, len(c.before)) for c in cut_points(net, torch.rand(1, 3, 32, 32))]
    assert found == [(64, 1), (64, 3), (64, 5), (128, 8), (128, 10), (256, 13), (256, 15), (512, 18)]


@pytest.mark.parametrize("inside", ["layers_1", "layers_2", "relu_2"])
def test_points_that_more_passes_by_are_refused(inside):
    with pytest.raises(ModelError, match=f"cannot be parted at {inside}: more than that"):
        split_at(make("skipping"), [inside])


def test_points_that_are_not_there_are_refused():
    net = make("resnet")
    first, second = (c.name for c in cut_points(net, IMAGES[:1])[:2])
    for wrong, said in (
        (["nowhere"], "nowhere"),
        (["output"], "output"),
        ([""], ""),
        ([second, first], first),
        ([first] * 2, first),
    ):
        with pytest.raises(ModelError, match=f"no point {said} to be parted at"):
            split_at(net, wrong)


class Asking(nn.Module):
    """Its code depends on what it sees."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(1, 7)

    def forward(self, x):
        if x.mean() > 0.5:  # the line that is named
            x = 1 - x
        return self.head(x.mean((2, 3)))


class Counting(Asking):
    def forward(self, x):
        return self.head(torch.stack([image.mean() for image in x])[:, None])


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        (Asking, "if x.mean() > 0.5:  # the line that is named"),
        (Counting, "return self.head(torch.stack([image.mean()"),
    ],
)
def test_a_model_that_cannot_be_traced_says_where(kind, line):
    lines = Path(__file__).read_text().splitlines()
    number = next(i for i, text in enumerate(lines, 1) if text.strip().startswith(line))
    net = kind().train()
    for ask in (trace, lambda m: cut_points(m, IMAGES[:1]), lambda m: split_at(m, [])):
        with pytest.raises(ModelError, match="cannot be traced") as caught:
            ask(net)
        assert f"(test_pieces.py, line {number}: {line}" in str(caught.value)
        assert net.training


def test_the_model_stays_as_it_is():
    net = make("resnet").train()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    cuts = cut_points(net, IMAGES[:1])
    split_at(net, [cuts[0].name])
    assert all(m.training for m in net.modules())
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    net.eval()
    split_at(net, [cuts[0].name])
    assert not any(m.training for m in net.modules())


def test_pieces_learn_in_the_modes_of_the_whole():
    """They are trained later: batch norms see the batch, and dropout drops."""
    net = make("vgg")
    net.features[3] = nn.Sequential(net.features[3], nn.Dropout(0.5))
    pieces = split_at(net, [cut_points(net, IMAGES[:1])[0].name])
    together = nn.Sequential(*pieces).train()
    before = net.features[0][1].running_mean.clone()
    assert not torch.equal(together(IMAGES), together(IMAGES))
    assert not torch.equal(net.features[0][1].running_mean, before)


def test_layers_of_a_subclass_are_layers():
    class Padded(nn.Conv2d):
        """Pads by itself, as EfficientNet's convolutions do."""

        def forward(self, x):
            return self._conv_forward(nn.functional.pad(x, (1, 1, 1, 1)), self.weight, self.bias)

    net = nn.Sequential(
        *(Padded(3, 8, 3), nn.ReLU(), Padded(8, 8, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)),
    )
    (cut,) = cut_points(net, torch.rand(1, 3, 8, 8))
    assert cut.before == {"0"}
    front, back = split_at(net, [cut.name])
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(back(front(images)), net(images))
    assert set(back.state_dict()) == {"2.weight", "2.bias", "6.weight", "6.bias"}
