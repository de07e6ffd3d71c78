"""Trees of classes: each class in one leaf whatever is done to them, files that come back, WordNet's as it is."""

import json
import random
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import cophenet, linkage
from scipy.spatial.distance import squareform

from thresher.errors import StorageError, UsageError
from thresher.vision.coherence import cophenetic
from thresher.vision.hierarchy import (
    MOST_LEVELS,
    Tree,
    agglomerate,
    cut,
    draw_tree,
    groups_of,
    limit,
    newick,
    random_tree,
    read_tree,
    semantic_tree,
    write_tree,
)
from thresher.vision.wordnet import WORDNET, find_synsets, open_wordnet

NAMES = ("cat", "dog", "T-shirt/top", "it's (odd)", "gym_shoe", "a, b", "Ä;:", "$x$ [y]", "z", "ten", "el", "tw")


@pytest.fixture(scope="module")
def wordnet():
    if not (WORDNET / "data.noun").is_file():
        pytest.skip("Debian's wordnet-base is not there")
    return open_wordnet()


def random_distances(count, seed):
    points = np.random.default_rng(seed).normal(size=(count, 3))
    return np.sqrt(((points[:, None] - points) ** 2).sum(2))


@st.composite
def trees(draw, most=12):
    """Binary ones, some with nodes of many children or leaves of many classes."""
    count = draw(st.integers(1, most))
    seed = draw(st.integers(0, 999))
    distance = random_distances(count, seed)
    tree = agglomerate(np.round(distance) if seed % 2 else distance)  # of whole numbers many are equal
    return limit(tree, draw(st.integers(1, 4)))


def check(tree, classes):
    """Each class in exactly one leaf; children share out their parents' classes and are not farther."""
    below = [i for leaf in tree.leaves() for i in leaf.classes]
    assert sorted(below) == list(classes)
    for node in tree.nodes():
        assert len(node.children) != 1
        assert all(child.distance <= node.distance for child in node.children)
        if node.children:
            assert sorted(i for child in node.children for i in child.classes) == list(node.classes)


LEAVES = tuple(Tree((i,)) for i in range(5))


def test_a_tree_is_asked():
    inner = Tree((1, 3), (LEAVES[1], LEAVES[3]), 0.5, "cat.n.01")
    tree = Tree((0, 1, 3, 4), (LEAVES[4], inner, LEAVES[0]), 1.0)
    assert tree.nodes() == [tree, LEAVES[4], inner, LEAVES[1], LEAVES[3], LEAVES[0]]
    assert groups_of(tree) == [(4,), (1,), (3,), (0,)]
    assert tree.lowest((3, 1)) is inner
    assert tree.lowest([3]) == LEAVES[3]
    assert tree.lowest((1, 0)) is tree
    assert (tree.levels, inner.levels, LEAVES[0].levels) == (3, 2, 1)
    for classes in ((), (2,), (0, 9)):
        with pytest.raises(UsageError, match="not all in a tree"):
            tree.lowest(classes)


@pytest.mark.parametrize(
    "made",
    [
        lambda: Tree(()),
        lambda: Tree((1, 0)),
        lambda: Tree((0, 0)),
        lambda: Tree((-1, 0)),
        lambda: Tree((0,), (LEAVES[0],)),
        lambda: Tree((0, 1, 2), LEAVES[:2]),
        lambda: Tree((0,), LEAVES[:2]),
        lambda: Tree((0, 1), (LEAVES[0], LEAVES[0])),
        lambda: Tree((0, 1), LEAVES[:2], -1.0),
        lambda: Tree((0, 1), LEAVES[:2], float("nan")),
        lambda: Tree((0, 1), LEAVES[:2], float("inf")),
        lambda: Tree((0,), (), 1.0),
        lambda: Tree((0, 1, 2), (Tree((0, 1), LEAVES[:2], 2.0), LEAVES[2]), 1.0),
    ],
)
def test_trees_that_are_none(made):
    with pytest.raises(UsageError, match="classes of a tree|children are|a distance is"):
        made()


