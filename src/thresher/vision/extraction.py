"""The smallest sub-network for a few classes: a leaf of a tree, or the whole network pruned for them."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from thresher.errors import ModelError, UsageError
from thresher.vision import finetune as tuning
from thresher.vision.data import Splits, select
from thresher.vision.dissect import Restricted, Settings, prune_for
from thresher.vision.dissected import PARTS, TREE, keyed, leaf_name
from thresher.vision.hierarchy import groups_of, read_tree
from thresher.vision.hsd import LEAVES, TUNE, TUNING, WHOLE, Leaf, check_whole, finetune_for, images_of, measure_leaf
from thresher.vision.layers import count_macs, count_parameters, weights_digest
from thresher.vision.models import Classifier, load_classifier, save_classifier
from thresher.vision.pipeline import Progress, silent
from thresher.vision.prune import channel_groups, find_head, restrict_head


def find_classes(names: Sequence[str], known: tuple[str, ...]) -> tuple[int, ...]:
    """Numbers of classes by name, whatever their case, sorted. Raises UsageError."""
    lower = {name.lower(): i for i, name in enumerate(known)}
    unknown = [name for name in names if name.lower() not in lower]
    if unknown:
        raise UsageError(f"there is no class {unknown[0]}: classes are {', '.join(known[:30])}")
    found = tuple(sorted({lower[name.lower()] for name in names}))
    if len(found) < 2:
        raise UsageError("a sub-network tells two or more classes apart")
    return found


def extract(
    source: Path | Classifier,
    names: Sequence[str],
    out: Path,
    data: Splits | None = None,
    settings: Settings | None = None,
    tune: tuning.Settings | None = None,
    batches: tuple[int, ...] = (1, 32),
    trusted: str | None = None,
    progress: Progress = silent,
) -> tuple[Classifier, Leaf | None]:
    """The smallest sub-network for these classes, from what `make_hierarchy` wrote or from any whole classifier.

    Without data: the leaf that holds all of them, its last layer restricted (nothing is measured). With data, which may
    be of these classes alone: the (tuned) whole network pruned for exactly these classes and fine-tuned from it, or the
    leaf if that is smaller. Raises UsageError where neither is to be had, ModelError, StorageError.
    """
    whole = source if isinstance(source, Classifier) else _whole_of(source, trusted)
    check_whole(whole)
    classes = find_classes(names, whole.about.classes)
    leaf = None if isinstance(source, Classifier) else _leaf_of(source, whole, classes, trusted)
    if data is None:
        if leaf is None:
            held = "a whole network has no leaves" if isinstance(source, Classifier) else _leaves_of(source, whole)
            raise UsageError(f"{held}: give --data to make a sub-network for these classes")
        save_classifier(leaf, out, export=True)
        return leaf, None
    chosen = images_of(whole, classes, data)
    pruned = _pruned(whole, classes, chosen, settings or Settings(), tune or TUNE, out, progress)
    best = min((pruned, leaf or pruned), key=lambda c: count_macs(c.module, c.example))
    return best, measure_leaf("-".join(best.about.classes), best, whole, chosen.test, classes, out, batches)


def _whole_of(folder: Path, trusted: str | None) -> Classifier:
    """The (tuned) whole network that `make_hierarchy` took apart."""
    if not (folder / PARTS).is_file():
        raise ModelError(f"{folder}: no network along a tree, which `thresher vision hierarchy` makes: no {PARTS}")
    return load_classifier(str(folder / WHOLE), trusted=trusted)


def _leaves_of(folder: Path, whole: Classifier) -> str:
    groups = groups_of(read_tree(folder / TREE, whole.about.classes))
    said = "; ".join(", ".join(whole.about.classes[i] for i in group) for group in groups)
    return f"no leaf holds all of these classes (leaves: {said})"


def _leaf_of(folder: Path, whole: Classifier, classes: tuple[int, ...], trusted: str | None) -> Classifier | None:
    """The leaf, as trained alone, that holds all of these classes, its last layer restricted to them."""
    tree = read_tree(folder / TREE, whole.about.classes)
    lowest = tree.lowest(classes)
    if lowest.children:
        return None
    key = next(k for k, node in keyed(tree) if node == lowest)
    leaf = load_classifier(str(folder / LEAVES / leaf_name(key, lowest, whole.about.classes)), trusted=trusted)
    return _restricted(leaf, [lowest.classes.index(c) for c in classes])


def _restricted(leaf: Classifier, rows: list[int]) -> Classifier:
    module = copy.deepcopy(leaf.module)
    restrict_head(module, find_head(module, leaf.example, len(leaf.about.classes)), torch.tensor(rows))
    return Classifier(module, replace(leaf.about, classes=tuple(leaf.about.classes[i] for i in rows)))


def _pruned(
    whole: Classifier,
    classes: tuple[int, ...],
    data: Splits,
    settings: Settings,
    tune: tuning.Settings,
    out: Path,
    progress: Progress,
) -> Classifier:
    """The whole network pruned for these classes and fine-tuned from it; data: their images, labelled 0, 1, ..."""
    made, teacher = _restricted(whole, list(classes)), Restricted(whole.module, classes)
    least = tuning.accuracy(teacher, data.validation) - settings.fall
    macs, parameters = count_macs(whole.module, whole.example), count_parameters(whole.module)
    limits = settings.flops * macs, settings.parameters * parameters
    sample = select(data.train, range(len(classes)), settings.images)
    module, share = prune_for(made.module, made.example, sample, data.validation, None, least, limits, settings)
    finetune_for(module, teacher, data, tune, out / TUNING, progress)
    groups, _ = channel_groups(module, made.example, find_head(module, made.example, len(classes)))
    history = {"extracted": {"share": share, "from": weights_digest(whole.module)}}
    pruned = {g.name: g.channels for g in groups}
    return Classifier(module.eval(), replace(made.about, pruned=pruned, history=history))
