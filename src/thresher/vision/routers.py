"""Routers of a network along a tree: which child of a node an image belongs to, learned from the whole network."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from thresher.vision import finetune as tuning
from thresher.vision.data import Images, Splits, select
from thresher.vision.dissected import Dissected, keyed
from thresher.vision.hierarchy import Tree
from thresher.vision.layers import unwrap_logits
from thresher.vision.pipeline import Progress, silent

_LR = 0.05  # they start from nothing


class _Split(nn.Module):
    """A router behind the pieces it reads, which stay as they are."""

    def __init__(self, net: Dissected, key: str) -> None:
        super().__init__()
        self.before = nn.Sequential(*(net.pieces[k] for k in net.way(key)))
        self.router = net.routers[key]

    def train(self, mode: bool = True) -> "_Split":
        super().train(mode)
        self.before.eval()
        return self

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            features = self.before(images)
        out: torch.Tensor = self.router(features)
        return out


class Children(nn.Module):
    """A model of all classes, asked which of a node's children an image belongs to: the probabilities of each child's
    classes, added up."""

    def __init__(self, whole: nn.Module, node: Tree) -> None:
        super().__init__()
        self.whole, self.classes = whole, [list(child.classes) for child in node.children]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = unwrap_logits(self.whole(images))
        return torch.stack([logits[:, c].logsumexp(1) for c in self.classes], 1)


def train_routers(
    net: Dissected, whole: nn.Module, data: Splits, tune: tuning.Settings, folder: Path, progress: Progress = silent
) -> None:
    """Each on the images of its node's classes, to tell the children apart as the whole network does; nothing else of
    the network changes. Raises UsageError, StorageError."""
    settings = replace(tune, objective="soft", lr=_LR)
    for key, node in keyed(net.tree):
        if node.children:
            tuning.finetune(
                _Split(net, key),
                _by_child(data.train, node),
                _by_child(data.validation, node),
                settings,
                Children(whole, node),
                folder=folder / key,
                progress=lambda done, total: progress("training routers", done, total),
            )


def _by_child(images: Images, node: Tree) -> Images:
    chosen = select(images, node.classes)
    child = {c: i for i, below in enumerate(node.children) for c in below.classes}
    labels = torch.tensor([child[c] for c in node.classes])[chosen.labels]
    return Images(chosen.pixels, labels, tuple(f"{i}" for i in range(len(node.children))))
