"""A network along a tree: what it computes and costs, and what becomes of its folder, whole or damaged."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")

from thresher.errors import ModelError, StorageError
from thresher.vision.data import Images
from thresher.vision.dissect import Settings, dissect
from thresher.vision.dissected import (
    PARTS,
    TREE,
    Router,
    expected_macs,
    keyed,
    leaf_classifier,
    leaf_name,
    load_dissected,
    piece_between,
    save_dissected,
)
from thresher.vision.hierarchy import Tree, write_tree
from thresher.vision.layers import count_macs, count_parameters
from thresher.vision.models import (
    DESCRIPTION,
    WEIGHTS,
    Classifier,
    Description,
    build,
    load_classifier,
    new_classifier,
    save_classifier,
)
from thresher.vision.nets import NETS, VGG, ResNet
from thresher.vision.pieces import cut_points

CLASSES = ("T-shirt/top", "b", "c", "d", "e", "f", "g")
# Columns out of order, leaves of one class at two depths, three levels below the root.
DEEP = Tree(
    tuple(range(7)),
    (
        Tree((0, 2, 4, 5, 6), (Tree((2,)), Tree((0, 4, 5, 6), (Tree((0, 6)), Tree((4, 5), synset="dog.n.01"))))),
        Tree((3,)),
        Tree((1,)),
    ),
)
FLAT = Tree(tuple(range(7)), (Tree((1, 3, 5, 6)), Tree((0, 2)), Tree((4,))))


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    pass


@pytest.fixture(scope="module", autouse=True)
def thin_nets():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NETS, "thin-resnet", lambda classes, channels: ResNet(classes, channels, (8, 12, 16)))
        patch.setitem(NETS, "thin-vgg", lambda classes, channels: VGG(classes, channels, (8, 8, 12)))
        yield


def random_images(count):
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 1, 12, 12), generator=g, dtype=torch.uint8)
    return Images(pixels, torch.arange(count) % 7, CLASSES)


FEW = random_images(14)
PIXELS = random_images(40).pixels.float() / 255
WHOLES = {
    "resnet": Description("net:thin-resnet", CLASSES, (1, 12, 12)),
    "vgg": Description("net:thin-vgg", CLASSES, (1, 12, 12)),
    "normalized": Description("net:thin-resnet", CLASSES, (1, 12, 12), mean=(0.4,), std=(0.3,)),
}


def make(name, tree, overlap, tmp_path):
    torch.set_num_threads(1)
    whole = Classifier(build(WHOLES[name], tmp_path, None), WHOLES[name])
    awaken(whole.module)
    net, parts = dissect(whole, tree, FEW, FEW, Settings(0.9, 0.6, 0.6, overlap, multiple=3, images=2))
    awaken(net)
    return whole, net, parts


@torch.no_grad()
def awaken(net):
    """Batch norms that have seen something; routers and leaves that give images to everyone."""
    g = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=g)
            module.running_var.uniform_(0.5, 2, generator=g)
    for router in getattr(net, "routers", {}).values():
        router.head.weight.normal_(0, 30, generator=g)
    net.eval()
    for key, router in getattr(net, "routers", {}).items():
        router.head.bias.zero_()
        router.head.bias -= router(net.leaf(key)(PIXELS)).mean(0)
    for key in set(getattr(net, "pieces", {})) - set(getattr(net, "routers", {})):
        *_, head = (m for m in net.pieces[key].modules() if isinstance(m, nn.Linear))
        head.bias -= net.leaf(key)(PIXELS).mean(0)


@pytest.fixture(scope="module", params=[("resnet", 0.0), ("resnet", 1.0), ("vgg", 0.8), ("normalized", 0.8)])
def made(request, tmp_path_factory):
    """A whole, what became of it, and its parts. An overlap of 1 makes pieces that do nothing."""
    return make(request.param[0], DEEP, request.param[1], tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    return make("resnet", FLAT, 1.0, tmp_path_factory.mktemp("flat"))


def softmax(x):
    x = np.exp(x - x.max(1, keepdims=True))
    return x / x.sum(1, keepdims=True)


def outputs(net, key, x):
    """Of a node's router or of its logits, in float64."""
    return (net.routers[key](x) if key in net.routers else x).double().numpy()


