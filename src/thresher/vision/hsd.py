"""A trained CNN in, a tree of sub-networks out: tuned to its taxonomy, grouped, taken apart, trained as one,
measured."""

import copy
import json
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from thresher.errors import ModelError, StorageError, UsageError
from thresher.evaluation.statistics import Interval, wilson
from thresher.vision import finetune as tuning
from thresher.vision.compress import latencies
from thresher.vision.data import Images, Splits, select
from thresher.vision.dissect import Restricted, Settings, dissect
from thresher.vision.dissected import (
    LEAST,
    PARTS,
    Dissected,
    Part,
    expected_macs,
    keyed,
    leaf_classifier,
    leaf_name,
    load_dissected,
    save_dissected,
)
from thresher.vision.grouping import (
    KINDS,
    Coherence,
    Semantics,
    coherence,
    confusion_distance,
    impact_distance,
    weight_distance,
)
from thresher.vision.hierarchy import Tree, agglomerate, cut
from thresher.vision.impact import measure_impact
from thresher.vision.layers import count_macs, count_parameters, weights_digest
from thresher.vision.losses import find_objective
from thresher.vision.models import Classifier, Description, save_classifier
from thresher.vision.pipeline import Progress, check_data, silent
from thresher.vision.prune import channel_groups, find_head
from thresher.vision.routers import train_routers
from thresher.vision.taxonomy import WEIGHTS, Taxonomy

WHOLE, LEAVES = "whole", "leaves"  # folders within the result's
TUNING, DISSECTED, TREE_TRAINING, ROUTERS = "tuning", "dissected", "finetune", "routers"

ROUTED = {"likely": LEAST, "hard": 1.0}  # ways to run a part of the leaves, and Dissected.route's `least` of each
TUNE_TREE = tuning.Settings("cross-entropy", epochs=8, lr=0.05)  # labels teach a tree more (docs/results.md)
TUNE = replace(TUNE_TREE, objective="soft")  # of what follows a taxonomy and of what is extracted


@dataclass(frozen=True)
class Follow:
    """How the whole network is tuned to its taxonomy first: a method of taxonomy.py, its weight and temperature, and
    the training's settings."""

    method: str = "align"
    weight: float = WEIGHTS["align"]
    temperature: float = 0.1
    tune: tuning.Settings = field(default_factory=lambda: replace(TUNE, epochs=3))


@dataclass(frozen=True)
class Leaf:
    """A leaf beside the whole network asked only for its classes. flops, parameters: shares of the whole's; seconds: of
    batches, [the whole's, the leaf's]; exports: how far each file's logits are off."""

    name: str
    classes: tuple[str, ...]
    accuracy: Interval
    whole: Interval
    flops: float
    parameters: float
    seconds: dict[int, tuple[float, float]]
    exports: dict[str, float]


@dataclass(frozen=True)
class Hierarchy:
    """What `make_hierarchy` made.

    accuracy: of the test images, of `whole` (as given), `tuned`, `all` (all leaves' logits side by side), `soft` (all
    leaves, weighted by the routers), `likely` (only leaves with a chance of LEAST) and `hard` (the likeliest leaf
    only); costs: multiply-adds and parameters of `whole`, `all` and, multiply-adds alone, `likely` and `hard` on
    average; coherence: by kind of distance, how far the tuned
    network's groups follow WordNet, and `before` those of the network as given, by impact; taxonomy: the groups of
    WordNet's own tree.
    """

    net: Dissected
    parts: dict[str, Part]
    leaves: list[Leaf]
    accuracy: dict[str, Interval]
    costs: dict[str, dict[str, float]]
    coherence: dict[str, Coherence]
    settings: dict[str, Any]

    def summary(self) -> dict[str, Any]:
        """All of it but the network, for JSON."""
        said = {k: v for k, v in vars(self).items() if k not in ("net", "parts", "leaves", "coherence", "accuracy")}
        return said | {
            "accuracy": {k: asdict(v) for k, v in self.accuracy.items()},
            "parts": {k: asdict(v) for k, v in self.parts.items()},
            "leaves": [asdict(v) for v in self.leaves],
            "coherence": {k: asdict(v) for k, v in self.coherence.items()},
            "device": f"{torch.get_num_threads()} threads",
        }


