"""Trees of classes: from distances, from WordNet, at random; cut, kept in files, drawn."""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from thresher.errors import StorageError, UsageError
from thresher.evaluation.plots import load_pyplot, save_figure
from thresher.files import replaced_text
from thresher.vision.wordnet import ancestors, depth, parents

MOST_LEVELS = 100  # of a tree: those of thousands of classes have some 20
_MOST_BYTES = 1 << 24  # of a file
_MOST_INCHES = 400  # of a picture, whose sides have at most 2^16 pixels


@dataclass(frozen=True)
class Tree:
    """A node and all below it.

    classes: the sorted indices of those below; children: at least two, which share them out, or none: a leaf, of one
    class or more; distance: at which the children (of a leaf, its classes) join, not below a child's, 0 of a single
    class; synset: WordNet's name of it, if it has one. Raises UsageError.
    """

    classes: tuple[int, ...]
    children: tuple["Tree", ...] = ()
    distance: float = 0.0
    synset: str = ""

    def __post_init__(self) -> None:
        below = sorted(chain.from_iterable(child.classes for child in self.children))
        if not self.classes or list(self.classes) != sorted(set(self.classes)) or self.classes[0] < 0:
            raise UsageError(f"classes of a tree are numbers from 0, sorted, each once: {_some(self.classes)}")
        if self.children and (len(self.children) < 2 or below != list(self.classes)):
            raise UsageError(f"children are two or more and share out the classes {_some(self.classes)}")
        least = max((child.distance for child in self.children), default=0.0)
        if not least <= self.distance < math.inf or (len(self.classes) == 1 and self.distance):
            raise UsageError(f"a distance is finite, not below a child's, 0 of one class: {self.distance} of {least}")
        levels = 1 + max((child.levels for child in self.children), default=0)
        if levels > MOST_LEVELS:
            raise UsageError(f"a tree has at most {MOST_LEVELS} levels")
        object.__setattr__(self, "_levels", levels)

    @property
    def levels(self) -> int:
        """Nodes on the longest way down."""
        return int(self.__dict__["_levels"])

    def nodes(self) -> list["Tree"]:
        """All, parents before their children, these left to right."""
        return [self, *chain.from_iterable(child.nodes() for child in self.children)]

    def leaves(self) -> list["Tree"]:
        """The nodes without children, left to right."""
        return [node for node in self.nodes() if not node.children]

    def lowest(self, classes: Iterable[int]) -> "Tree":
        """The lowest node that holds all these classes. Raises UsageError if it has not all of them, or for none."""
        wanted = set(classes)
        if not wanted or not wanted <= set(self.classes):
            raise UsageError(f"classes {_some(sorted(wanted))} are not all in a tree of {_some(self.classes)}")
        node = self
        while lower := [child for child in node.children if wanted <= set(child.classes)]:
            node = lower[0]
        return node


def _some(classes: Iterable[int]) -> str:
    known = [str(i) for i in classes]
    return ", ".join(known[:8]) + (f" and {len(known) - 8} more" if len(known) > 8 else "")


def check_distances(distance: np.ndarray) -> None:
    """[C, C], finite, symmetric, not negative, 0 on the diagonal. Raises UsageError."""
    square = distance.ndim == 2 and distance.shape[0] == distance.shape[1] and len(distance) > 0
    if not square or not np.isfinite(distance).all() or (distance < 0).any():
        raise UsageError("distances are [classes, classes], finite and not negative")
    if not np.allclose(distance, distance.T, rtol=1e-6, atol=1e-9) or np.abs(np.diag(distance)).max() > 1e-6:
        raise UsageError("distances are symmetric, and 0 of a class to itself")