@settings(max_examples=60)
@given(st.integers(1, 30), st.integers(0, 999))
def test_agglomerate_is_scipys_average_linkage(count, seed):
    distance = random_distances(count, seed)
    tree = agglomerate(distance)
    check(tree, range(count))
    assert all(len(leaf.classes) == 1 for leaf in tree.leaves())
    assert len(tree.nodes()) == 2 * count - 1
    if count > 1:
        theirs = squareform(cophenet(linkage(squareform(distance, checks=False), "average")))
        assert np.abs(cophenetic(tree) - theirs).max() < 1e-9


@pytest.mark.parametrize(
    "distance",
    [
        np.zeros((0, 0)),
        np.zeros(4),
        np.zeros((2, 3)),
        np.array([[0, 1], [2, 0.0]]),
        np.array([[0, -1], [-1, 0.0]]),
        np.array([[0, np.nan], [np.nan, 0.0]]),
        np.array([[0, np.inf], [np.inf, 0.0]]),
        np.array([[1, 1], [1, 1.0]]),
    ],
)
def test_distances_that_are_none(distance):
    with pytest.raises(UsageError, match="distances are"):
        agglomerate(distance)


def test_a_chain_that_is_too_deep():
    x = 2.0 ** np.arange(MOST_LEVELS + 5)
    distance = np.abs(x[:, None] - x)
    assert agglomerate(distance[:MOST_LEVELS, :MOST_LEVELS]).levels == MOST_LEVELS
    with pytest.raises(UsageError, match="levels"):
        agglomerate(distance)


@settings(max_examples=100)
@given(trees(), st.data())
def test_cutting_and_limiting_keep_every_class(tree, data):
    whole = len(tree.leaves())
    groups = data.draw(st.integers(1, whole))
    short = cut(tree, groups)
    check(short, tree.classes)
    assert short.levels <= 2
    assert groups <= len(short.leaves()) <= whole
    nodes = {node.classes: node for node in tree.nodes()}
    kept = [nodes[leaf.classes] for leaf in short.leaves()]  # all nodes of the tree
    if all(len(node.children) in (0, 2) for node in tree.nodes()):
        assert len(kept) == groups
    split = [n for n in tree.nodes() if not any(set(n.classes) <= set(k.classes) for k in kept)]
    assert min((n.distance for n in split), default=np.inf) >= max((k.distance for k in kept if k.children), default=0)
    size = data.draw(st.integers(1, len(tree.classes)))
    limited = limit(tree, size)
    check(limited, tree.classes)
    for node in limited.nodes():
        assert bool(node.children) == (len(node.classes) > size and bool(nodes[node.classes].children))


def test_a_node_of_many_children_is_split_whole():
    wide = Tree((1, 2, 3), LEAVES[1:4], 1.0)
    tree = Tree((0, 1, 2, 3), (LEAVES[0], wide), 2.0)
    assert groups_of(cut(tree, 2)) == [(0,), (1, 2, 3)]
    assert groups_of(cut(tree, 3)) == groups_of(cut(tree, 4)) == [(0,), (1,), (2,), (3,)]
    for groups in (0, 5):
        with pytest.raises(UsageError, match="1 to 4"):
            cut(tree, groups)
    with pytest.raises(UsageError, match="at least one"):
        limit(tree, 0)


@settings(max_examples=60)
@given(trees(), st.integers(0, 99))
def test_a_random_tree_has_the_shape(tree, seed):
    def shape(node):
        return len(node.classes), node.distance, [shape(child) for child in node.children]

    other = random_tree(tree, np.random.default_rng(seed))
    check(other, tree.classes)
    assert shape(other) == shape(tree)
    assert other == random_tree(tree, np.random.default_rng(seed))


def test_random_trees_differ():
    tree = agglomerate(random_distances(12, 0))
    found = {random_tree(tree, np.random.default_rng(seed)) for seed in range(20)}
    assert len(found) == 20


