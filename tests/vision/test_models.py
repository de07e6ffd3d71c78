"""Classifiers by folder, by transformers and by code; what they are saved as; and what is refused."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from thresher.errors import ModelError, UsageError
from thresher.vision.compress import Settings, compress, fold
from thresher.vision.layers import unwrap_logits
from thresher.vision.models import (
    DESCRIPTION,
    EXPORTED,
    ONNX,
    WEIGHTS,
    Classifier,
    Description,
    export_torch,
    load_classifier,
    load_weights,
    new_classifier,
    save_classifier,
)
from thresher.vision.ranks import Target

CLASSES = ("a", "b", "c")


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    pass


def awake(classifier):
    """With batch norms that have seen something."""
    module = classifier.module.train()
    with torch.no_grad():
        for _ in range(3):
            module(torch.rand(8, *classifier.about.shape))
    module.eval()
    return classifier


@pytest.fixture(scope="module")
def smaller():
    torch.manual_seed(0)
    whole = awake(new_classifier("resnet", CLASSES, (1, 28, 28)))
    return compress(whole, Settings(Target(0.5))).classifier


def logits(classifier, images):
    with torch.no_grad():
        return unwrap_logits(classifier.module.eval()(images))


@pytest.mark.parametrize("folded", [False, True])
def test_saved_and_loaded(tmp_path, smaller, folded):
    saved = fold(smaller) if folded else smaller
    assert bool(saved.about.folded) == folded
    save_classifier(saved, tmp_path)
    loaded = load_classifier(str(tmp_path))
    assert loaded.about == saved.about
    images = torch.rand(3, 1, 28, 28)
    assert torch.equal(logits(loaded, images), logits(saved, images))
    assert (logits(loaded, images) - logits(smaller, images)).abs().max() < 1e-5


def test_exports_run_without_this_project(tmp_path, smaller):
    import onnxruntime

    apart = save_classifier(fold(smaller), tmp_path, export=True)
    assert max(apart.values()) < 1e-4
    images = torch.rand(5, 1, 28, 28)
    expected = logits(smaller, images)
    session = onnxruntime.InferenceSession(str(tmp_path / ONNX), providers=["CPUExecutionProvider"])
    given = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])
    assert (given - expected).abs().max() < 1e-4 * expected.abs().max()
    given = torch.export.load(tmp_path / EXPORTED).module()(images)
    assert (given - expected).abs().max() < 1e-4 * expected.abs().max()
    # The weights alone are those of plain layers: of a first one that was left, and of the three of a decomposed one.
    state = load_file(tmp_path / WEIGHTS)
    outer, inner = smaller.about.ranks["blocks.2.second.0"]
    assert state["stem.0.0.weight"].shape == (32, 1, 3, 3)
    shapes = [tuple(state[f"blocks.2.second.0.{i}.weight"].shape) for i in range(3)]
    assert shapes == [(inner, 128, 1, 1), (outer, inner, 3, 3), (128, outer, 1, 1)]
    assert not list(tmp_path.glob(".part*"))


def test_an_export_that_differs_is_refused(tmp_path, smaller):
    class Moody(nn.Module):
        """Gives something else whenever it is asked."""

        def forward(self, images):
            return images.mean((2, 3)) + torch.rand(len(images), 3)

    with pytest.raises(ModelError, match="gives other logits"):
        export_torch(Classifier(Moody(), smaller.about), tmp_path / EXPORTED)


def test_models_of_one_batch_size_and_models_that_cannot_be_exported(tmp_path, smaller):
    class Fixed(nn.Module):
        """Takes one image at a time."""

        def forward(self, images):
            return 2 * images.view(1, 3, 28, 28).mean((2, 3))

    class Asking(nn.Module):
        """Its code depends on what it sees."""

        def forward(self, images):
            return images.mean((2, 3)) * (1 if images.sum() > 1 else 2)

    coloured = Description("net:vgg", CLASSES, (3, 28, 28))
    assert export_torch(Classifier(Fixed(), coloured), tmp_path / EXPORTED) < 1e-6
    assert torch.equal(
        torch.export.load(tmp_path / EXPORTED).module()(torch.ones(1, 3, 28, 28)), torch.full((1, 3), 2.0)
    )
    with pytest.raises(ModelError, match="cannot be exported"):
        export_torch(Classifier(Asking(), smaller.about), tmp_path / EXPORTED)


def test_of_transformers(tmp_path):
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], num_labels=3)
    body = ResNetForImageClassification(config)
    body.save_pretrained(tmp_path / "hf")
    said = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "size": {"shortest_edge": 32}}
    (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps(said))
    loaded = awake(load_classifier(str(tmp_path / "hf")))
    assert loaded.about.shape == (3, 32, 32)
    assert loaded.about.mean == (0.4, 0.5, 0.6)
    images = torch.rand(2, 3, 32, 32)
    normal = (images - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    assert torch.allclose(logits(loaded, images), unwrap_logits(loaded.module.body(normal)), atol=1e-6)
    smaller = fold(compress(loaded, Settings(None, method="vbmf", weakening=0.8, multiple=2)).classifier)
    assert smaller.about.ranks
    save_classifier(smaller, tmp_path / "ours")
    again = load_classifier(str(tmp_path / "ours"))
    assert torch.equal(logits(again, images), logits(smaller, images))
    assert again.about.mean == (0.4, 0.5, 0.6)


def make_code():
    return new_classifier("vgg", CLASSES, (1, 28, 28)).module


def make_named():
    module = make_code()
    module.class_names = CLASSES
    module.image_size = 28
    return module


def make_misnamed():
    module = make_named()
    module.class_names = ("a", "b")
    return module


NOT_A_MODEL = 3


def test_by_code(tmp_path, monkeypatch):
    source = f"{__name__}:make_code"
    loaded = load_classifier(source, size=28)
    assert loaded.about.classes == ("0", "1", "2")
    save_classifier(loaded, tmp_path / "ours")
    with pytest.raises(ModelError, match="--trust"):  # a folder from strangers may name any code
        load_classifier(str(tmp_path / "ours"))
    again = load_classifier(str(tmp_path / "ours"), trusted=source)
    images = torch.rand(2, 1, 28, 28)
    assert torch.equal(logits(again, images), logits(loaded, images))
    torch.save(loaded.module.state_dict(), tmp_path / "state.pth")
    with_weights = load_classifier(source, tmp_path / "state.pth", size=28)
    assert torch.equal(logits(with_weights, images), logits(loaded, images))
    named = load_classifier(f"{__name__}:make_named")
    assert named.about.classes == CLASSES
    assert named.about.shape == (1, 28, 28)
    for path, said in (
        ("nothing:x", "cannot be imported"),
        (f"{__name__}:NOT_A_MODEL", "neither a torch module"),
        (f"{__name__}:make_misnamed", "3 logits for 2 classes"),
    ):
        with pytest.raises(ModelError, match=said):
            load_classifier(path)


def test_timm_where_it_does_not_import(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModelError, match="timm does not import here"):
        load_classifier("timm:resnet18")


def test_timm_where_it_does(monkeypatch):
    made = []

    def create_model(name, pretrained):
        made.append((name, pretrained))
        return make_code()

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model))
    assert load_classifier("timm:some", size=28).about.source == "timm:some"
    assert made == [("some", True)]
    with pytest.raises(UsageError, match="--weights goes with"):
        load_classifier("somewhere", Path("x.pth"))


class Payload:
    """A pickle that would run something."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was run",)