def agglomerate(distance: np.ndarray) -> Tree:
    """A binary tree by average linkage of distances [C, C], a leaf a class; of two children the one with the lowest
    class comes first. Raises UsageError."""
    from scipy.cluster.hierarchy import linkage

    check_distances(distance)
    nodes = [Tree((i,)) for i in range(len(distance))]
    if len(nodes) == 1:
        return nodes[0]
    even = (distance + distance.T) / 2
    for first, second, joined, _ in linkage(even[np.triu_indices(len(even), 1)], "average"):
        nodes.append(_join((nodes[int(first)], nodes[int(second)]), float(joined)))
    return nodes[-1]


def _join(children: Iterable[Tree], distance: float, synset: str = "") -> Tree:
    """Rounding may bring a distance below a child's: it is then the child's."""
    ordered = tuple(sorted(children, key=lambda child: child.classes))
    classes = tuple(sorted(chain.from_iterable(child.classes for child in ordered)))
    return Tree(classes, ordered, max(distance, *(child.distance for child in ordered)), synset)


def semantic_tree(wordnet: Any, synsets: tuple[Any, ...]) -> Tree:
    """The hypernym tree of nouns, a leaf a class, nodes with a single child left out.

    Of several hypernyms a synset keeps one, decided from the root down: the one on whose way to the root the deepest
    subsumers of the classes not below the synset lie deepest (their depths summed), then the deepest, then the first
    by name. A class that subsumes others is a leaf beside them. distance: 1 - depth / the depth of the deepest class.
    Raises UsageError.
    """
    if not synsets:
        raise UsageError("a tree is of at least one class")
    over = [ancestors(synset) for synset in synsets]
    below: dict[Any, set[int]] = {}
    for i, known in enumerate(over):
        for synset in known:
            below.setdefault(synset, set()).add(i)
    kept: dict[Any, Any] = {}
    ways: dict[Any, list[Any]] = {}  # from each to the root
    for synset in sorted(below, key=lambda s: (depth(s), s.name())):
        others = [i for i in range(len(synsets)) if i not in below[synset]]

        def rank(hypernym: Any, others: list[int] = others) -> tuple[int, int]:
            way = ways[hypernym]  # depths fall along it
            shared = (next((depth(s) for s in way if i in below[s]), 0) for i in others)
            return sum(shared), depth(hypernym)

        above = parents(synset)
        kept[synset] = above[0] if len(above) == 1 else max(above, key=rank, default=None)
        ways[synset] = [synset, *ways.get(kept[synset], [])]
    deepest = max(depth(synset) for synset in synsets)
    parts: dict[Any, list[Tree]] = {}
    for i, synset in enumerate(synsets):
        parts.setdefault(synset, []).append(Tree((i,), synset=synset.name()))
    for synset in sorted(below, key=lambda s: (-depth(s), s.name())):
        children = parts.pop(synset, [])
        if len(children) > 1:
            children = [_join(children, 1 - depth(synset) / deepest, synset.name())]
        parts.setdefault(kept[synset], []).extend(children)
    (top,) = parts.values()
    return top[0] if len(top) == 1 else _join(top, 1.0)


def random_tree(tree: Tree, generator: np.random.Generator) -> Tree:
    """The same shape and distances, its classes changed about; without synsets, which would be wrong."""
    others = dict(zip(tree.classes, generator.permutation(tree.classes).tolist(), strict=True))

    def moved(node: Tree, children: tuple[Tree, ...]) -> Tree:
        return Tree(tuple(sorted(others[i] for i in node.classes)), children, node.distance)

    return _rebuild(tree, moved)


def _rebuild(tree: Tree, make: Callable[[Tree, tuple[Tree, ...]], Tree]) -> Tree:
    """Each node made anew, from itself and its new children."""
    return make(tree, tuple(_rebuild(child, make) for child in tree.children))