@settings(max_examples=60)
@given(trees())
def test_a_file_brings_back_the_tree(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("tree") / "tree.json"
    names = NAMES[: len(tree.classes)]
    write_tree(tree, names, path)
    assert read_tree(path, names) == tree
    assert list(path.parent.iterdir()) == [path]


def test_the_deepest_tree_comes_back(tmp_path):
    x = 2.0 ** np.arange(MOST_LEVELS)
    tree = agglomerate(np.abs(x[:, None] - x))
    names = tuple(f"class {i}" for i in range(MOST_LEVELS))
    write_tree(tree, names, tmp_path / "t.json")
    assert read_tree(tmp_path / "t.json", names) == tree
    assert hash(tree) == hash(read_tree(tmp_path / "t.json", names))
    assert newick(tree, names).count("(") == MOST_LEVELS - 1
    assert "Tree" in repr(tree)


def test_files_are_readable(tmp_path):
    tree = Tree((0, 1, 2), (Tree((0, 2), (), 0.5, "pet.n.01"), Tree((1,), synset="shoe.n.01")), 1.0)
    write_tree(tree, ("cat", "shoe", "dog"), tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text()) == {
        "classes": 3,
        "tree": {
            "synset": "",
            "distance": 1.0,
            "children": [
                {
                    "synset": "pet.n.01",
                    "distance": 0.5,
                    "classes": [{"id": 0, "name": "cat"}, {"id": 2, "name": "dog"}],
                },
                {"synset": "shoe.n.01", "distance": 0.0, "classes": [{"id": 1, "name": "shoe"}]},
            ],
        },
    }
    with pytest.raises(UsageError, match="is not one of the 4 classes"):
        write_tree(tree, ("cat", "shoe", "dog", "cow"), tmp_path / "u.json")
    with pytest.raises(StorageError, match="cannot be written"):
        write_tree(tree, ("cat", "shoe", "dog"), tmp_path / "none" / "t.json")


def leaf(i, name):
    return {"synset": "", "distance": 0, "classes": [{"id": i, "name": name}]}


def node(*children, **more):
    return {"synset": "", "distance": 1, "children": list(children)} | more


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (node(leaf(0, "cat"), leaf(1, "dog")), "missing from the tree: 'cow'"),
        (node(leaf(0, "cat"), leaf(1, "dog"), leaf(2, "cow"), leaf(0, "cat")), "'cat' is in the tree twice"),
        (node(leaf(0, "cat"), leaf(1, "dog"), leaf(2, "horse")), "class 2 is called 'horse' in the tree, but is 'cow'"),
        (node(leaf(0, "cat"), leaf(1, "dog"), leaf(3, "cow")), "class 3"),
        (node(leaf(0, "cat"), leaf(1, "dog"), leaf(True, "cow")), "class True"),
        (node(leaf(0, "cat"), leaf(1, "dog"), leaf(-1, "cow")), "class -1"),
        (node(node(leaf(0, "cat"), leaf(1, "dog"), distance=2), leaf(2, "cow")), "below a child"),
        (node(node(leaf(0, "cat"), leaf(1, "dog")), node(leaf(2, "cow"))), "two or more"),
        (node(leaf(0, "cat"), leaf(1, "dog"), leaf(2, "cow"), distance=float("nan")), "finite"),
        (node(leaf(0, "cat"), leaf(1, "dog"), leaf(2, "cow"), distance=10**400), "not a tree"),
        (node(leaf(0, "cat"), leaf(1, "dog"), leaf(2, "cow"), distance="1"), "a distance a number"),
        (node(leaf(0, "cat"), leaf(1, "dog"), leaf(2, "cow"), synset=None), "a synset is text"),
        ([], "not a tree"),
        (None, "not a tree"),
    ],
)
def test_files_of_other_trees(tmp_path, tree, message):
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"classes": 3, "tree": tree}))
    with pytest.raises(StorageError, match=message):
        read_tree(path, ("cat", "dog", "cow"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a tree"),
        (b"[" * 100_000, "not a tree"),
        (b'{"tree":' * 5000, "not a tree"),
        (b"\xff\xfe\xff", "not a tree"),
        (b'{"classes": 2, "tree": {}}', "a tree of 2 classes, and there are 3"),
        (b" " * ((1 << 24) + 1), "MiB"),
        (
            b'{"classes": 3, "tree": {"synset": "", "distance": 1, "children": [' * 1 + b"1" * 5000 + b"]}}",
            "not a tree",
        ),
        (None, "cannot be read"),
    ],
)
def test_files_that_are_no_trees(tmp_path, content, message):
    path = tmp_path / "t.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StorageError, match=message):
        read_tree(path, ("cat", "dog", "cow"))


def test_a_file_of_too_many_levels(tmp_path):
    tree = leaf(0, "a")
    for _ in range(MOST_LEVELS):
        tree = node(tree, leaf(1, "b"))
    (tmp_path / "t.json").write_text(json.dumps({"classes": 2, "tree": tree}))
    with pytest.raises(StorageError, match="levels"):
        read_tree(tmp_path / "t.json", ("a", "b"))


