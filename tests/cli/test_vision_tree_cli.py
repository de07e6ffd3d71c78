"""thresher vision hierarchy, extract and report as a user calls them, on pictures made here."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from command_line import call, fails
from PIL import Image

pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")

from thresher.vision.models import load_classifier, new_classifier, save_classifier
from thresher.vision.wordnet import WORDNET

SMALL = ("--threads", 1, "--batch", 32)
CLASSES = ("boot", "cat", "dog", "sandal")
needs_wordnet = pytest.mark.skipif(not WORDNET.is_dir(), reason="WordNet is not installed (wordnet-base)")


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    pass


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Shoes are rows or columns, animals light or dark squares."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    line = (np.arange(16) // 2 % 2) * 120
    square = np.pad(np.full((8, 8), 120), 4)
    kinds = {"boot": np.tile(line[:, None], 16), "sandal": np.tile(line, (16, 1)), "cat": square, "dog": 120 - square}
    for part, count in (("train", 60), ("test", 25)):
        for name, kind in kinds.items():
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = (kind + rng.integers(0, 100, (16, 16))).astype(np.uint8)
                Image.fromarray(np.stack([pixels] * 3, 2)).save(folder / part / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "teacher"
    torch.set_num_threads(1)
    done = call(
        *("vision", "train", "resnet", "--data", data, "--size", 16, "--out", out, "--epochs", 6, "--lr", 0.05, *SMALL)
    )
    assert done.returncode == 0, done.stderr
    return out


def asked(teacher, data, out):
    """The tree of WordNet, as few epochs and batches as may be."""
    return (
        *("vision", "hierarchy", teacher, "--data", data, "--out", out, "--tree", "taxonomy", "--groups", 2),
        *("--follow", "labels", "--weight", 0.2, "--tune-epochs", 1, "--epochs", 2, "--batches", 1),
        *("--loss", "soft", "--precision", "bf16", *SMALL),
    )


@pytest.fixture(scope="module")
def parts(teacher, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "parts"
    torch.set_num_threads(1)
    done = call(*asked(teacher, data, out), "--json", "-")
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout), done.stderr


@needs_wordnet
def test_hierarchy(parts):
    _, found, said = parts
    assert [leaf["name"] for leaf in found["leaves"]] == ["0-footwear", "1-carnivore"]
    for leaf in found["leaves"]:
        assert leaf["flops"] <= 0.5
        assert leaf["parameters"] <= 0.4
        assert max(leaf["exports"].values()) < 1e-4
    assert set(found["accuracy"]) == {"whole", "tuned", "all", "soft", "likely", "hard"}
    kept = {where: torch.load(parts[0] / where / "checkpoint.pt") for where in ("finetune", "leaves/0-footwear/tuning")}
    settings = [run["made_from"]["settings"] for run in kept.values()]
    assert [s["objective"] for s in settings] == ["soft", "cross-entropy"]  # as asked for; a leaf alone from labels
    assert [s["precision"] for s in settings] == ["bf16", "bf16"]
    assert settings[1]["epochs"] == 2 * settings[0]["epochs"]
    assert found["coherence"]["taxonomy"]["rand"] == 1
    macs = found["costs"]["macs"]
    assert macs["hard"] <= macs["likely"] < macs["all"]
    assert "accuracy: whole" in said
    assert "next: thresher vision report" in said


@needs_wordnet
def test_a_leaf_is_a_model_like_any(parts, data):
    folder = parts[0] / "leaves" / "1-carnivore"
    assert load_classifier(str(folder)).about.classes == ("cat", "dog")
    assert (folder / "model.onnx").is_file()
    done = call(
        *("vision", "attack", folder, "--data", data, "--attacks", "fgsm", "--epsilons", "0.1", "--no-check"),
        *("--threads", 1, "--json", "-"),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == 50  # of its two classes


@needs_wordnet
def test_the_same_command_goes_on(parts, teacher, data):
    before = json.loads((parts[0] / "vision.json").read_text())["history"]["hierarchy"]
    done = call(*asked(teacher, data, parts[0]), "--json", "-")
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout)
    assert again["accuracy"] == before["accuracy"]
    fails(2, "other settings", *asked(teacher, data, parts[0]), "--seed", 1)


@needs_wordnet
def test_report(parts, tmp_path):
    page = tmp_path / "page.html"
    done = call("vision", "report", parts[0], "--out", page, "--json", "-")
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert "footwear" in text
    assert "a shoe consisting of a sole fastened by straps" in text  # the gloss of a sandal
    assert "://" not in text
    rows = list(csv.DictReader(page.with_suffix(".csv").open()))
    assert [row["classes"] for row in rows] == ["boot; sandal", "cat; dog"]
    assert page.with_suffix(".png").stat().st_size > 1000
    assert json.loads(done.stdout)["accuracy"] == parts[1]["accuracy"]


@needs_wordnet
def test_extract(parts, data, tmp_path):
    done = call("vision", "extract", parts[0], "--classes", "Dog, cat", "--out", tmp_path / "pets", "--json", "-")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["classes"] == ["cat", "dog"]
    assert load_classifier(str(tmp_path / "pets")).about.classes == ("cat", "dog")
    fails(
        *(2, "boot, sandal; cat, dog"),
        *("vision", "extract", parts[0], "--classes", "dog,boot", "--out", tmp_path / "both"),
    )
    done = call(
        *("vision", "extract", parts[0], "--classes", "dog,boot", "--out", tmp_path / "both", "--data", data),
        *("--epochs", 1, "--batches", 1, *SMALL, "--json", "-"),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["measured"]["flops"] <= 0.5
    assert found["measured"]["accuracy"]["mean"] > 0.9
    assert load_classifier(str(tmp_path / "both")).about.classes == ("boot", "dog")


@needs_wordnet
def test_wrong_classes(parts, tmp_path):
    for classes, said in (("dog,horse", "no class horse"), ("dog", "two or more"), (",", "two or more")):
        fails(2, said, "vision", "extract", parts[0], "--classes", classes, "--out", tmp_path / "x")


def test_extract_from_a_whole_model(teacher, data, tmp_path):
    """The data has two of its four classes, which the model numbers otherwise."""
    pets = tmp_path / "images"
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            shutil.copytree(data / split / name, pets / split / name)
    command = ("vision", "extract", teacher, "--classes", "dog,cat", "--out", tmp_path / "pets")
    fails(2, "has no leaves: give --data", *command)
    done = call(*command, "--data", pets, "--epochs", 1, "--batches", 1, *SMALL, "--json", "-")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["measured"]
    assert found["classes"] == ["cat", "dog"]
    assert found["flops"] <= 0.5
    assert min(found["accuracy"]["mean"], found["whole"]["mean"]) > 0.9
    made = load_classifier(str(tmp_path / "pets"))
    assert made.about.classes == ("cat", "dog")
    fails(2, "has no class boot", *command[:3], "--classes", "dog,boot", *command[5:], "--data", pets)
    again = ("vision", "extract", tmp_path / "pets", "--classes", "dog,cat", "--out", tmp_path / "x")
    fails(2, "pruned model cannot be taken apart", *again, "--data", pets)


def test_bad_input(teacher, data, tmp_path):
    tree = tmp_path / "tree.json"
    leaf = {"synset": "", "distance": 0.0, "classes": [{"id": 0, "name": "boot"}]}
    other = {"synset": "", "distance": 0.0, "classes": [{"id": 1, "name": "cat"}]}
    whole = {"synset": "", "distance": 1.0, "children": [leaf, other]}
    tree.write_text(json.dumps({"classes": 4, "tree": whole}))
    command = ("vision", "hierarchy", teacher, "--data", data, "--out", tmp_path / "out")
    for code, more, said in (
        (6, ("--tree", tree, "--taxonomy", "none"), "missing from the tree: 'dog', 'sandal'"),
        (2, ("--tree", tmp_path / "nothing"), "nor a file"),
        (2, ("--taxonomy", "dmoz"), "wordnet or none"),
        (2, ("--taxonomy", "none", "--tree", "taxonomy"), "need --taxonomy wordnet"),
        (2, ("--follow", "blindly"), "choose one of labels, levels, align"),
        (2, ("--method", "magic", "--taxonomy", "none"), "ablation, taylor, activation"),
    ):
        fails(code, said, *command, *more, "--tune-epochs", 1, *SMALL)


@needs_wordnet
def test_classes_that_wordnet_does_not_know(data, tmp_path):
    strange = new_classifier("resnet", ("boot", "cat", "dog", "qwertz"), (3, 16, 16))
    save_classifier(strange, tmp_path / "strange")
    words = "no noun 'qwertz': write a file (--synsets map.toml)"
    fails(2, words, "vision", "hierarchy", tmp_path / "strange", "--data", data, "--out", tmp_path / "out")