def cut(tree: Tree, groups: int) -> Tree:
    """The root with at least `groups` leaves: the node of the largest distance is split again and again (of equal ones
    that with the lowest class), into all its children, so that there may be more. 1 leaves the root alone. Raises
    UsageError if the tree has fewer leaves."""
    whole = len(tree.leaves())
    if not 1 <= groups <= whole:
        raise UsageError(f"{groups} groups are not within the 1 to {whole} that the tree can be cut to")
    parts = [tree]
    while len(parts) < groups:
        widest = min((p for p in parts if p.children), key=lambda p: (-p.distance, p.classes))
        at = parts.index(widest)
        parts[at : at + 1] = widest.children
    leaves = tuple(replace(part, children=()) for part in parts)
    return leaves[0] if len(leaves) == 1 else replace(tree, children=leaves)


def limit(tree: Tree, leaf_size: int) -> Tree:
    """Nodes of at most so many classes are leaves. Raises UsageError."""
    if leaf_size < 1:
        raise UsageError(f"a leaf has at least one class, not {leaf_size}")
    return _rebuild(tree, lambda node, below: replace(node, children=below if len(node.classes) > leaf_size else ()))


def groups_of(tree: Tree) -> list[tuple[int, ...]]:
    """The classes of each leaf, left to right."""
    return [leaf.classes for leaf in tree.leaves()]


def write_tree(tree: Tree, classes: tuple[str, ...], path: Path) -> None:
    """As JSON, whole or not at all: {"classes": how many, "tree": node}, a node {"synset", "distance", "children"} or,
    of a leaf, {"synset", "distance", "classes": [{"id", "name"}]}. Raises UsageError, StorageError."""
    _check_names(tree, classes)

    def raw(node: Tree) -> dict[str, Any]:
        said: dict[str, Any] = {"synset": node.synset, "distance": node.distance}
        if node.children:
            return said | {"children": [raw(child) for child in node.children]}
        return said | {"classes": [{"id": i, "name": classes[i]} for i in node.classes]}

    text = json.dumps({"classes": len(classes), "tree": raw(tree)}, indent=1) + "\n"
    try:
        replaced_text(path, text)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror}") from error


def _check_names(tree: Tree, classes: tuple[str, ...]) -> None:
    if tree.classes != tuple(range(len(classes))):
        raise UsageError(f"a tree of classes {_some(tree.classes)} is not one of the {len(classes)} classes named")


def read_tree(path: Path, classes: tuple[str, ...]) -> Tree:
    """What `write_tree` wrote, of these classes. Raises StorageError."""
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > _MOST_BYTES:
        raise StorageError(f"{path}: more than {_MOST_BYTES >> 20} MiB are no tree of classes")
    try:
        said = json.loads(data)
        count, raw = said["classes"], said["tree"]
        if count != len(classes):
            raise StorageError(f"a tree of {count!r:.20} classes, and there are {len(classes)}")
        seen: set[int] = set()
        tree = _parse(raw, classes, seen, 1)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise StorageError(f"{path}: not a tree of classes: {error!r:.200}") from error
    except (UsageError, StorageError) as error:
        raise StorageError(f"{path}: {error}") from error
    missing = [repr(name) for i, name in enumerate(classes) if i not in seen]
    if missing:
        raise StorageError(f"{path}: classes are missing from the tree: {', '.join(missing[:8])}")
    return tree


def _parse(raw: dict[str, Any], classes: tuple[str, ...], seen: set[int], level: int) -> Tree:
    if level > MOST_LEVELS:
        raise ValueError(f"more than {MOST_LEVELS} levels")
    synset, distance = raw["synset"], raw["distance"]
    if not isinstance(synset, str) or isinstance(distance, bool) or not isinstance(distance, int | float):
        raise ValueError("a synset is text, a distance a number")
    if "children" in raw:
        children = tuple(_parse(child, classes, seen, level + 1) for child in raw["children"])
        below = tuple(sorted(chain.from_iterable(child.classes for child in children)))
        return Tree(below, children, float(distance), synset)
    own = []
    for entry in raw["classes"]:
        i, name = entry["id"], entry["name"]
        if type(i) is not int or not 0 <= i < len(classes) or classes[i] != name:
            expected = repr(classes[i]) if type(i) is int and 0 <= i < len(classes) else "none"
            raise StorageError(f"class {i!r:.20} is called {name!r:.80} in the tree, but is {expected}")
        if i in seen:
            raise StorageError(f"class {name!r} is in the tree twice")
        seen.add(i)
        own.append(i)
    return Tree(tuple(sorted(own)), (), float(distance), synset)


