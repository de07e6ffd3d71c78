"""Fine-tuning: what is learned, what an interruption changes (nothing), and what is refused."""

import copy
from dataclasses import replace

import pytest
import torch

from thresher.errors import StorageError, UsageError
from thresher.vision import finetune as module
from thresher.vision.data import Images
from thresher.vision.decompose import all_bases, decompose
from thresher.vision.finetune import (
    CHECKPOINT,
    CURVE,
    PRECISIONS,
    Settings,
    accuracy,
    captured,
    finetune,
    predict,
    training_layout,
)
from thresher.vision.hierarchy import Tree
from thresher.vision.layers import survey
from thresher.vision.losses import OBJECTIVES
from thresher.vision.nets import ResNet
from thresher.vision.taxonomy import Taxonomy


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    pass


def stripes(count, seed):
    """Four classes of 12 x 12: bright rows or columns, coarse or fine, in noise."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=g)
    line = torch.arange(12)
    waves = torch.stack([(line // 2 % 2).float(), (line // 3 % 2).float()])
    pixels = torch.stack(
        [waves[c // 2][:, None].expand(12, 12) if c % 2 else waves[c // 2].expand(12, 12) for c in labels]
    )
    noisy = 110 * pixels + 70 * torch.rand(count, 12, 12, generator=g) + 20
    return Images(noisy.clamp(0, 255).byte()[:, None], labels, ("a", "b", "c", "d"))


TRAIN, VALIDATION = stripes(256, 0), stripes(128, 1)
QUICK = Settings("cross-entropy", epochs=2, batch=64, lr=0.1, pad=1)


def fresh(seed=0):
    torch.manual_seed(seed)
    return ResNet(4, 1, (8, 16, 32))


@pytest.fixture(scope="module")
def teacher():
    torch.set_num_threads(1)
    model = fresh()
    curve = finetune(model, TRAIN, VALIDATION, Settings("cross-entropy", epochs=8, batch=32, lr=0.05, pad=1))
    assert curve[-1].accuracy > 0.95
    return model


@pytest.fixture
def student(teacher):
    found = survey(teacher, torch.rand(1, 1, 12, 12))
    ranks = dict.fromkeys(("blocks.0.second.0", "blocks.1.first.0", "blocks.2.first.0"), (2, 2))
    return decompose(teacher, found, all_bases(teacher, found), ranks)[0], list(ranks)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_recovers_what_decomposition_lost(teacher, student, objective):
    model, layers = student
    before, taught = accuracy(model, VALIDATION), teacher.state_dict()
    kept = {n: t.clone() for n, t in taught.items()}
    settings = Settings(objective, epochs=4, batch=32, lr=0.005, pad=0, epsilon=0.02, attack_steps=2)
    curve = finetune(model, TRAIN, VALIDATION, settings, teacher, layers)
    assert before < 0.9
    assert curve[-1].accuracy > before + 0.3
    assert [e.epoch for e in curve] == [1, 2, 3, 4]
    assert all(torch.equal(t, kept[n]) for n, t in teacher.state_dict().items())
    assert not model.training


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_bf16_learns_as_float32_does(teacher, student, objective):
    model, layers = student
    start, before = copy.deepcopy(model), accuracy(model, VALIDATION)
    settings = Settings(objective, epochs=4, batch=32, lr=0.005, pad=0, epsilon=0.02, attack_steps=2)
    exact = finetune(start, TRAIN, VALIDATION, settings, teacher, layers)
    rounded = finetune(model, TRAIN, VALIDATION, replace(settings, precision="bf16"), teacher, layers)
    assert rounded[-1].accuracy > before + 0.3
    assert rounded[0].loss == pytest.approx(exact[0].loss, rel=0.15)
    assert rounded[0].loss != exact[0].loss
    assert all(t.dtype == torch.float32 for t in model.state_dict().values() if t.is_floating_point())


def test_what_nets_read_and_give_is_float32_in_bf16(monkeypatch):
    """Losses, and a taxonomy's features, are not of rounded numbers."""
    seen = []
    taxonomy = Taxonomy("align", 1.0, torch.eye(4), Tree(tuple(range(4))), "head.2")
    monkeypatch.setattr(module, "objective_loss", lambda o, logits, *rest: seen.append(logits) or logits.sum() * 0)
    monkeypatch.setattr(Taxonomy, "loss", lambda self, logits, labels, read: seen.append(read) or read.sum() * 0)
    in_nets = []
    model = fresh()
    model.blocks[0].first[0].register_forward_hook(lambda m, i, output: in_nets.append(output.dtype))
    settings = replace(QUICK, epochs=1, precision="bf16")
    finetune(model, TRAIN, VALIDATION, settings, taxonomy=taxonomy)
    assert {t.dtype for t in seen} == {torch.float32}
    steps = len(TRAIN) // settings.batch
    assert in_nets[:steps] == [torch.bfloat16] * steps
    assert set(in_nets[steps:]) == {torch.float32}  # what is measured