def test_damaged_files(tmp_path):
    """Bytes changed, cut out or put in: a StorageError or a tree of the classes, nothing else."""
    tree = limit(agglomerate(random_distances(8, 1)), 2)
    path = tmp_path / "t.json"
    write_tree(tree, NAMES[:8], path)
    whole = path.read_bytes()
    drawn = random.Random(0)
    refused = 0
    for _ in range(1500):
        data = bytearray(whole)
        for _ in range(drawn.randint(1, 3)):
            at = drawn.randrange(len(data))
            kind = drawn.random()
            if kind < 0.5:
                data[at] = drawn.choice(b'0123456789{}[]",:-eE\x00\xff ntf')
            elif kind < 0.75:
                del data[at : at + drawn.randint(1, 40)]
            else:
                data[at:at] = data[drawn.randrange(len(data)) :][: drawn.randint(1, 60)]
        path.write_bytes(data)
        try:
            check(read_tree(path, NAMES[:8]), range(8))
        except StorageError:
            refused += 1
    assert refused > 700


def parse_newick(text):
    """(name, length, children) of all nodes."""
    at = 0

    def name():
        nonlocal at
        if found := re.match(r"'((?:[^']|'')*)'", text[at:]):
            at += found.end()
            return found[1].replace("''", "'")
        found = re.match(r"[^\s()\[\]':;,_]*", text[at:])
        at += found.end()
        return found[0]

    def one():
        nonlocal at
        children = []
        if text[at] == "(":
            while text[at] in "(,":
                at += 1
                children.append(one())
            assert text[at] == ")"
            at += 1
        label, length = name(), 0.0
        if text[at] == ":":
            found = re.match(r":([0-9.e+-]+)", text[at:])
            at += found.end()
            length = float(found[1])
        return label, length, children

    parsed = one()
    assert text[at:] == ";"
    return parsed


@settings(max_examples=60)
@given(trees())
def test_newick_says_the_same(tree):
    names = NAMES[: len(tree.classes)]
    joined = np.zeros((len(names), len(names)))

    def follow(parsed):
        """Classes below and the distance of a node, from the lengths of its branches."""
        label, _, children = parsed
        if not children:
            return [names.index(label)], 0.0
        parts = [(follow(child), child[1]) for child in children]
        heights = [height + length for (_, height), length in parts]
        assert max(heights) - min(heights) < 1e-6
        for k, ((first, _), _) in enumerate(parts):
            for (second, _), _ in parts[:k]:
                for i in first:
                    for j in second:
                        joined[i, j] = joined[j, i] = heights[0]
        return [i for (below, _), _ in parts for i in below], heights[0]

    below, height = follow(parse_newick(newick(tree, names)))
    assert sorted(below) == list(tree.classes)
    assert height == pytest.approx(tree.distance, abs=1e-6)
    assert np.abs(joined - cophenetic(tree)).max() < 1e-6


def test_newick_golden():
    tree = Tree((0, 1, 2), (Tree((0, 2), (), 0.5, "gym_shoe.n.01"), LEAVES[1]), 1.0, "top.n.01")
    assert newick(tree, ("it's", "b", "a b")) == "(('it''s':0.5,'a b':0.5)'gym_shoe.n.01':0.5,b:1)top.n.01;"
    assert newick(LEAVES[0], ("b",)) == "b;"


def test_the_tree_of_wordnet(wordnet):
    names = ("Shirt", "bear", "cat", "Sneaker", "cow", "dog", "Sandal", "sheep")
    tree = semantic_tree(wordnet, find_synsets(wordnet, names))
    check(tree, range(8))

    def said(node):
        below = [said(child) for child in node.children]
        return (node.synset, *below) if below else node.synset

    assert said(tree) == (
        "whole.n.02",
        ("covering.n.02", "shirt.n.01", ("shoe.n.01", "gym_shoe.n.01", "sandal.n.01")),
        (
            "placental.n.01",
            ("carnivore.n.01", "bear.n.01", "cat.n.01", "dog.n.01"),
            ("bovid.n.01", "cow.n.01", "sheep.n.01"),
        ),
    )
    deepest = 18  # cow
    assert [tree.distance, tree.children[1].distance] == pytest.approx([1 - 4 / deepest, 1 - 11 / deepest])


