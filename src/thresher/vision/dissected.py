"""A network along a tree of classes: what it computes, what it costs, and how it is kept in a folder."""

import copy
import json
import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from thresher.errors import ModelError, StorageError, UsageError
from thresher.files import replaced, replaced_text
from thresher.vision.hierarchy import Tree, read_tree, write_tree
from thresher.vision.layers import count_macs, evaluating, unwrap_logits
from thresher.vision.models import (
    WEIGHTS,
    Classifier,
    Description,
    build,
    load_weights,
    read_description,
    write_description,
)
from thresher.vision.nets import conv_bn
from thresher.vision.pieces import split_at
from thresher.vision.prune import shape_pruned

ROOT = "root"
LEAST = 0.02  # chance of a leaf that is run: on validation images as right as all leaves
PARTS, TREE = "parts.json", "tree.json"
_MOST_BYTES = 1 << 24  # of PARTS


class Router(nn.Module):
    """A few numbers from a feature map: two strided convolutions, the mean over positions, a linear layer. Which child
    it belongs to, or the logit of a leaf of one class."""

    def __init__(self, channels: int, outputs: int, width: int = 32) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(conv_bn(channels, width, 3, 2), nn.ReLU(), conv_bn(width, 2 * width, 3, 2), nn.ReLU())
        )
        self.head = nn.Linear(2 * width, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.features(x).mean((2, 3)))
        return out


