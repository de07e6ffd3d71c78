"""Which classes a network holds to be alike, and how far that follows their meaning in WordNet."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from thresher.errors import UsageError
from thresher.vision.coherence import Permutation, adjusted_rand, cophenetic_correlation, permutation_test
from thresher.vision.data import Images
from thresher.vision.finetune import predict
from thresher.vision.hierarchy import Tree, cut, groups_of, semantic_tree
from thresher.vision.impact import Impact
from thresher.vision.wordnet import ancestors, depth, find_synsets, gloss, open_wordnet, read_synsets, similarity

KINDS = ("impact", "confusion", "weights")


def impact_distance(impact: Impact, groups: list[str]) -> np.ndarray:
    """1 - cosine of the classes' impact vectors, [C, C], joined over the last half of the groups of channels."""
    return _cosine_distance(impact.joined(groups[len(groups) // 2 :]))


def confusion_distance(model: nn.Module, images: Images) -> np.ndarray:
    """1 - how probable two classes find each other's images, [C, C], mean of both ways, in units of the most confused
    pair."""
    probable = predict(model, images).double().softmax(1)
    count = len(images.classes)
    sums = torch.zeros(count, count, dtype=torch.float64).index_add_(0, images.labels, probable)
    mean = sums / torch.bincount(images.labels, minlength=count).clamp(min=1)[:, None]
    mutual = ((mean + mean.T) / 2).fill_diagonal_(0)
    return (1 - mutual / mutual.max().clamp(min=1e-30)).fill_diagonal_(0).numpy()


def weight_distance(model: nn.Module, head: str) -> np.ndarray:
    """1 - cosine of the classes' rows in the last layer, [C, C] (as neural-backed decision trees have it)."""
    layer = model.get_submodule(head)
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    return _cosine_distance(layer.weight.detach().double().flatten(1))


def _cosine_distance(rows: torch.Tensor) -> np.ndarray:
    unit = torch.nn.functional.normalize(rows, dim=1)
    return (1 - unit @ unit.T).clamp(min=0).fill_diagonal_(0).numpy()


@dataclass(frozen=True)
class Semantics:
    """What WordNet says of classes. names, glosses: of their synsets, in order; wu_palmer, lin: similarities [C, C];
    tree: of hypernyms; above: of each class the synsets over it, by name, with their depths."""

    names: tuple[str, ...]
    glosses: tuple[str, ...]
    wu_palmer: np.ndarray
    lin: np.ndarray
    tree: Tree
    above: tuple[dict[str, int], ...]

    def common(self, classes: tuple[int, ...]) -> str:
        """The deepest synset that is over all these classes, or empty."""
        shared = set.intersection(*(set(self.above[i]) for i in classes))
        return max(shared, key=lambda name: (self.above[classes[0]][name], name), default="")

    def named(self, tree: Tree) -> Tree:
        """The tree, with every node's common synset as its name."""
        children = tuple(self.named(child) for child in tree.children)
        return replace(tree, children=children, synset=self.common(tree.classes))


def read_semantics(classes: tuple[str, ...], synsets: Path | None = None) -> Semantics:
    """Look the classes up in WordNet; `synsets`: a file that says which nouns they are. Raises UsageError."""
    if len(classes) < 2:
        raise UsageError("one class has no relations: a taxonomy is of two or more")
    wordnet = open_wordnet()
    found: tuple[Any, ...] = find_synsets(wordnet, classes, read_synsets(synsets) if synsets else None)
    return Semantics(
        tuple(s.name() for s in found),
        tuple(gloss(s) for s in found),
        similarity(wordnet, found, "wu-palmer"),
        similarity(wordnet, found, "lin"),
        semantic_tree(wordnet, found),
        tuple({a.name(): depth(a) for a in ancestors(s)} for s in found),
    )


@dataclass(frozen=True)
class Coherence:
    """How far groups and the tree they are cut from follow WordNet.

    wu_palmer, lin: mean similarity within groups, among random partitions of the same sizes; rand: adjusted Rand index
    with WordNet's own tree cut to as many groups; cophenetic: correlation of the whole tree's distances with
    1 - Wu-Palmer.
    """

    groups: list[tuple[int, ...]]
    wu_palmer: Permutation
    lin: Permutation
    rand: float
    cophenetic: float


def coherence(tree: Tree, semantics: Semantics, count: int, draws: int = 10_000) -> Coherence:
    """Of a tree of all classes cut to `count` groups. Raises UsageError where that gives no pairs."""
    groups = groups_of(cut(tree, count))
    own = groups_of(cut(semantics.tree, min(count, len(semantics.tree.leaves()))))
    return Coherence(
        groups,
        permutation_test(groups, semantics.wu_palmer, draws),
        permutation_test(groups, semantics.lin, draws),
        adjusted_rand(groups, own, len(tree.classes)),
        cophenetic_correlation(tree, 1 - semantics.wu_palmer),
    )
