"""The whole way from a model to a smaller one: what is reused after an interruption, and what must not be."""

import pytest
import torch

from thresher.errors import UsageError
from thresher.vision import Compression, Finetuning, Images, Splits, Target, load_classifier, pipeline, tucker
from thresher.vision.finetune import predict
from thresher.vision.models import new_classifier

CLASSES = ("a", "b", "c")


@pytest.fixture(autouse=True)
def one_thread(set_threads, monkeypatch):
    """Nothing is timed and nothing exported: that has tests of its own, and takes seconds."""
    save = pipeline.save_classifier
    monkeypatch.setattr(
        pipeline, "latencies", lambda before, after, batches: {b: {"before": 2, "after": 1} for b in batches}
    )
    monkeypatch.setattr(pipeline, "save_classifier", lambda c, folder, export=False: save(c, folder) or {"none": 0.0})


@pytest.fixture(scope="module")
def data():
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (96, 1, 12, 12), dtype=torch.uint8, generator=g)
    labels = torch.arange(96) % 3
    whole = Images(pixels, labels, CLASSES)
    return Splits(
        whole.subset(torch.arange(64)), whole.subset(torch.arange(64, 80)), whole.subset(torch.arange(80, 96))
    )


def make(seed=0):
    classifier = new_classifier("resnet", CLASSES, (1, 12, 12), seed)
    classifier.module.eval()
    return classifier


@pytest.fixture
def teacher():
    return make()


HALF, BRIEF = Compression(Target(0.5), "equal"), Finetuning("soft", epochs=1, batch=32)


def test_an_interrupted_run_goes_on(data, tmp_path, monkeypatch):
    whole = tucker(make(), HALF, tmp_path / "whole", data, BRIEF)
    finetune = pipeline.tuning.finetune

    def stopped(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.tuning, "finetune", stopped)
    with pytest.raises(KeyboardInterrupt):
        tucker(make(), HALF, tmp_path / "cut", data, BRIEF)
    monkeypatch.setattr(pipeline.tuning, "finetune", finetune)
    monkeypatch.setattr(pipeline, "compress", lambda *a: pytest.fail("it was decomposed already"))
    resumed = tucker(make(), HALF, tmp_path / "cut", data, BRIEF)
    assert resumed.accuracy == whole.accuracy
    assert resumed.layers == whole.layers
    loaded = [load_classifier(str(tmp_path / name)) for name in ("whole", "cut")]
    assert torch.equal(*(predict(c.module, data.test) for c in loaded))


def test_another_teacher_target_or_data_is_decomposed_anew(teacher, data, tmp_path):
    first = tucker(teacher, HALF, tmp_path, data)
    assert tucker(teacher, Compression(Target(0.4), "equal"), tmp_path, data).layers != first.layers
    other = make(seed=1)
    second = tucker(other, HALF, tmp_path, data)
    assert [r.error for r in second.layers] != [r.error for r in first.layers]
    with pytest.raises(UsageError, match="the model takes images of"):
        tucker(new_classifier("resnet", CLASSES, (1, 16, 16)), HALF, tmp_path, data)
    with pytest.raises(UsageError, match="to fine-tune, data is needed"):
        tucker(teacher, HALF, tmp_path, None, BRIEF)


def test_the_same_folder_with_another_teacher_does_not_go_on_from_the_old_student(teacher, data, tmp_path):
    tucker(teacher, HALF, tmp_path, data, BRIEF)
    other = make(seed=1)
    with pytest.raises(UsageError, match="other settings, data or models"):
        tucker(other, HALF, tmp_path, data, BRIEF)


def test_another_teacher(data, tmp_path):
    apart = [tucker(make(), HALF, tmp_path / str(t), data, BRIEF, teacher=t and make(t)) for t in (None, 1)]
    assert apart[0].curve[0].loss != apart[1].curve[0].loss
    assert apart[0].accuracy["whole"] == apart[1].accuracy["whole"]
    with pytest.raises(UsageError, match="a teacher takes the same images"):
        tucker(make(), HALF, tmp_path / "x", data, BRIEF, teacher=new_classifier("resnet", CLASSES, (1, 16, 16)))