@torch.no_grad()
def test_all_leaves_side_by_side(made):
    whole, net, _ = made
    given, expected = net(PIXELS), torch.full((40, 7), float("nan"))
    for key, node in keyed(DEEP):
        if not node.children:
            for i, c in enumerate(node.classes):
                expected[:, c] = net.leaf(key)(PIXELS)[:, i]
    assert torch.allclose(given, expected, atol=1e-5)
    assert given.shape == whole.module(PIXELS).shape


@torch.no_grad()
def test_soft_multiplies_the_rates_along_the_way(made):
    _, net, _ = made
    given = net.soft(PIXELS).exp().double().numpy()
    features = {"root": PIXELS}
    rates = {"root": np.ones(len(PIXELS))}
    expected = np.full((len(PIXELS), 7), np.nan)
    for key, node in keyed(DEEP):
        if len(node.classes) == 1:
            expected[:, node.classes[0]] = rates[key]
            continue
        x = net.pieces[key](features[key])
        below = softmax(outputs(net, key, x))
        for i in range(below.shape[1]):
            if node.children:
                features[f"{key}_{i}"], rates[f"{key}_{i}"] = x, rates[key] * below[:, i]
            else:
                expected[:, node.classes[i]] = rates[key] * below[:, i]
    assert np.allclose(expected.sum(1), 1)
    assert np.allclose(given, expected, atol=1e-6)


@pytest.mark.parametrize("least", [0.0, 0.2, 0.35, 1.0])
@torch.no_grad()
def test_routing_runs_the_likely_children(made, least):
    _, net, _ = made
    expected, counts = torch.full((40, 7), -torch.inf), {}
    for n, image in enumerate(PIXELS):
        waiting = [("root", DEEP, image[None], 1.0)]
        while waiting:
            key, node, x, way = waiting.pop()
            counts[key] = counts.get(key, 0) + 1
            x = net.pieces[key](x)
            if not node.children:
                expected[n, list(node.classes)] = x[0]
                continue
            chances = way * net.routers[key](x)[0].softmax(0)
            for i, child in enumerate(node.children):
                if chances[i] >= least or i == int(chances.argmax()):
                    waiting.append((f"{key}_{i}", child, x, float(chances[i])))
    net.train()
    try:
        given, seen = net.route(PIXELS, least)
        assert all(module.training for module in net.modules())  # as it was
    finally:
        net.eval()
    assert torch.equal(given.isinf(), expected.isinf())
    assert torch.allclose(given, expected, atol=1e-5)
    assert seen == counts
    assert seen["root"] == 40
    if least == 0:
        assert torch.allclose(given, net(PIXELS), atol=1e-5)
    if least == 1:  # images came everywhere, each to one leaf
        assert len(set(given.argmax(1).tolist())) >= 5
        assert sum(seen[key] for key, node in keyed(DEEP) if not node.children) == 40


def test_routing_of_nothing(made):
    given, seen = made[1].route(PIXELS[:0])
    assert given.shape == (0, 7)
    assert not seen


def test_expected_costs_are_those_of_running_each_image(made):
    whole, net, _ = made

    class Routed(nn.Module):
        def forward(self, images):
            return net.route(images)[0]

    _, seen = net.route(PIXELS)
    each = [count_macs(Routed(), image[None]) for image in PIXELS]
    assert min(each) < max(each)
    assert expected_macs(net, whole.example, seen, len(PIXELS)) == pytest.approx(sum(each) / len(each), rel=1e-9)


def test_expected_costs_by_hand(flat):
    """A stem of 8 channels of 6 x 6, a router of 32 channels of 3 x 3 and 64 of 2 x 2."""
    whole, net, parts = flat
    stem = 6 * 6 * 8 * 9
    router = 3 * 3 * 32 * 8 * 9 + 2 * 2 * 64 * 32 * 9 + 64 * 3
    assert parts["root"].cut == "stem_1"
    leaves = [parts[key].macs - stem for key in ("root_0", "root_1")]
    assert min(leaves) > 0
    seen = {"root": 10, "root_0": 5, "root_1": 2}
    expected = stem + router + 0.5 * leaves[0] + 0.2 * leaves[1]
    assert expected_macs(net, whole.example, seen, 10) == pytest.approx(expected)
    assert expected_macs(net, whole.example, {"root": 10}, 10) == pytest.approx(stem + router)


