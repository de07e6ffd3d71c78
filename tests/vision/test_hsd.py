"""A hierarchy that was stopped goes on from what it had taken apart."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")

from thresher.errors import UsageError
from thresher.vision import hsd
from thresher.vision.data import Images, Splits
from thresher.vision.dissect import Settings
from thresher.vision.dissected import WEIGHTS
from thresher.vision.finetune import Settings as Tune
from thresher.vision.hierarchy import Tree
from thresher.vision.models import new_classifier
from thresher.vision.nets import NETS, ResNet

CLASSES = tuple("abcd")
SETTINGS = Settings(0.9, flops=1.0, parameters=1.0)
TREE = Tree((0, 1, 2, 3), (Tree((0,)), Tree((1, 2, 3))))  # a leaf of one class, before others


class Stopped(Exception):
    pass


class TakenApart(Exception):
    pass


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    pass


@pytest.fixture(scope="module")
def whole():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NETS, "thin-resnet", lambda classes, channels: ResNet(classes, channels, (8, 16, 32)))
        yield new_classifier("thin-resnet", CLASSES, (1, 16, 16))


def images(seed):
    g = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (64, 1, 16, 16), generator=g, dtype=torch.uint8)
    return Images(pixels, torch.arange(64) % 4, CLASSES)


DATA = Splits(images(0), images(1), images(2))


def run(whole, folder, stop_at):
    """Stopped after so many steps of the tree's training; how many were made."""
    steps = []

    def progress(what, done, total):
        if what == "training the tree":
            steps.append(done)
            if done == stop_at:
                raise Stopped

    tune = Tune("soft", epochs=3, batch=16, lr=0.01, pad=0)
    with pytest.raises(Stopped):
        hsd.make_hierarchy(whole, DATA, None, folder, SETTINGS, tune, tree=TREE, progress=progress)
    return len(steps)


def refuse(*_, **__):
    raise TakenApart


def test_what_was_taken_apart_is_not_taken_apart_again(whole, tmp_path, monkeypatch):
    """Another number of threads might keep other channels, and the training of these could not go on."""
    assert run(whole, tmp_path, 6) == 6  # of 4 an epoch
    monkeypatch.setattr(hsd, "dissect", refuse)
    assert run(whole, tmp_path, 12) == 12 - 4


@pytest.mark.parametrize("change", ["settings", "model", "data", "file"])
def test_what_others_were_taken_apart_for_is(whole, tmp_path, monkeypatch, change):
    run(whole, tmp_path, 1)
    monkeypatch.setattr(hsd, "dissect", refuse)
    data, settings = DATA, SETTINGS
    if change == "settings":
        settings = replace(SETTINGS, fall=0.8)
    elif change == "model":
        whole = new_classifier("thin-resnet", CLASSES, (1, 16, 16), seed=1)
    elif change == "data":
        data = Splits(images(3), images(1), images(2))
    else:
        kept = tmp_path / hsd.DISSECTED / WEIGHTS
        kept.write_bytes(kept.read_bytes()[:-1])
    with pytest.raises(TakenApart):
        hsd.make_hierarchy(whole, data, None, tmp_path, settings, Tune("soft"), tree=TREE)


def test_a_tree_has_no_layers_to_compare(whole, tmp_path):
    with pytest.raises(UsageError, match="the loss attention compares layers, and a tree has others"):
        hsd.make_hierarchy(whole, DATA, None, tmp_path, SETTINGS, Tune("attention"), tree=TREE)