def test_a_hypernym_is_chosen_for_what_it_shares(wordnet):
    """dog is a canine and a domestic animal: beside a cat the one, beside animals that are only domestic the other."""
    near = semantic_tree(wordnet, find_synsets(wordnet, ("dog", "cat", "Shirt"), None))
    assert near.lowest((0, 1)).synset == "carnivore.n.01"
    chosen = {"tame": "stocker.n.01", "pet": "feeder.n.01"}
    tame = semantic_tree(wordnet, find_synsets(wordnet, ("dog", "tame", "pet"), chosen))
    assert tame.synset == "domestic_animal.n.01"
    assert {s.name() for s in wordnet.synset("dog.n.01").hypernyms()} == {"canine.n.02", "domestic_animal.n.01"}


def test_a_class_above_others_is_a_leaf_beside_them(wordnet):
    tree = semantic_tree(
        wordnet, find_synsets(wordnet, ("poodle", "dog", "dalmatian", "shoe"), {"dalmatian": "dalmatian.n.02"})
    )
    dogs = tree.lowest((0, 1, 2))
    assert dogs.synset == "dog.n.01"
    assert [(n.classes, n.synset) for n in dogs.children] == [
        ((0,), "poodle.n.01"),
        ((1,), "dog.n.01"),
        ((2,), "dalmatian.n.02"),
    ]
    assert dogs.distance == pytest.approx(1 - 14 / 15)
    assert semantic_tree(wordnet, find_synsets(wordnet, ("dog",))) == Tree((0,), synset="dog.n.01")
    with pytest.raises(UsageError, match="at least one"):
        semantic_tree(wordnet, ())


def test_trees_of_many_nouns(wordnet):
    """Whatever nouns: a tree, the same for classes in another order; nodes subsume what is below them."""
    words = sorted(w for w in wordnet.all_lemma_names("n") if w.isalpha())
    for seed in range(10):
        drawn = random.Random(seed)
        synsets = tuple(dict.fromkeys(wordnet.synsets(w, "n")[0] for w in drawn.sample(words, 40)))
        tree = semantic_tree(wordnet, synsets)
        check(tree, range(len(synsets)))
        for part in tree.nodes():
            subsumer = wordnet.synset(part.synset)
            for i in part.classes:
                assert any(subsumer in path for path in synsets[i].hypernym_paths())
        order = drawn.sample(range(len(synsets)), len(synsets))
        other = semantic_tree(wordnet, tuple(synsets[i] for i in order))
        theirs = {(n.synset, frozenset(order[i] for i in n.classes)) for n in other.nodes()}
        assert theirs == {(n.synset, frozenset(n.classes)) for n in tree.nodes()}


@pytest.mark.parametrize("count", [1, 2, 12, 300])
def test_drawings(tmp_path, count):
    names = tuple(f"{NAMES[i % 12]} {i}" for i in range(count))
    tree = limit(agglomerate(random_distances(count, 2)), 3)
    draw_tree(tree, names, tmp_path / "t.svg")
    root = ElementTree.parse(tmp_path / "t.svg").getroot()
    assert float(root.get("height").removesuffix("pt")) > 9 * count
    if count == 12:
        draw_tree(tree, names, tmp_path / "t.png", {"": "no words"})
        assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_drawings_name_classes_nodes_and_glosses(tmp_path):
    from matplotlib import pyplot

    tree = Tree((0, 1), (Tree((0,), synset="cat.n.01"), Tree((1,), synset="dog.n.01")), 0.5, "carnivore.n.01")
    with pyplot.rc_context({"svg.fonttype": "none"}):
        draw_tree(tree, ("my cat", "$dog$"), tmp_path / "t.svg", {"cat.n.01": "feline " * 20})
    text = (tmp_path / "t.svg").read_text()
    assert all(word in text for word in ("my cat: feline feline", "...", "$dog$", "carnivore.n.01"))
    with pytest.raises(StorageError, match="cannot be written"):
        draw_tree(tree, ("a", "b"), tmp_path / "none" / "t.png")
    with pytest.raises(UsageError, match="2 classes"):
        draw_tree(LEAVES[1], ("a", "b"), tmp_path / "t.png")