def test_nodes_and_ways(made):
    _, net, parts = made
    expected = ["root", "root_0", "root_0_0", "root_0_1", "root_0_1_0", "root_0_1_1", "root_1", "root_2"]
    assert [key for key, _ in keyed(DEEP)] == expected
    assert net.way("root_0_1_1") == ["root", "root_0", "root_0_1", "root_0_1_1"]
    leaf = net.leaf("root_0_1_1")
    assert [p is net.pieces[k] for p, k in zip(leaf, net.way("root_0_1_1"), strict=True)] == [True] * 4
    assert list(parts) == ["root", "root_0", "root_0_1", "root_0_1_0", "root_0_1_1"]


def test_many_nodes_and_children():
    """Keys of ten children and more are told apart."""
    tree = Tree(tuple(range(24)), tuple(Tree((2 * i, 2 * i + 1)) for i in range(12)))
    keys = [key for key, _ in keyed(tree)]
    assert keys[2] == "root_1"
    assert keys[-1] == "root_11"


@torch.no_grad()
def test_saved_and_loaded(made, tmp_path):
    whole, net, parts = made
    save_dissected(net, whole.about, parts, tmp_path / "new" / "folder")
    again, about, loaded = load_dissected(tmp_path / "new" / "folder")
    assert (again.tree, about, loaded) == (DEEP, whole.about, parts)
    assert not again.training
    assert torch.allclose(again(PIXELS), net(PIXELS), atol=1e-5)
    assert torch.equal(again.route(PIXELS)[0], net.route(PIXELS)[0])
    assert not list((tmp_path / "new" / "folder").glob(".part*"))


@torch.no_grad()
def test_leaves_are_classifiers(made, tmp_path):
    whole, net, parts = made
    fresh = build(whole.about, tmp_path, None)  # its weights do not matter
    before = {n: t.clone() for n, t in fresh.state_dict().items()}
    for key in ("root_0_1_0", "root_0_1_1"):
        leaf = leaf_classifier(net, whole.about, parts, key, fresh)
        expected = net.leaf(key)(PIXELS)
        assert torch.allclose(leaf.module(PIXELS), expected, atol=1e-5)
        assert leaf.about.classes == tuple(CLASSES[i] for i in parts[key].classes)
        assert leaf.about.pruned == parts[key].kept
        assert leaf.about.history["macs"] == parts[key].macs == count_macs(leaf.module, whole.example)
        assert leaf.about.history["parameters"] == parts[key].parameters == count_parameters(leaf.module)
        save_classifier(leaf, tmp_path / key)
        loaded = load_classifier(str(tmp_path / key))
        assert loaded.about == leaf.about
        assert torch.allclose(loaded.module(PIXELS), expected, atol=1e-5)
    assert all(torch.equal(t, before[n]) for n, t in fresh.state_dict().items())


def test_pieces_between_cuts():
    net = new_classifier("thin-resnet", CLASSES, (1, 12, 12)).module.eval()
    first, second = (c.name for c in cut_points(net, PIXELS[:1])[:2])
    with torch.no_grad():
        stem = piece_between(net, "", first)(PIXELS)
        block = piece_between(net, first, second)(stem)
        assert torch.equal(block, piece_between(net, "", second)(PIXELS))
        assert torch.equal(piece_between(net, second, "")(block), net(PIXELS))
        assert torch.equal(piece_between(net, "", "")(PIXELS), net(PIXELS))
    assert isinstance(piece_between(net, second, second), nn.Identity)
    for start, end in ((second, first), ("nowhere", ""), ("", "nowhere")):
        with pytest.raises(ModelError, match="no point"):
            piece_between(net, start, end)


def test_a_router_gives_a_number_for_each_child():
    router = Router(8, 5, width=4)
    assert router(torch.rand(3, 8, 7, 9)).shape == (3, 5)
    assert router.eval()(torch.rand(1, 8, 1, 1)).shape == (1, 5)


