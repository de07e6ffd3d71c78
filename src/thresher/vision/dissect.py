"""A CNN taken apart along a tree of classes (HSD-CNN, arXiv 1811.04406, reconstructed): a shared stem, branches that
keep the filters their classes need, routers where it splits."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from thresher.errors import UsageError
from thresher.vision.data import Images, select
from thresher.vision.dissected import ROOT, Dissected, Part, Router, piece_between
from thresher.vision.finetune import accuracy, predict
from thresher.vision.hierarchy import Tree
from thresher.vision.impact import METHODS, Impact, measure_impact, needed_channels
from thresher.vision.layers import count_macs, count_parameters, evaluating, unwrap_logits
from thresher.vision.models import Classifier
from thresher.vision.pieces import Cut, cut_points, split_at
from thresher.vision.prune import ChannelGroup, channel_groups, find_head, remove_channels, restrict_head

_STEPS = 8  # of a bisection
Progress = Callable[[str, int, int], None]


def _silent(what: str, done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class Settings:
    """How a network is taken apart.

    fall: how much of its accuracy within a group (0 to 1) pruning for the group may cost before fine-tuning; flops,
    parameters: shares of the whole's that a leaf may have at most, shared parts counted in; overlap: groups part at the
    first layer where the mean cosine of their impact vectors is at most this; multiple: channels are kept in multiples;
    method: of impact; images: of each class, to measure it by. Raises UsageError.
    """

    fall: float = 0.01
    flops: float = 0.5
    parameters: float = 0.4
    overlap: float = 0.5
    multiple: int = 8
    method: str = "taylor"
    images: int = 100

    def __post_init__(self) -> None:
        if not 0 <= self.fall < 1 or not 0 < self.flops <= 1 or not 0 < self.parameters <= 1:
            raise UsageError("a fall is in [0, 1), shares of FLOPs and parameters in (0, 1]")
        if not 0 <= self.overlap <= 1 or min(self.multiple, self.images) < 1 or self.method not in METHODS:
            raise UsageError(
                f"overlap is in [0, 1], multiple and images begin at 1, and methods are {', '.join(METHODS)}"
            )


def restricted_accuracy(model: nn.Module, images: Images, classes: Sequence[int]) -> float:
    """Of a model of all classes, asked only which of these it is: what a sub-network of theirs is held against."""
    chosen = select(images, classes)
    logits = predict(model, chosen)[:, list(classes)]
    return float((logits.argmax(1) == chosen.labels).double().mean())


class Restricted(nn.Module):
    """A model that gives only the logits of some classes."""

    chosen: torch.Tensor

    def __init__(self, whole: nn.Module, classes: Sequence[int]) -> None:
        super().__init__()
        self.whole = whole
        self.register_buffer("chosen", torch.tensor(list(classes)), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return unwrap_logits(self.whole(images))[:, self.chosen]


def dissect(
    whole: Classifier,
    tree: Tree,
    train: Images,
    validation: Images,
    settings: Settings | None = None,
    progress: Progress = _silent,
) -> tuple[Dissected, dict[str, Part]]:
    """Take a network apart along the tree, from the root down; what comes back is not fine-tuned, and its routers and
    leaves of one class know nothing. A branch is pruned for its classes behind the cut it starts at. Raises UsageError,
    ModelError."""
    settings = settings or Settings()
    if tree.classes != tuple(range(len(whole.about.classes))):
        raise UsageError(f"the tree is not one of the model's {len(whole.about.classes)} classes")
    if not tree.children:
        raise UsageError("a tree of one group has nothing to be taken apart")
    for images in (train, validation):
        if len(images.classes) != len(whole.about.classes):
            raise UsageError(f"the model has {len(whole.about.classes)} classes, and the data {len(images.classes)}")
    macs, parameters = count_macs(whole.module, whole.example), count_parameters(whole.module)
    pieces: dict[str, nn.Module] = {}
    routers: dict[str, nn.Module] = {}
    parts: dict[str, Part] = {}
    total = sum(len(node.classes) > 1 for node in tree.nodes())

    def descend(key: str, node: Tree, module: nn.Module, held: tuple[int, ...], start: Cut | None) -> None:
        if len(node.classes) == 1:
            assert start is not None
            pieces[key] = Router(start.channels, 1)
            return
        progress("taking apart", len(parts), total)
        example, share = whole.example, 1.0
        module = copy.deepcopy(module)
        rows = torch.tensor([held.index(c) for c in node.classes])
        restrict_head(module, find_head(module, example, len(held)), rows)
        sample = select(train, node.classes, settings.images)
        if key != ROOT:
            limits = (settings.flops * macs, settings.parameters * parameters) if not node.children else None
            least = restricted_accuracy(whole.module, validation, node.classes) - settings.fall
            chosen = select(validation, node.classes)
            module, share = prune_for(module, example, sample, chosen, start, least, limits, settings)
        head = find_head(module, example, len(node.classes))
        groups, left = channel_groups(module, example, head)
        if not groups:
            raise UsageError(f"no channels of the model can be removed: {next(iter(left.values()), 'it has none')}")
        cut, overlap = None, 0.0
        if node.children:
            impact = measure_impact(module, groups, sample, settings.method)
            places = [[node.classes.index(c) for c in child.classes] for child in node.children]
            cut, overlap = _best_cut(module, example, groups, impact, places, start, settings, settings.flops * macs)
        end = cut.name if cut else ""
        pieces[key] = piece_between(module, start.name if start else "", end)
        reached = piece_between(module, "", end)
        kept = {g.name: g.channels for g in groups}
        costs = count_macs(reached, example), count_parameters(reached)
        parts[key] = Part(node.classes, end, cut.channels if cut else 0, overlap, share, kept, *costs)
        if cut is not None:
            routers[key] = Router(cut.channels, len(node.children))
            for i, child in enumerate(node.children):
                descend(f"{key}_{i}", child, module, node.classes, cut)

    with torch.random.fork_rng():
        torch.manual_seed(0)  # the routers' weights
        descend(ROOT, tree, whole.module, tree.classes, None)
    progress("taking apart", total, total)
    return Dissected(tree, pieces, routers).eval(), parts


def prune_for(
    module: nn.Module,
    example: torch.Tensor,
    sample: Images,
    validation: Images,
    start: Cut | None,
    least: float,
    limits: tuple[float, float] | None,
    settings: Settings,
) -> tuple[nn.Module, float]:
    """A copy without what, behind a cut, the module's classes do not need, and the share of impact that is kept.

    sample, validation: of these classes, labelled as the module numbers them. The share is the least that leaves
    `least` accuracy, or less if only that meets `limits`, multiply-adds and parameters. Raises UsageError if nothing
    does.
    """
    head = find_head(module, example, len(sample.classes))
    groups = _behind(channel_groups(module, example, head)[0], start)
    impact = measure_impact(module, groups, sample, settings.method)

    def pruned(share: float) -> nn.Module:
        smaller = copy.deepcopy(module)
        kept = needed_channels(impact, groups, range(len(sample.classes)), share, settings.multiple)
        remove_channels(smaller, example, groups, kept)
        return smaller

    def recalibrated(smaller: nn.Module) -> nn.Module:
        recalibrate(smaller, piece_between(smaller, start.name, "") if start else smaller, sample)
        return smaller

    def good(share: float) -> bool:
        return accuracy(recalibrated(pruned(share)), validation) >= least

    def affordable(share: float) -> bool:
        assert limits is not None
        smaller = pruned(share)
        return count_macs(smaller, example) <= limits[0] and count_parameters(smaller) <= limits[1]

    share = _bisect(good, 1.0)
    if limits is not None and not affordable(share):
        if not affordable(0.0):
            raise UsageError(
                f"a sub-network of {', '.join(sample.classes[:3])} is larger than asked even with the fewest channels: "
                "allow more FLOPs or parameters, or let the groups part earlier (a higher overlap)"
            )
        share = -_bisect(lambda s: affordable(-s), 0.0, low=-share)
    return recalibrated(pruned(share)), share


@torch.no_grad()
def recalibrate(module: nn.Module, part: nn.Module, images: Images, batch: int = 128) -> None:
    """Means and variances of the batch norms in a part of the module, anew from these images, in place: a pruned
    network's are others, and with the old ones it guesses."""
    norms = [m for m in part.modules() if isinstance(m, nn.BatchNorm2d) and m.track_running_stats]
    momenta = [m.momentum for m in norms]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over batches
    with evaluating(module):
        for norm in norms:
            norm.train()
        for index in torch.tensor_split(order, -(-len(order) // batch)):  # alike, and so that none is of one image
            module(images.pixels[index].float() / 255)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _bisect(holds: Callable[[float], bool], high: float, low: float = 0.0) -> float:
    """About the least value for which it holds; `high` is taken to."""
    if holds(low):
        return low
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if holds(middle):
            high = middle
        else:
            low = middle
    return high


def _behind(groups: list[ChannelGroup], start: Cut | None) -> list[ChannelGroup]:
    return [g for g in groups if start is None or not set(g.makers) & start.before]


def group_overlap(impact: Impact, group: str, places: Sequence[Sequence[int]]) -> float:
    """Mean cosine, over pairs of sibling groups, of the mean impact vectors of their classes in a group of channels."""
    vectors = impact.vectors(group)
    means = F.normalize(torch.stack([vectors[list(p)].mean(0) for p in places]), dim=1)
    cosines = means @ means.T
    return float((cosines.sum() - cosines.trace()) / (len(means) * (len(means) - 1)))


def _best_cut(
    module: nn.Module,
    example: torch.Tensor,
    groups: list[ChannelGroup],
    impact: Impact,
    places: Sequence[Sequence[int]],
    start: Cut | None,
    settings: Settings,
    most: float,
) -> tuple[Cut, float]:
    """The first cut behind which groups overlap little enough, among those whose shared part costs at most half of what
    a leaf may; of none such the one with the least overlap. The start itself is one."""
    best: tuple[float, Cut] | None = None
    for cut in cut_points(module, example):
        if start is not None and len(cut.before) < len(start.before):
            continue
        behind = _behind(groups, cut)
        costly = count_macs(split_at(module, [cut.name])[0], example) > most / 2
        if not behind or (costly and (start is None or cut.name != start.name)):
            continue
        overlap = group_overlap(impact, behind[0].name, places)
        if overlap <= settings.overlap:
            return cut, overlap
        if best is None or overlap < best[0]:
            best = overlap, cut
    if best is None:
        raise UsageError("the model has no point early enough for sub-networks of the size asked: allow more FLOPs")
    return best[1], best[0]
