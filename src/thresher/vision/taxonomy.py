"""Losses by which a trained classifier learns how its classes are related in a taxonomy (after ICIP 2022,
reconstructed).

Each is added to an objective of losses.py, with a weight. Similarities are [classes, classes] in [0, 1], 1 on the
diagonal.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from thresher.errors import UsageError
from thresher.vision.hierarchy import Tree

METHODS = ("labels", "levels", "align")
WEIGHTS = {"labels": 0.2, "levels": 0.5, "align": 10.0}  # those of docs/results.md


def label_loss(
    logits: torch.Tensor, labels: torch.Tensor, similarity: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Cross-entropy with softmax(similarity to the right class / temperature): what is like it shares its probability.
    Beside cross-entropy with a weight of m / (1 - m) this is smoothing by m towards relatives."""
    targets = (similarity.to(logits) / temperature).softmax(1)[labels]
    return F.cross_entropy(logits, targets)


def level_loss(logits: torch.Tensor, labels: torch.Tensor, levels: Sequence[torch.Tensor]) -> torch.Tensor:
    """-log of the summed probability of all classes in the right one's group, mean over levels. levels: [classes] int64
    each, the group of every class."""
    logs = F.log_softmax(logits, 1)
    losses = []
    for groups in levels:
        same = groups[labels][:, None] == groups[None]
        losses.append(-torch.where(same, logs, -math.inf).logsumexp(1).mean())
    return torch.stack(losses).mean()


def align_loss(features: torch.Tensor, labels: torch.Tensor, similarity: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of similarities and cosines between the mean features [images, width] of the batch's
    classes; 0 of fewer than two classes."""
    present = torch.unique(labels)
    if len(present) < 2:
        return features.sum() * 0
    means = torch.stack([features[labels == c].mean(0) for c in present])
    unit = F.normalize(means, dim=1)
    apart = ~torch.eye(len(present), dtype=torch.bool, device=features.device)
    wanted = similarity.to(features)[present][:, present]
    return (unit @ unit.T - wanted)[apart].square().mean()


def levels_of(tree: Tree, count: int) -> list[torch.Tensor]:
    """The groups [classes] int64 of every depth below the root at which some have several classes; a leaf that ends
    higher up stays a group. None of a tree without such."""
    found = []
    nodes = list(tree.children)
    while any(len(n.classes) > 1 for n in nodes):
        groups = torch.empty(count, dtype=torch.int64)
        for i, node in enumerate(nodes):
            groups[list(node.classes)] = i
        found.append(groups)
        if not any(n.children for n in nodes):
            break
        nodes = [child for n in nodes for child in (n.children or (n,))]
    return found


@dataclass(frozen=True)
class Taxonomy:
    """What is added to the loss of a training step. method: labels, levels or align; head: the layer that gives the
    logits, whose inputs are aligned. Raises UsageError."""

    method: str
    weight: float
    similarity: torch.Tensor
    tree: Tree
    head: str
    temperature: float = 0.1

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"unknown way to follow a taxonomy {self.method}: choose one of {', '.join(METHODS)}")
        if not 0 <= self.weight < math.inf or not 0 < self.temperature < math.inf:
            raise UsageError("the weight of a taxonomy is not negative, and its temperature above 0")
        if self.method == "levels" and not levels_of(self.tree, len(self.similarity)):
            raise UsageError("the taxonomy has no groups of several classes below its root: nothing to learn from it")

    @property
    def name(self) -> str:
        """Tells two of them apart, for a run that goes on."""
        hashed = hashlib.sha256(repr(self.tree).encode() + self.similarity.double().numpy().tobytes()).hexdigest()[:16]
        return f"{self.method} {self.weight} {self.temperature} {self.head} {hashed}"

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Weighted; features: what the head read, [images, width] or [images, width, 1, 1]."""
        if self.method == "labels":
            value = label_loss(logits, labels, self.similarity, self.temperature)
        elif self.method == "levels":
            value = level_loss(logits, labels, levels_of(self.tree, logits.shape[1]))
        else:
            value = align_loss(features.flatten(1), labels, self.similarity)
        return self.weight * value