@pytest.fixture(scope="module")
def folder(flat, tmp_path_factory):
    whole, net, parts = flat
    path = tmp_path_factory.mktemp("saved")
    save_dissected(net, whole.about, parts, path)
    return path


@pytest.fixture
def copied(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copied")
    return tmp_path / "copied"


def change(path, edit):
    said = json.loads(path.read_text())
    edit(said)
    path.write_text(json.dumps(said))


def in_part(key, **changes):
    return lambda said: said[key].update(changes)


def in_kept(key, **changes):
    return lambda said: said[key]["kept"].update({n.replace("_", "."): c for n, c in changes.items()})


BAD_PARTS = {
    "another cut": in_part("root", cut="relu_1"),
    "a cut nowhere": in_part("root", cut="nowhere"),
    "a cut within a block": in_part("root", cut="blocks_1_first_0"),
    "a cut at the end": in_part("root", cut="output"),
    "a cut at the input": in_part("root", cut="images"),
    "a cut behind the head": in_part("root", cut="head_2"),
    "no cut": in_part("root", cut=""),
    "a leaf with a cut": in_part("root_0", cut="relu_3"),
    "negative channels": in_part("root", channels=-1),
    "other channels": in_part("root", channels=9),
    "huge channels": in_part("root", channels=10**12),
    "many channels": in_part("root", channels=2**17),
    "infinite channels": in_part("root", channels=float("inf")),
    "channels of no number": in_part("root", channels=float("nan")),
    "channels as a list": in_part("root", channels=[8]),
    "infinite costs": in_part("root_0", macs=float("inf")),
    "text for costs": in_part("root_0", parameters="many"),
    "other classes": in_part("root_1", classes=[0, 3]),
    "infinite classes": in_part("root_1", classes=[0, float("inf")]),
    "kept as a list": in_part("root_0", kept=[3]),
    "kept none": in_kept("root_0", blocks_2_first_0=0),
    "kept another number": in_kept("root_0", blocks_2_first_0=1),
    "kept too many": in_kept("root_0", blocks_2_first_0=17),
    "kept a huge number": in_kept("root_0", blocks_2_first_0=10**30),
    "kept a negative number": in_kept("root_0", blocks_2_first_0=-3),
    "kept infinitely many": in_kept("root_0", blocks_2_first_0=float("inf")),
    "kept of something else": in_kept("root_0", nowhere=3),
    "kept of the head": in_kept("root_0", head_2=3),
    "a group is missing": lambda said: said["root_0"]["kept"].popitem(),
    "a part is missing": lambda said: said.pop("root_0"),
    "the root is missing": lambda said: said.pop("root"),
    "a part too many": lambda said: said.update(root_2=said["root_1"]),
    "a part is a list": lambda said: said.update(root_1=[1]),
    "an entry is missing": lambda said: said["root_1"].pop("share"),
}


@pytest.mark.parametrize("name", BAD_PARTS)
def test_parts_that_lie(copied, name):
    change(copied / PARTS, BAD_PARTS[name])
    with pytest.raises((ModelError, StorageError)):
        load_dissected(copied)


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"{", b"\xff\xfe", b"[" * 200_000, b"null", b'{"root": null}'])
@pytest.mark.parametrize("file", [PARTS, TREE, DESCRIPTION, WEIGHTS])
def test_files_of_something_else(copied, file, content):
    (copied / file).write_bytes(content)
    with pytest.raises((ModelError, StorageError)):
        load_dissected(copied)


@pytest.mark.parametrize("file", [PARTS, TREE, DESCRIPTION, WEIGHTS])
def test_files_that_are_missing(copied, file):
    (copied / file).unlink()
    with pytest.raises((ModelError, StorageError), match=file if file == PARTS else None):
        load_dissected(copied)
    (copied / file).mkdir()
    with pytest.raises((ModelError, StorageError)):
        load_dissected(copied)


