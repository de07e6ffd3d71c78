"""thresher vision as a user calls it: train, tucker, attack, report, on pictures made here."""

import csv
import json

import numpy as np
import pytest
import torch
from command_line import call, fails
from PIL import Image

from thresher.cli.vision_train import Source
from thresher.errors import UsageError
from thresher.vision.models import new_classifier, save_classifier

SMALL = ("--threads", 1, "--batch", 32)


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    pass


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three classes of 16 x 16: rows, columns, and neither."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    line = (np.arange(16) // 2 % 2) * 120
    kinds = {"rows": np.tile(line[:, None], 16), "columns": np.tile(line, (16, 1)), "plain": np.full((16, 16), 60)}
    for part, count in (("train", 90), ("test", 40)):
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
        *("vision", "train", "resnet", "--data", data, "--size", 16, "--out", out, "--epochs", 6, "--lr", 0.05, *SMALL),
        *("--json", "-"),
    )
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def smaller(teacher, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "smaller"
    torch.set_num_threads(1)
    done = call(
        *("vision", "tucker", teacher[0], "--data", data, "--target-flops", 0.5, "--distill", "--epochs", 2),
        *("--out", out, "--batches", 1, *SMALL, "--json", "-"),
    )
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout), done.stderr


def test_train(teacher):
    out, found, said = teacher
    assert found["accuracy"]["test"] > 0.9
    assert len(found["curve"]) == 6
    assert f"next:thresher vision tucker{out}".replace(" ", "") in "".join(said.split())  # however it is wrapped


def test_tucker(smaller):
    out, found, said = smaller
    before, after = found["costs"]["macs"]
    assert 0.45 <= after / before <= 0.5
    assert found["reached"] == pytest.approx(after / before, abs=1e-6)
    assert found["accuracy"]["finetuned"] > 0.9
    assert found["seconds"]["1"][0] > 0
    assert {p.name for p in out.iterdir()} >= {"model.safetensors", "model.onnx", "model.pt2", "vision.json"}
    assert "accuracy: whole" in said
    assert any(layer["kind"] == "tucker" for layer in found["layers"])
    assert json.loads((out / "vision.json").read_text())["history"]["finetune"]["objective"] == "attention"


def test_another_teacher(teacher, data, tmp_path):
    """Its layers are others, so its logits are what there is to learn from."""
    other = new_classifier("vgg", ("columns", "plain", "rows"), (3, 16, 16), 0)
    save_classifier(other, tmp_path / "vgg")
    options = (*("--data", data, "--distill", "--teacher", tmp_path / "vgg", "--epochs", 1, "--batches", 1), *SMALL)
    done = call("vision", "tucker", teacher[0], "--target-flops", 0.5, "--out", tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    said = json.loads((tmp_path / "out" / "vision.json").read_text())
    assert said["history"]["finetune"]["objective"] == "soft"
    words = "the teacher has no layer blocks.0.first.0 to compare with: use a loss of logits, as soft"
    asked = ("--target-flops", 0.5, "--out", tmp_path / "features", "--loss", "attention")
    fails(2, words, "vision", "tucker", teacher[0], *asked, *options)


def test_the_same_command_goes_on(smaller, teacher, data):
    out, found, _ = smaller
    weights = (out / "decomposed" / "model.safetensors").stat().st_mtime_ns
    done = call(
        *("vision", "tucker", teacher[0], "--data", data, "--target-flops", 0.5, "--distill", "--epochs", 2),
        *("--out", out, "--batches", 1, *SMALL, "--json", "-"),
    )
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout)
    assert again["accuracy"] == found["accuracy"]
    assert again["layers"] == found["layers"]
    assert (out / "decomposed" / "model.safetensors").stat().st_mtime_ns == weights