def visual_tree(model: Classifier, images: Images, validation: Images, kind: str = "impact", most: int = 100) -> Tree:
    """Classes joined as the network holds them to be alike; images: to measure impact by, `most` of each class. Raises
    UsageError, ModelError."""
    if kind not in KINDS:
        raise UsageError(f"unknown distance of classes {kind}: choose one of {', '.join(KINDS)}")
    module, count = model.module, len(model.about.classes)
    head = find_head(module, model.example, count)
    if kind == "confusion":
        distance: np.ndarray = confusion_distance(module, validation)
    elif kind == "weights":
        distance = weight_distance(module, head)
    else:
        groups, _ = channel_groups(module, model.example, head)
        if not groups:
            raise UsageError("the model has no channels that can be taken out, so filters have no impact to compare")
        impact = measure_impact(module, groups, select(images, range(count), most))
        distance = impact_distance(impact, [g.name for g in groups])
    return agglomerate(distance)


def follow_taxonomy(
    whole: Classifier, data: Splits, semantics: Semantics, follow: Follow, folder: Path, progress: Progress = silent
) -> Classifier:
    """A copy of the network tuned so that its classes follow WordNet, with the network as it was for a teacher. Kept in
    `folder` with its checkpoints; what was made from the same comes from there. Raises UsageError, StorageError."""
    tuned = copy.deepcopy(whole.module)
    head = find_head(tuned, whole.example, len(whole.about.classes))
    similar = torch.from_numpy(semantics.wu_palmer)
    taxonomy = Taxonomy(follow.method, follow.weight, similar, semantics.tree, head, follow.temperature)
    curve = tuning.finetune(
        tuned,
        data.train,
        data.validation,
        follow.tune,
        whole.module,
        folder=folder,
        progress=lambda done, total: progress("learning the taxonomy", done, total),
        taxonomy=taxonomy,
    )
    history = whole.about.history | {"taxonomy": {"name": taxonomy.name, "curve": [asdict(e) for e in curve]}}
    return Classifier(tuned.eval(), replace(whole.about, history=history))


def make_hierarchy(
    whole: Classifier,
    data: Splits,
    semantics: Semantics | None,
    folder: Path,
    settings: Settings | None = None,
    tune: tuning.Settings | None = None,
    follow: Follow | None = None,
    tree: Tree | str = "impact",
    groups: int = 5,
    batches: tuple[int, ...] = (1, 32),
    progress: Progress = silent,
) -> Hierarchy:
    """Tune the network to WordNet (`follow`), group its classes, take it apart, train the parts as one by `tune`, the
    network as it was for a teacher where one is needed, and write all to `folder`: the tree, the tuned network, every
    leaf alone.

    tree: a kind of visual distance, `taxonomy` for WordNet's own, or any tree; one of the first three is cut to
    `groups`. semantics: None leaves WordNet out, and with it what needs it. A run that was stopped goes on. Raises
    UsageError, ModelError, StorageError.
    """
    check_data(whole, data)
    if tuning.processes().num_processes > 1:
        raise UsageError("a network is taken apart by one process: start it without torchrun")
    settings, tune = settings or Settings(), tune or TUNE_TREE
    check_whole(whole)
    if find_objective(tune.objective).needs_features:
        raise UsageError(
            f"the loss {tune.objective} compares layers, and a tree has others than the network: cross-entropy, soft "
            "and logits compare none"
        )
    if semantics is None and (follow is not None or tree == "taxonomy"):
        raise UsageError("to follow a taxonomy, one is needed: --taxonomy wordnet")
    tuned = (
        follow_taxonomy(whole, data, semantics, follow, folder / TUNING, progress) if follow and semantics else whole
    )
    found: dict[str, Coherence] = {}
    if semantics is not None:
        found["taxonomy"] = coherence(semantics.tree, semantics, min(groups, len(semantics.tree.leaves())))
        found["before"] = coherence(visual_tree(whole, data.train, data.validation), semantics, groups)
        for kind in KINDS:
            found[kind] = coherence(visual_tree(tuned, data.train, data.validation, kind), semantics, groups)
    net, parts = _dissected(tuned, tree, data, semantics, groups, settings, folder / DISSECTED, progress)
    tuning.finetune(
        net,
        data.train,
        data.validation,
        tune,
        whole.module,
        folder=folder / TREE_TRAINING,
        progress=lambda done, total: progress("training the tree", done, total),
    )
    train_routers(net, whole.module, data, tune, folder / ROUTERS, progress)
    accuracy, costs = _measure(whole, tuned, net, data.test)
    about = replace(tuned.about, history={})
    leaves = _save_leaves(whole, net, about, parts, data, tune, folder, batches, progress)
    asked = {
        "dissect": asdict(settings),
        "finetune": asdict(tune),
        "follow": asdict(follow) if follow else None,
        "tree": tree if isinstance(tree, str) else "given",
        "groups": groups,
        "synsets": list(semantics.names) if semantics else [],
        "glosses": list(semantics.glosses) if semantics else [],
    }
    made = Hierarchy(net, parts, leaves, accuracy, costs, found, asked)
    save_classifier(tuned, folder / WHOLE)
    save_dissected(net, replace(about, history={"hierarchy": made.summary()}), parts, folder)
    return made