@pytest.mark.parametrize(
    "changes",
    [{"shape": [1, 1, 1], "source": "net:thin-vgg"}, {"shape": [1, float("inf"), 12]}, {"shape": [3, 12, 12]},
     {"source": "net:thin-vgg"}, {"source": "net:nothing"}, {"source": "os:getcwd"}, {"source": "transformers"},
     {"classes": ["a", "b"]}, {"classes": list("abcdefg")}, {"mean": [0.1]}, {"mean": [0.1, 0.2], "std": [1, 1]},
     {"pruned": {"stem.0.0": float("inf")}}, {"format": 9}],
)  # fmt: skip
def test_descriptions_that_lie(copied, changes):
    change(copied / DESCRIPTION, lambda said: said.update(changes))
    with pytest.raises((ModelError, StorageError)):
        load_dissected(copied)


def test_another_tree_is_refused(copied):
    write_tree(Tree(FLAT.classes, (Tree((0, 2)), Tree((1, 3, 5, 6)), Tree((4,)))), CLASSES, copied / TREE)
    with pytest.raises(ModelError, match="not those of its tree"):
        load_dissected(copied)
    write_tree(Tree(FLAT.classes, (*FLAT.children[:2], Tree((4,)))), CLASSES, copied / TREE)
    load_dissected(copied)


def test_weights_that_do_not_fit(copied):
    state = load_file(copied / WEIGHTS)
    name = "pieces.root_0.blocks.1.first.0.weight"
    for changed in (
        {n: t for n, t in state.items() if n != name},
        state | {name: state[name][:-1].clone()},
        state | {name: torch.full_like(state[name], float("nan"))},
        state | {"more": torch.zeros(1)},
    ):
        save_file(changed, copied / WEIGHTS)
        with pytest.raises(ModelError, match=WEIGHTS):
            load_dissected(copied)


def test_files_with_broken_bytes(copied):
    """It loads or says that it is damaged, whatever byte is another."""
    g = np.random.default_rng(0)
    failed = 0
    for file, most in ((PARTS, None), (TREE, None), (DESCRIPTION, None), (WEIGHTS, 2000)):
        whole = (copied / file).read_bytes()
        for _ in range(10):
            data = bytearray(whole)
            for at in g.integers(0, min(len(data), most or len(data)), 2):
                data[at] = g.integers(256)
            cut = len(data) if g.random() < 0.7 else int(g.integers(len(data)))
            (copied / file).write_bytes(data[:cut])
            try:
                load_dissected(copied)
            except (ModelError, StorageError):
                failed += 1
        (copied / file).write_bytes(whole)
    assert failed > 20
    load_dissected(copied)


def test_a_folder_that_cannot_be_written(flat, tmp_path):
    whole, net, parts = flat
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        save_dissected(net, whole.about, parts, tmp_path / "file")
    with pytest.raises(ModelError, match="thresher vision hierarchy"):
        load_dissected(tmp_path / "nowhere")


def test_leaves_whose_numbers_lie_are_refused(flat, tmp_path):
    whole, net, parts = flat
    leaf = leaf_classifier(net, whole.about, parts, "root_0", whole.module)
    for pruned in ({"nowhere": 3}, {"stem.0.0": 9}, {"stem.0.0": 0}, {"stem.0.0": 10**20}, {"blocks.2.first.0": 1}):
        save_classifier(Classifier(leaf.module, replace(leaf.about, pruned=pruned)), tmp_path)
        with pytest.raises(ModelError):
            load_classifier(str(tmp_path))


@pytest.mark.parametrize(
    ("key", "node", "name"),
    [
        ("root_0_1", Tree((4, 5), synset="domestic_dog.n.01"), "0.1-domestic-dog"),
        ("root_2", Tree((0, 1, 3, 5)), "2-t-shirt-top-b-d"),
        ("root_10", Tree((2,)), "10-c"),
    ],
)
def test_names_of_leaves(key, node, name):
    assert leaf_name(key, node, CLASSES) == name


def test_names_of_leaves_are_names_of_folders():
    classes = ("../../etc", "字", "", "a" * 300, "CON\0x\n")
    for i in range(5):
        name = leaf_name("root_3", Tree((i,)), classes)
        assert name.startswith("3-")
        assert 3 <= len(name) <= 60
        assert not set(name) - set("abcdefghijklmnopqrstuvwxyz0123456789-.")
    assert leaf_name("root_3", Tree((1,)), classes) == "3-leaf"