def newick(tree: Tree, classes: tuple[str, ...]) -> str:
    """The tree in one line, with the synsets of inner nodes and lengths of branches, the differences of distances; the
    classes of a leaf of several are its children. Names are quoted where the format asks for it. Raises UsageError."""
    _check_names(tree, classes)
    return _newick(tree, classes) + ";"


def _newick(node: Tree, classes: tuple[str, ...]) -> str:
    if len(node.classes) == 1:
        return _quoted(classes[node.classes[0]])
    below = [f"{_newick(child, classes)}:{node.distance - child.distance:.9g}" for child in node.children]
    below = below or [f"{_quoted(classes[i])}:{node.distance:.9g}" for i in node.classes]
    return f"({','.join(below)}){_quoted(node.synset) if node.synset else ''}"


def _quoted(name: str) -> str:
    """An unquoted underscore would be a space."""
    plain = re.fullmatch(r"[A-Za-z0-9.+-]+", name)
    return name if plain else "'" + " ".join(name.split()).replace("'", "''") + "'"


def draw_tree(tree: Tree, classes: tuple[str, ...], path: Path, glosses: Mapping[str, str] | None = None) -> None:
    """A dendrogram (.png, .svg) with the root at the left, the names of classes at the right, of synsets at nodes, and
    after a class what `glosses` says of its leaf's synset. Raises UsageError, StorageError."""
    _check_names(tree, classes)
    pyplot = load_pyplot()
    order = [i for leaf in tree.leaves() for i in leaf.classes]
    row = {i: place for place, i in enumerate(order)}
    synset = {i: leaf.synset for leaf in tree.leaves() for i in leaf.classes if len(leaf.classes) == 1}
    middle: dict[tuple[int, ...], float] = {(i,): float(row[i]) for i in order}
    across: list[tuple[float, float, float]] = []  # row, from, to
    down: list[tuple[float, float, float]] = []  # distance, from, to
    labels: list[tuple[float, float, str]] = []
    for node in reversed(tree.nodes()):
        if len(node.classes) == 1:
            continue
        ends = [(middle[c.classes], c.distance) for c in node.children] or [(row[i], 0.0) for i in node.classes]
        rows = [at for at, _ in ends]
        middle[node.classes] = (min(rows) + max(rows)) / 2
        across += [(at, node.distance, low) for at, low in ends]
        down.append((node.distance, min(rows), max(rows)))
        if node.synset:
            labels.append((node.distance, middle[node.classes], node.synset))
    top = tree.distance or 1.0
    figure, axis = pyplot.subplots(figsize=(9, min(1 + 0.17 * len(order), _MOST_INCHES)))
    if down:
        axis.hlines(*zip(*across, strict=True), color="#2468c8", lw=1)
        axis.vlines(*zip(*down, strict=True), color="#2468c8", lw=1)
    for at, line, text in labels:
        axis.text(at + 0.005 * top, line, text, size=5.5, color="#555", ha="right", va="bottom", parse_math=False)
    for i in order:
        said = " ".join(classes[i].split())
        more = (glosses or {}).get(synset.get(i, ""), "")
        said += f": {more[:57]}..." if len(more) > 60 else f": {more}" if more else ""
        axis.text(-0.01 * top, row[i], said, size=7.5, ha="left", va="center", parse_math=False)
    axis.set(xlim=(top * 1.1, 0), ylim=(len(order) - 0.5, -0.5), xlabel="distance", yticks=[])
    axis.spines[["left", "right", "top"]].set_visible(False)
    save_figure(pyplot, figure, path)
