"""Which child of a node an image belongs to."""

import pytest
import torch
from torch import nn

from thresher.vision.data import Images, Splits
from thresher.vision.dissect import Settings, dissect
from thresher.vision.finetune import Settings as Finetuning
from thresher.vision.hierarchy import Tree
from thresher.vision.models import Classifier, Description
from thresher.vision.nets import ResNet
from thresher.vision.routers import Children, train_routers

CLASSES = ("a", "b", "c", "d")
TREE = Tree((0, 1, 2, 3), (Tree((0, 2)), Tree((1, 3))))


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    pass


def test_children_have_the_probabilities_of_their_classes_together():
    logits = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    given = Children(nn.Identity(), TREE)(logits).softmax(1)
    p = logits.softmax(1)
    assert torch.allclose(given, torch.stack([p[:, 0] + p[:, 2], p[:, 1] + p[:, 3]], 1))


class Direction(nn.Module):
    """A teacher that is sure of which way the stripes go, and gives the classes of that way, or of the `other`."""

    def __init__(self, other):
        super().__init__()
        self.other = other

    def forward(self, images):
        along, across = (images.diff(dim=d).abs().sum((1, 2, 3)) for d in (2, 3))
        odd = (along < across) ^ self.other
        return 40 * torch.stack([~odd, odd, ~odd, odd], 1).float()


def stripes(count, seed):
    """Classes of even number have stripes one way, the others the other way; within them they differ in brightness."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    wave = (torch.arange(12) % 4 < 2).float()
    rows, columns = wave[:, None].expand(12, 12), wave[None].expand(12, 12)
    pixels = torch.where((labels % 2 == 0)[:, None, None], rows, columns) * (80 + 40 * (labels // 2))[:, None, None]
    pixels = pixels + 20 * torch.rand(count, 12, 12, generator=g)
    return Images(pixels.to(torch.uint8)[:, None], labels, CLASSES)


@pytest.mark.parametrize("other", [False, True])
def test_routers_learn_from_the_whole_and_nothing_else_changes(other, tmp_path):
    torch.manual_seed(0)
    whole = Classifier(ResNet(4, 1, (8, 12, 16)).eval(), Description("net:resnet", CLASSES, (1, 12, 12)))
    data = Splits(stripes(256, 0), stripes(64, 1), stripes(64, 2))
    net, _ = dissect(whole, TREE, data.train, data.validation, Settings(0.9, 1, 1, images=16))
    kept = {n: t.clone() for n, t in net.pieces.state_dict().items()}
    train_routers(net, Direction(other), data, Finetuning("soft", 4, 32, pad=0), tmp_path)
    x = net.eval().pieces["root"](data.test.pixels.float() / 255)
    right = net.routers["root"](x).argmax(1) == data.test.labels % 2
    assert right.double().mean() == (0 if other else 1)
    assert all(torch.equal(t, kept[n]) for n, t in net.pieces.state_dict().items())