class Dissected(nn.Module):
    """The network along a tree. Images give the logits [N, classes] of all leaves, side by side: what the whole network
    gave.

    pieces: by node (`root`, `root_0`, ...), from its parent's cut to its own or, of a leaf, to the logits of its
    classes in order; a leaf of one class has a Router of one output. routers: by inner node, for `soft` and `route`.
    """

    def __init__(self, tree: Tree, pieces: dict[str, nn.Module], routers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.tree = tree
        self.pieces, self.routers = nn.ModuleDict(pieces), nn.ModuleDict(routers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self._joined(images, routed=False)

    def soft(self, images: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [N, classes]: of the way to a leaf, by the routers, and within it."""
        return self._joined(images, routed=True)

    def _joined(self, images: torch.Tensor, routed: bool) -> torch.Tensor:
        columns: dict[int, torch.Tensor] = {}

        def descend(key: str, node: Tree, x: torch.Tensor, way: torch.Tensor) -> None:
            x = self.pieces[key](x)
            if not node.children:
                logits = F.log_softmax(unwrap_logits(x), 1) + way[:, None] if routed else unwrap_logits(x)
                columns.update(zip(node.classes, logits.unbind(1), strict=True))
                return
            ways = F.log_softmax(self.routers[key](x), 1) + way[:, None] if routed else None
            for i, child in enumerate(node.children):
                descend(f"{key}_{i}", child, x, way if ways is None else ways[:, i])

        descend(ROOT, self.tree, images, images.new_zeros(len(images)))
        return torch.stack([columns[i] for i in self.tree.classes], 1)

    @torch.no_grad()
    def route(self, images: torch.Tensor, least: float = LEAST) -> tuple[torch.Tensor, dict[str, int]]:
        """Run only the children that an image's router gives a chance of at least `least`, counted from the root, and
        at each split the likeliest: logits [N, classes], -inf of what was not run, and how many images each piece saw.
        1 runs one leaf of an image, 0 all."""
        logits = images.new_full((len(images), len(self.tree.classes)), -torch.inf)
        seen: dict[str, int] = {}

        def descend(key: str, node: Tree, x: torch.Tensor, way: torch.Tensor, index: torch.Tensor) -> None:
            if not len(index):
                return
            seen[key] = len(index)
            x = self.pieces[key](x)
            if not node.children:
                logits[index[:, None], torch.tensor(node.classes)] = unwrap_logits(x)
                return
            ways = F.log_softmax(self.routers[key](x), 1) + way[:, None]
            run = (ways.exp() >= least).scatter(1, ways.argmax(1, keepdim=True), True)
            for i, child in enumerate(node.children):
                chosen = run[:, i]
                descend(f"{key}_{i}", child, x[chosen], ways[chosen, i], index[chosen])

        with evaluating(self) if self.training else nullcontext():  # to look at all modules takes a third of a ms
            descend(ROOT, self.tree, images, images.new_zeros(len(images)), torch.arange(len(images)))
        return logits, seen

    def way(self, key: str) -> list[str]:
        """The nodes from the root to this one."""
        parts = key.split("_")
        return ["_".join(parts[: i + 1]) for i in range(len(parts))]

    def leaf(self, key: str) -> nn.Module:
        """A leaf alone: the pieces on the way to it, for logits of its classes. They are shared, not copied."""
        return nn.Sequential(*(self.pieces[k] for k in self.way(key)))


def keyed(tree: Tree, key: str = ROOT) -> Iterator[tuple[str, Tree]]:
    """Every node with its key, parents first."""
    yield key, tree
    for i, child in enumerate(tree.children):
        yield from keyed(child, f"{key}_{i}")


@dataclass(frozen=True)
class Part:
    """What became of a node. cut: the value its children part at, `channels` wide (of a leaf empty and 0); overlap: of
    their impact vectors there; share: of impact that was kept; kept: channels left in each group; macs, parameters: of
    the network up to its end, without routers. A leaf of one class, which is a Router, has none."""

    classes: tuple[int, ...]
    cut: str
    channels: int
    overlap: float
    share: float
    kept: dict[str, int]
    macs: int
    parameters: int


def expected_macs(net: Dissected, example: torch.Tensor, seen: dict[str, int], images: int) -> float:
    """Multiply-adds of one image, on average, when it is routed as `seen` says."""
    x = {ROOT: example}
    total = 0.0
    for key, node in keyed(net.tree):
        if key not in net.pieces:
            continue
        share = seen.get(key, 0) / images
        total += share * _macs(net.pieces[key], x[key])
        if node.children:
            with evaluating(net), torch.no_grad():
                out = net.pieces[key](x[key])
            total += share * _macs(net.routers[key], out)
            x |= {f"{key}_{i}": out for i in range(len(node.children))}
    return total


def _macs(module: nn.Module, x: torch.Tensor) -> int:
    return count_macs(module, x) if not isinstance(module, nn.Identity) else 0


def piece_between(module: nn.Module, start: str, end: str) -> nn.Module:
    """A module from one cut (or, if empty, its input) to another (or its logits). Raises ModelError."""
    if start and start == end:
        return nn.Identity()
    return split_at(module, [name for name in (start, end) if name])[1 if start else 0]


def _starts(tree: Tree, parts: dict[str, Part]) -> dict[str, str]:
    """The cut that each node's piece begins at."""
    return {key: parts[key.rpartition("_")[0]].cut if key != ROOT else "" for key, _ in keyed(tree) if key in parts}


def save_dissected(net: Dissected, about: Description, parts: dict[str, Part], folder: Path) -> None:
    """WEIGHTS, TREE, PARTS and the description of the whole. Raises StorageError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        state = {n: t.detach().cpu().contiguous().clone() for n, t in net.state_dict().items()}
        replaced(folder / WEIGHTS, lambda part: save_file(state, part))
        said = json.dumps({key: asdict(part) for key, part in parts.items()}, indent=1)
        replaced_text(folder / PARTS, said)
        write_tree(net.tree, about.classes, folder / TREE)
        write_description(about, folder)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written: {error.strerror}") from error


def load_dissected(folder: Path, trusted: str | None = None) -> tuple[Dissected, Description, dict[str, Part]]:
    """What `save_dissected` wrote. Raises ModelError, StorageError."""
    if not (folder / PARTS).is_file():
        raise ModelError(f"{folder}: no network along a tree, which `thresher vision hierarchy` makes: no {PARTS}")
    about = read_description(folder)
    tree = read_tree(folder / TREE, about.classes)
    parts = _read_parts(folder / PARTS)
    wanted = {key: node.classes for key, node in keyed(tree) if len(node.classes) > 1}
    if {key: part.classes for key, part in parts.items()} != wanted:
        raise ModelError(f"{folder}: its parts are not those of its tree")
    pieces: dict[str, nn.Module] = {}
    routers: dict[str, nn.Module] = {}
    children = {key: len(node.children) for key, node in keyed(tree)}
    try:
        for key, start in _starts(tree, parts).items():
            pieces[key] = piece_between(_shaped(about, parts[key], folder, trusted), start, parts[key].cut)
            if children[key]:
                routers[key] = Router(parts[key].channels, children[key])
        for key, node in keyed(tree):
            if len(node.classes) == 1:
                pieces[key] = Router(parts[key.rpartition("_")[0]].channels, 1)
    except (UsageError, ModelError) as error:
        raise ModelError(f"{folder}: {error}") from error
    net = Dissected(tree, pieces, routers)
    load_weights(net, folder / WEIGHTS)
    return net.eval(), about, parts


def _shaped(about: Description, part: Part, folder: Path, trusted: str | None) -> nn.Module:
    module = build(about, folder, trusted)
    shape_pruned(module, Classifier(module, about).example, len(part.classes), part.kept)
    return module.eval()


def _read_parts(path: Path) -> dict[str, Part]:
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise ValueError("too long")
        return {str(key): _part(said) for key, said in json.loads(data).items()}
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ModelError(f"{path}: damaged: {error!r:.200}") from error


def _part(said: dict[str, Any]) -> Part:
    channels = int(said["channels"])
    if not 0 <= channels < 1 << 16:
        raise ValueError(f"{channels} channels")
    return Part(
        classes=tuple(map(int, said["classes"])),
        cut=str(said["cut"]),
        channels=channels,
        overlap=float(said["overlap"]),
        share=float(said["share"]),
        kept={str(n): int(c) for n, c in said["kept"].items()},
        macs=int(said["macs"]),
        parameters=int(said["parameters"]),
    )


def leaf_classifier(
    net: Dissected, about: Description, parts: dict[str, Part], key: str, whole: nn.Module
) -> Classifier:
    """A leaf as a classifier of its own, in the layers of the architecture it comes from (`whole`, whose weights do not
    matter), so that it can be saved, exported, attacked and decomposed like any."""
    part = parts[key]
    module = copy.deepcopy(whole)
    shape_pruned(module, Classifier(module, about).example, len(part.classes), part.kept)
    state: dict[str, torch.Tensor] = {}
    for passed in net.way(key):
        state |= net.pieces[passed].state_dict()
    names = module.state_dict()  # buffers that it does not keep are constants of the pieces
    module.load_state_dict({n: t for n, t in state.items() if n in names})
    classes = tuple(about.classes[i] for i in part.classes)
    history = {"leaf": key, "macs": part.macs, "parameters": part.parameters}
    return Classifier(module.eval(), replace(about, classes=classes, pruned=dict(part.kept), history=history))


def leaf_name(key: str, node: Tree, classes: tuple[str, ...]) -> str:
    """A name for a leaf's folder: where it is, and its synset or first classes."""
    said = node.synset.split(".")[0] if node.synset else "-".join(classes[i] for i in node.classes[:3])
    where = key.removeprefix(ROOT + "_").replace("_", ".")
    return f"{where}-{re.sub(r'[^a-z0-9]+', '-', said.lower()).strip('-') or 'leaf'}"[:60]