class Stopped(Exception):
    pass


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_interruption_changes_nothing(tmp_path, precision):
    whole, cut = fresh(), fresh()
    settings = replace(QUICK, precision=precision)
    curve = finetune(whole, TRAIN, VALIDATION, settings)

    def stop(done, total):
        if done == 5:
            raise Stopped

    with pytest.raises(Stopped):
        finetune(cut, TRAIN, VALIDATION, settings, folder=tmp_path, progress=stop)
    again = fresh()
    resumed = finetune(again, TRAIN, VALIDATION, settings, folder=tmp_path)
    assert [(e.loss, e.accuracy) for e in resumed] == [(e.loss, e.accuracy) for e in curve]
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
    done = fresh()
    finetune(done, TRAIN, VALIDATION, settings, folder=tmp_path, progress=lambda *_: pytest.fail("nothing is left"))
    assert torch.equal(predict(done, VALIDATION), predict(whole, VALIDATION))
    assert len((tmp_path / CURVE).read_text().splitlines()) == 3


def test_another_seed_gives_another_result_and_the_same_the_same():
    results = []
    for seed in (0, 0, 1):
        model = fresh()
        finetune(model, TRAIN, VALIDATION, Settings("cross-entropy", epochs=1, batch=64, seed=seed))
        results.append(predict(model, VALIDATION))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_every_epoch_has_an_order_of_its_own(monkeypatch):
    orders = []
    loader = module.DataLoader
    monkeypatch.setattr(
        module, "DataLoader", lambda d, b, sampler: orders.append(sampler) or loader(d, b, sampler=sampler)
    )
    finetune(fresh(), TRAIN, VALIDATION, QUICK)
    assert [sorted(order) for order in orders] == [list(range(256))] * 2
    assert orders[0] != orders[1]


def test_another_teacher_begins_anew(tmp_path, teacher, student):
    model, layers = student
    settings = Settings("soft", epochs=1, batch=64)
    start = copy.deepcopy(model)
    finetune(model, TRAIN, VALIDATION, settings, teacher, layers, tmp_path)
    with pytest.raises(UsageError, match="other settings, data or models"):
        finetune(start, TRAIN, VALIDATION, settings, fresh(), layers, tmp_path)


def test_checkpoints_that_are_not_ours(tmp_path):
    finetune(fresh(), TRAIN, VALIDATION, QUICK, folder=tmp_path)
    with pytest.raises(UsageError, match="other settings, data or models"):
        finetune(fresh(), TRAIN, VALIDATION, Settings("cross-entropy", epochs=3, batch=64), folder=tmp_path)
    with pytest.raises(UsageError, match="other settings, data or models"):
        finetune(fresh(), VALIDATION, VALIDATION, QUICK, folder=tmp_path)
    with pytest.raises(UsageError, match="other settings, data or models"):
        finetune(fresh(seed=9), TRAIN, VALIDATION, QUICK, folder=tmp_path)
    data = (tmp_path / CHECKPOINT).read_bytes()
    (tmp_path / CHECKPOINT).write_bytes(data[: len(data) // 2])
    with pytest.raises(StorageError, match="cannot be resumed"):
        finetune(fresh(), TRAIN, VALIDATION, QUICK, folder=tmp_path)
    torch.save({"made_from": Stopped()}, tmp_path / CHECKPOINT)
    with pytest.raises(StorageError, match="cannot be resumed"):
        finetune(fresh(), TRAIN, VALIDATION, QUICK, folder=tmp_path)


def test_a_loss_that_is_no_number_keeps_the_last_good_epoch(tmp_path):
    model = fresh()
    finetune(model, TRAIN, VALIDATION, QUICK, folder=tmp_path)
    saved = (tmp_path / CHECKPOINT).read_bytes()
    broken = fresh()
    broken.head[2].weight.data.fill_(float("inf"))
    with pytest.raises(UsageError, match="the loss is nan in epoch 1"):
        finetune(broken, TRAIN, VALIDATION, QUICK, folder=tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert (tmp_path / CHECKPOINT).read_bytes() == saved


def test_what_is_refused(teacher):
    with pytest.raises(UsageError, match="needs a teacher"):
        finetune(fresh(), TRAIN, VALIDATION, Settings("soft"))
    with pytest.raises(UsageError, match="compares layers, and none was decomposed"):
        finetune(fresh(), TRAIN, VALIDATION, Settings("hint"), teacher, [])
    with pytest.raises(UsageError, match="no layer nothing to compare"):
        finetune(fresh(), TRAIN, VALIDATION, Settings("hint"), teacher, ["nothing"])
    for wrong in ({"lr": 0}, {"lr": float("nan")}, {"batch": 1}, {"epochs": 0}, {"objective": "x"}, {"epsilon": 2},
                  {"precision": "float16"}):  # fmt: skip
        with pytest.raises(UsageError):
            Settings(**wrong)


def test_predictions_leave_a_model_as_it_was():
    model = fresh().train()
    before = copy.deepcopy(model.state_dict())
    evaluated = copy.deepcopy(model).eval()(VALIDATION.pixels.float() / 255)
    assert torch.allclose(predict(model, VALIDATION, batch=50), evaluated, atol=1e-5)
    assert model.training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_hooks_are_gone_afterwards(teacher):
    with captured(teacher, ["blocks.0"]) as outputs:
        teacher(torch.rand(2, 1, 12, 12))
        assert outputs[0].shape == (2, 8, 6, 6)
    assert not teacher.blocks[0]._forward_hooks


@pytest.mark.parametrize(("channels", "stride", "layout"), [
    (7, 2, torch.contiguous_format), (8, 2, torch.channels_last), (7, 1, torch.channels_last),
])  # fmt: skip
def test_layout_where_channels_last_would_corrupt_memory(channels, stride, layout):
    assert training_layout(torch.nn.Sequential(torch.nn.Conv2d(channels, 4, 1, stride))) == layout