def test_attack_and_report(smaller, teacher, data, tmp_path):
    out, found, _ = smaller
    done = call("vision", "report", out, "--out", tmp_path / "before.html", "--json", "-")
    assert done.returncode == 0, done.stderr
    assert "Not attacked yet" in (tmp_path / "before.html").read_text()
    done = call(
        *("vision", "attack", out, "--data", data, "--against", teacher[0], "--attacks", "fgsm,pgd20,deepfool"),
        *("--epsilons", "0,8/255,0.2", "--images", 12, "--threads", 1, "--json", "-"),
    )
    assert done.returncode == 0, done.stderr
    attacked = json.loads(done.stdout)
    rows = {(r["attack"], round(r["epsilon"], 3)): r for r in attacked["rows"]}
    clean = rows["clean", 0.0]["accuracy"]["mean"]
    assert rows["pgd20", 0.0]["accuracy"]["mean"] == clean
    assert rows["pgd20", 0.2]["accuracy"]["mean"] <= rows["pgd20", 0.031]["accuracy"]["mean"] <= clean
    assert ("pgd20 transfer", 0.2) in rows
    assert rows["pgd20", 0.2]["rival"] is not None
    assert len(attacked["checks"]) == 7
    assert len(attacked["distances"]) == 2
    assert json.loads((out / "robustness.json").read_text()) == attacked
    done = call("vision", "report", out, "--out", tmp_path / "after.html", "--json", "-")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "after.html").read_text()
    for words in ("Robust accuracy", "McNemar", "black box", "blocks.2.second.0", "time of a batch of 1"):
        assert words in page
    assert 'src="http' not in page
    assert (tmp_path / "after.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "after.csv").open() as file:
        assert [row["layer"] for row in csv.DictReader(file)] == [layer["name"] for layer in found["layers"]]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--target-flops", 0.001), 2, "a target of 0.001 is out of reach: the least is 0."),
        (("--target-flops", 1.5), 2, "not between 0 and 1"),
        (("--target-flops", 0.5, "--target-latency", 0.5), 2, "give one target"),
        (("--ranks", "vbmf", "--target-flops", 0.5), 2, "take no target"),
        (("--ranks", "nothing.json"), 2, "neither sensitivity, equal or vbmf"),
        (("--distill",), 2, "--distill needs --data"),
        (("--weighted",), 2, "images are needed"),
        (("--leave", "blocks"), 2, "no convolution of the model can be decomposed"),
        (("--batches", "x"), 2, "give whole numbers"),
        (("--data", "nowhere"), 2, "neither fashion-mnist, animals, fashion-animals nor a folder"),
    ],
)
def test_tucker_says_what_is_wrong(teacher, tmp_path, options, code, words):
    fails(code, words, "vision", "tucker", teacher[0], "--out", tmp_path / "out", *options)


def test_ranks_by_hand(teacher, tmp_path):
    hand = tmp_path / "ranks.json"
    hand.write_text('{"blocks.2.second.0": [200, 8]}')
    fails(
        2,
        "blocks.2.second.0: ranks 200, 8 are not within",
        "vision",
        "tucker",
        teacher[0],
        "--ranks",
        hand,
        "--out",
        tmp_path / "x",
    )
    hand.write_text('{"blocks.2.second.0": [16, 8], "blocks.2.shortcut.0": [8, 8]}')
    done = call(
        "vision", "tucker", teacher[0], "--ranks", hand, "--out", tmp_path / "out", "--batches", 1, "--json", "-"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    kinds = {layer["name"]: (layer["kind"], layer["ranks"]) for layer in found["layers"] if layer["kind"] != "kept"}
    assert kinds == {"blocks.2.second.0": ("tucker", [16, 8]), "blocks.2.shortcut.0": ("svd", [8, 8])}
    assert found["accuracy"] == {}


def test_other_classes_and_sizes(teacher, data, tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir()
        for i in range(10):
            Image.fromarray(np.full((16, 16, 3), i, np.uint8)).save(tmp_path / "data" / name / f"{i}.png")
    words = "the model has 3 classes, and the data 2"
    fails(2, words, "vision", "tucker", teacher[0], "--data", tmp_path / "data", "--out", tmp_path / "out")
    fails(2, words, "vision", "attack", teacher[0], "--data", tmp_path / "data")


def test_attack_and_report_say_what_is_wrong(teacher, data, tmp_path):
    attack = ("vision", "attack", teacher[0], "--data", data)
    fails(2, "unknown attack 'magic'; known: noise, fgsm", *attack, "--attacks", "magic")
    fails(2, "give numbers in [0, 1]", *attack, "--epsilons", "a/b")
    fails(2, "epsilon", *attack, "--epsilons", "-1")
    fails(3, "neither a folder with vision.json", "vision", "attack", tmp_path / "nowhere", "--data", data)
    fails(3, "holds no result of `thresher vision tucker`", "vision", "report", teacher[0])
    fails(2, "ends with .html", "vision", "report", teacher[0], "--out", tmp_path / "x.pdf")
    fails(2, "unknown net magic", "vision", "train", "magic", "--data", data, "--out", tmp_path / "out")


def test_weights_belong_to_the_model_and_not_to_another_one_beside_it(teacher, tmp_path):
    source = Source(weights=tmp_path / "state.pth")
    assert source.load(str(teacher[0]), other=True).about.shape == (3, 16, 16)
    with pytest.raises(UsageError, match="a folder has its own"):
        source.load(str(teacher[0]))


def test_code_that_a_folder_names_is_not_run(teacher, tmp_path):
    said = json.loads((teacher[0] / "vision.json").read_text())
    (tmp_path / "vision.json").write_text(json.dumps(said | {"source": "antigravity:run"}))
    fails(3, "--trust antigravity:run", "vision", "tucker", tmp_path, "--out", tmp_path / "out")