def check_whole(whole: Classifier) -> None:
    if whole.about.ranks or whole.about.folded or whole.about.pruned:
        raise UsageError("a decomposed or pruned model cannot be taken apart: take the whole one apart, then its parts")


def _dissected(
    tuned: Classifier,
    tree: Tree | str,
    data: Splits,
    semantics: Semantics | None,
    groups: int,
    settings: Settings,
    folder: Path,
    progress: Progress,
) -> tuple[Dissected, dict[str, Part]]:
    """The network along its tree, not trained yet: that of an earlier run that asked for the same, or a new one.

    Another machine or number of threads rounds otherwise, and between channels that are worth as much that decides."""
    asked = {
        "dissect": asdict(settings),
        "tree": tree if isinstance(tree, str) else asdict(tree),
        "groups": groups,
        "synsets": list(semantics.names) if semantics else [],
        "weights": weights_digest(tuned.module),
        "images": [data.train.digest(), data.validation.digest()],
    }
    asked = json.loads(json.dumps(asked))
    if (folder / PARTS).is_file():
        try:
            net, about, parts = load_dissected(folder, tuned.about.source)
            if about.history["asked"] == asked:
                return net, parts
        except (ModelError, StorageError, KeyError):
            pass  # what is there is of no use
    chosen = _chosen(tree, tuned, data, semantics, groups)
    net, parts = dissect(tuned, chosen, data.train, data.validation, settings, progress)
    save_dissected(net, replace(tuned.about, history={"asked": asked}), parts, folder)
    net, _, parts = load_dissected(folder, tuned.about.source)  # whose parameters are in the order a resumed run has
    return net, parts


def _chosen(tree: Tree | str, tuned: Classifier, data: Splits, semantics: Semantics | None, groups: int) -> Tree:
    if not isinstance(tree, str):
        return tree
    if tree == "taxonomy":
        assert semantics is not None
        return cut(semantics.tree, min(groups, len(semantics.tree.leaves())))
    grown = cut(visual_tree(tuned, data.train, data.validation, tree), groups)
    return semantics.named(grown) if semantics else grown


def _right(model: nn.Module, images: Images) -> Interval:
    return wilson(round(tuning.accuracy(model, images) * len(images)), len(images))