def test_weights_that_are_refused(tmp_path):
    module = make_code()
    torch.save({"a": Payload()}, tmp_path / "pickle.pth")
    torch.save(module, tmp_path / "module.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    broken = {n: t.clone() for n, t in module.state_dict().items()}
    broken["head.bias"][0] = float("nan")
    torch.save(broken, tmp_path / "nan.pth")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    for name, said in (
        ("pickle.pth", "pickled objects are refused"),
        ("module.pth", "pickled objects are refused"),
        ("list.pth", "not a state dict"),
        ("other.pth", "does not fit"),
        ("nan.pth", r"head\.bias holds numbers that are not finite"),
        ("junk.safetensors", "neither safetensors"),
        ("missing.pth", "does not exist"),
    ):
        with pytest.raises(ModelError, match=said):
            load_weights(module, tmp_path / name)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"source": "net:unknown"},
        {"source": "os:getcwd"},
        {"source": "transformers"},
        {"shape": [1, 28]},
        {"shape": [1, 10**6, 10**6]},
        {"classes": 3},
        {"ranks": {"blocks.0.first.0": [0, 1]}},
        {"ranks": {"blocks.0.first.0": [8, 99]}},
        {"ranks": {"blocks.9": [8, 8]}},
        {"ranks": {"stem": [8, 8]}},
        {"ranks": {"blocks.0.first.0": "8"}},
        {"folded": [["stem.0.0", "stem.1"]]},
        {"folded": [["stem.0.0"]]},
        {"mean": ["x"]},
    ],
)
def test_folders_that_lie(tmp_path, smaller, change):
    save_classifier(smaller, tmp_path)
    said = json.loads((tmp_path / DESCRIPTION).read_text())
    (tmp_path / DESCRIPTION).write_text(json.dumps(said | change))
    with pytest.raises((ModelError, UsageError)):
        load_classifier(str(tmp_path))


def test_folders_that_are_damaged(tmp_path, smaller):
    save_classifier(smaller, tmp_path)
    whole = (tmp_path / DESCRIPTION).read_text()
    for cut in (0, 1, len(whole) // 2):
        (tmp_path / DESCRIPTION).write_text(whole[:cut])
        with pytest.raises(ModelError, match="damaged"):
            load_classifier(str(tmp_path))
    (tmp_path / DESCRIPTION).write_text(whole)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(ModelError, match="does not exist"):
        load_classifier(str(tmp_path))
    with pytest.raises(ModelError, match="neither a folder with"):
        load_classifier(str(tmp_path / "nowhere"))