def _measure(
    whole: Classifier, tuned: Classifier, net: Dissected, test: Images
) -> tuple[dict[str, Interval], dict[str, dict[str, float]]]:
    right = {"soft": 0} | dict.fromkeys(ROUTED, 0)
    seen: dict[str, Counter[str]] = {use: Counter() for use in ROUTED}
    for pixels, labels in zip(torch.split(test.pixels, 256), torch.split(test.labels, 256), strict=True):
        images = pixels.float() / 255
        with torch.no_grad():
            right["soft"] += int((net.soft(images).argmax(1) == labels).sum())
        for use, least in ROUTED.items():
            logits, counts = net.route(images, least)
            right[use] += int((logits.argmax(1) == labels).sum())
            seen[use].update(counts)
    accuracy = {"whole": _right(whole.module, test)}
    if tuned is not whole:
        accuracy["tuned"] = _right(tuned.module, test)
    accuracy |= {"all": _right(net, test)} | {k: wilson(n, len(test)) for k, n in right.items()}
    count = sum(count_parameters(piece) for piece in net.pieces.values())
    costs = {
        "macs": {
            "whole": float(count_macs(whole.module, whole.example)),
            "all": float(count_macs(net, whole.example)),
        }
        | {use: expected_macs(net, whole.example, seen[use], len(test)) for use in ROUTED},
        "parameters": {"whole": float(count_parameters(whole.module)), "all": float(count)},
    }
    return accuracy, costs


def _save_leaves(
    whole: Classifier,
    net: Dissected,
    about: Description,
    parts: dict[str, Part],
    data: Splits,
    tune: tuning.Settings,
    folder: Path,
    batches: tuple[int, ...],
    progress: Progress,
) -> list[Leaf]:
    """Each leaf as a model of its own, trained once more on the images and labels of its classes alone, for twice the
    tree's epochs: better than taught by the whole network or for less long (docs/results.md), and cheap, as these
    images are few; in the tree it stays as it is."""
    alone = replace(tune, objective="cross-entropy", epochs=2 * tune.epochs)
    found = []
    for key, node in keyed(net.tree):
        if node.children or len(node.classes) == 1:
            continue
        leaf = leaf_classifier(net, about, parts, key, whole.module)
        name = leaf_name(key, node, about.classes)
        chosen = images_of(whole, node.classes, data)
        finetune_for(leaf.module, None, chosen, alone, folder / LEAVES / name / TUNING, progress)
        found.append(measure_leaf(name, leaf, whole, chosen.test, node.classes, folder / LEAVES / name, batches))
    return found


def images_of(whole: Classifier, classes: tuple[int, ...], data: Splits) -> Splits:
    """The images of these classes, labelled 0, 1, ...: by their names, or by their numbers where the data has all of
    the model's classes under others. Raises UsageError."""
    names, known = [whole.about.classes[c] for c in classes], data.train.classes
    shape = tuple(data.train.pixels.shape[1:])
    if shape != whole.about.shape:
        raise UsageError(f"the model takes images of {whole.about.shape}, and the data has {shape}")
    if set(names) <= set(known):
        places = [known.index(name) for name in names]
    elif len(known) == len(whole.about.classes):
        places = list(classes)
    else:
        missing = [name for name in names if name not in known]
        raise UsageError(f"the data has no class {missing[0]}: its classes are {', '.join(known[:30])}")
    return Splits(select(data.train, places), select(data.validation, places), select(data.test, places))


def finetune_for(
    module: nn.Module, teacher: nn.Module | None, data: Splits, tune: tuning.Settings, folder: Path, progress: Progress
) -> None:
    """On the images of some classes alone. teacher: says what there is to learn among them."""
    tuning.finetune(
        module,
        data.train,
        data.validation,
        tune,
        teacher,
        folder=folder,
        progress=lambda done, total: progress("training leaves", done, total),
    )
    module.eval()


def measure_leaf(
    name: str,
    leaf: Classifier,
    whole: Classifier,
    test: Images,
    classes: tuple[int, ...],
    folder: Path,
    batches: tuple[int, ...],
) -> Leaf:
    """test: images of the leaf's classes, labelled as it numbers them."""
    exports = save_classifier(leaf, folder, export=True)
    seconds = {b: (t["before"], t["after"]) for b, t in latencies(whole, leaf, batches).items()}
    return Leaf(
        name,
        leaf.about.classes,
        _right(leaf.module, test),
        _right(Restricted(whole.module, classes), test),
        count_macs(leaf.module, leaf.example) / count_macs(whole.module, whole.example),
        count_parameters(leaf.module) / count_parameters(whole.module),
        seconds,
        exports,
    )
