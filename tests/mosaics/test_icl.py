"""Training on automata: the data of an epoch, gradients, runs that are killed and go on, and the command."""

import json
import math
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import typer

from thresher.cli import start
from thresher.cli.mosaic_icl import icl
from thresher.cli.options import with_options
from thresher.errors import UsageError
from thresher.evaluation.plots import save_figure
from thresher.mosaics.automata import Sizes, batch, chance, measure
from thresher.mosaics.icl import (
    ARCHITECTURES,
    BASELINES,
    Settings,
    build,
    epoch_batches,
    gradients,
    held_out,
    of_seeds,
    plot,
    predictions,
    rate,
    run,
    train,
    training_automata,
)

SIZES = Sizes(states=(4, 5), alphabet=(3, 4), words=(4, 7), symbols=(1, 12))
TINY = Settings(epochs=2, layers=1, width=16, heads=2, batch=4, held_out=8, sizes=SIZES)

pytestmark = pytest.mark.usefixtures("set_threads")


def test_rate():
    found = [rate(step, 100) for step in range(100)]
    assert found[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert found[10] == max(found) == 1
    assert found[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(found[10:]))
    assert found[55] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 45 / 89)) / 2)
    assert rate(0, 1) == 1


def test_no_training_has_what_is_held_out():
    test, validation = held_out(TINY)
    assert (test, validation) == held_out(replace(TINY, lr=1e-3))
    never = {one.automaton for one in (*test, *validation)}
    assert (len(test), len(validation), len(never)) == (4, 4, 8)
    # Of automata with one letter there are only 18, so that 10 are left, and would be drawn if they could.
    few = replace(TINY, sizes=replace(SIZES, states=(2, 2), alphabet=(1, 1), edges=(1, 1)))
    kept = {one.automaton for half in held_out(few) for one in half}
    for seed in (0, 1):
        assert not kept & set(training_automata(few, 10, seed))
        with pytest.raises(UsageError, match="11 different automata"):
            training_automata(few, 11, seed)
    assert training_automata(TINY, 30, 1)[:10] == training_automata(TINY, 10, 1)
    assert training_automata(TINY, 10, 1) != training_automata(TINY, 10, 2)


def test_every_epoch_is_new():
    known = training_automata(TINY, 10, 0)
    first, second = (epoch_batches(known, TINY, 0, epoch) for epoch in (0, 1))
    for found in (first, second):
        assert [len(part) for part in found] == [4, 4, 2]
        assert {one.automaton for part in found for one in part} == set(known)
    assert not {one.tokens for part in first for one in part} & {one.tokens for part in second for one in part}
    assert [one.automaton for part in first for one in part] != [one.automaton for part in second for one in part]
    assert first == epoch_batches(known, TINY, 0, 0)
    assert first != epoch_batches(known, TINY, 1, 0)


@pytest.mark.parametrize("piece", [1, 3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_are_those_of_the_whole_batch(architecture, piece, monkeypatch):
    monkeypatch.setattr("thresher.mosaics.icl._PIECE", piece)
    settings = replace(TINY, dropout=0.0)
    (instances,) = epoch_batches(training_automata(TINY, 7, 0), replace(TINY, batch=7), 0, 0)
    torch.manual_seed(0)
    model = build(architecture, settings).double()
    logits = model(input_ids=torch.from_numpy(batch(instances)[0])).logits
    losses = [  # without labels of transformers: of each symbol but an instance's first
        -logits[i, t - 1].log_softmax(-1)[token]
        for i, one in enumerate(instances)
        for t, token in enumerate(one.tokens)
        if t and token < 18
    ]
    expected = torch.stack(losses).mean()
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    # transformers computes the loss in float32.
    assert gradients(model, instances) == pytest.approx(float(expected.detach()), rel=1e-6)
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_works(architecture):
    settings = replace(TINY, epochs=30, width=32, lr=1e-2, held_out=20)
    known = training_automata(settings, 16, 0)
    test, _ = held_out(settings)
    before = torch.get_rng_state()
    model, loss, tokens = train(architecture, known, settings, 0)
    assert torch.equal(torch.get_rng_state(), before)
    batches = [b for epoch in range(30) for b in epoch_batches(known, settings, 0, epoch)]
    assert tokens == sum(len(one.tokens) for b in batches for one in b)
    assert not model.training
    low, found = measure(map(chance, test), test), measure(predictions(model, test), test)
    assert loss < 2.2  # chance has 2.89
    assert found.tvd < low.tvd - 0.08
    assert found.accuracy > 1.5 * low.accuracy


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_steps_of_a_training(architecture, monkeypatch):
    """Learning rate, decay and clipping, as the optimizer finds them; dropout is on."""
    steps, modes = [], []

    class Watched(torch.optim.AdamW):
        def step(self):
            gradients = [p.grad for group in self.param_groups for p in group["params"]]
            norm = float(torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients])))
            steps.append(([group["lr"] for group in self.param_groups], norm))
            decay = {p.dim() >= 2: group["weight_decay"] for group in self.param_groups for p in group["params"]}
            assert decay == {True: 0.3, False: 0.0}
            assert len(gradients) == len(list(made[0].parameters()))
            super().step()

    made = []

    def watched_build(*arguments):
        made.append(build(*arguments))
        made[0].register_forward_pre_hook(lambda model, _: modes.append(model.training))
        return made[0]

    def watched_gradients(model, instances):
        assert all(p.grad is None for p in model.parameters())
        return gradients(model, instances)

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    monkeypatch.setattr("thresher.mosaics.icl.gradients", watched_gradients)
    monkeypatch.setattr("thresher.mosaics.icl.build", watched_build)
    settings = replace(TINY, epochs=12, lr=0.5, decay=0.3)  # so high that gradients need clipping
    train(architecture, training_automata(settings, 6, 0), settings, 0)
    assert [lr for lr, _ in steps] == [[0.5 * rate(i, 24)] * 2 for i in range(24)]
    norms = [norm for _, norm in steps]
    assert max(norms) == pytest.approx(1, abs=1e-4)
    assert modes == [True] * len(modes)
    assert {m.p for m in made[0].modules() if isinstance(m, torch.nn.Dropout)} == {settings.dropout}


def test_both_have_the_same_shape():
    settings = Settings()
    mosaic, gpt = (build(architecture, settings) for architecture in ("mosaic", "gpt"))
    assert mosaic.config.hidden_size == gpt.config.n_embd == 128
    assert mosaic.config.num_hidden_layers == gpt.config.n_layer == 2
    assert mosaic.config.num_attention_heads == gpt.config.n_head == 8
    assert mosaic.config.persistent_size == 448
    assert gpt.config.n_positions == 949
    sizes = [sum(p.numel() for p in m.parameters()) for m in (mosaic, gpt)]
    assert sizes[0] == pytest.approx(sizes[1] - 949 * 128, rel=0.01)  # but for the positions


def test_training_can_be_repeated():
    known = training_automata(TINY, 6, 0)
    steps = []
    first, *_ = train("mosaic", known, TINY, 3, lambda *done: steps.append(done))
    torch.rand(5)  # what the caller has drawn makes no difference
    again, *_ = train("mosaic", known, TINY, 3)
    assert steps == [(4, 12), (6, 12), (10, 12), (12, 12)]
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)]
    assert all(same)
    starts = [train("gpt", known, replace(TINY, lr=1e-30), seed)[0].lm_head.weight for seed in (3, 4)]
    assert not torch.allclose(*starts, atol=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_predictions_do_not_see_what_follows(architecture, monkeypatch):
    """Neither the next token nor what pads an instance beside a longer one."""
    monkeypatch.setattr("thresher.mosaics.icl._PIECE", 2)
    torch.manual_seed(0)
    model = build(architecture, TINY).eval()
    short, long = sorted(held_out(TINY)[0], key=lambda one: len(one.tokens))[::3]
    assert len(short.tokens) < len(long.tokens)
    together = list(predictions(model, [short, long]))
    assert [rows.shape for rows in together] == [(len(one.tokens), 20) for one in (short, long)]
    np.testing.assert_allclose(together[0].sum(1), 1)
    (alone,) = predictions(model, [short])
    np.testing.assert_allclose(together[0], alone, atol=1e-6)
    (cut,) = predictions(model, [replace(short, tokens=short.tokens[:-1])])
    np.testing.assert_allclose(together[0][:-1], cut, atol=1e-6)


def bars(shown, stop=None):
    """A bar that notes what it is opened for, and is Ctrl-C for a thing with the name `stop`."""

    @contextmanager
    def bar(label):
        shown.append(label)

        def progress(done, total):
            if label == stop and done:
                raise KeyboardInterrupt

        yield progress

    return bar


def test_a_run_that_is_interrupted_goes_on(tmp_path):
    what = (list(ARCHITECTURES), [5, 8], [0], TINY)
    whole = run(*what)
    assert [(r.architecture, r.automata, r.seed) for r in whole.runs] == [
        ("mosaic", 5, 0),
        ("gpt", 5, 0),
        ("mosaic", 8, 0),
        ("gpt", 8, 0),
    ]
    assert list(whole.baselines) == list(BASELINES)
    assert whole.baselines["chance"].tvd > whole.baselines["ngram"].tvd > whole.baselines["bayes"].tvd
    assert len({r.test for r in whole.runs}) == 4
    assert all(r.test != r.validation and r.seconds > 0 for r in whole.runs)

    path, shown = tmp_path / "icl.jsonl", []
    with pytest.raises(KeyboardInterrupt):
        run(*what, path, bars(shown, "transformer, 5 automata, seed 0"))
    assert shown == ["chance", "ngram", "bayes", "Memory Mosaic, 5 automata, seed 0", "transformer, 5 automata, seed 0"]
    shown.clear()
    assert run(*what, path, bars(shown)) == whole
    assert shown == [
        "transformer, 5 automata, seed 0",
        "Memory Mosaic, 8 automata, seed 0",
        "transformer, 8 automata, seed 0",
    ]
    shown.clear()
    kept = path.read_bytes()
    assert run(*what, path, bars(shown)) == whole
    assert (shown, path.read_bytes()) == ([], kept)
    path.write_bytes(kept[:-30])  # killed while the last line was written
    assert run(*what, path, bars(shown)) == whole
    assert shown == ["transformer, 8 automata, seed 0"]
    more = run(["mosaic", "gpt"], [5], [0, 1], TINY, path, bars(shown))
    assert shown[1:] == ["Memory Mosaic, 5 automata, seed 1", "transformer, 5 automata, seed 1"]
    assert [(r.architecture, r.seed) for r in more.runs] == [("mosaic", 0), ("gpt", 0), ("mosaic", 1), ("gpt", 1)]
    with pytest.raises(UsageError, match=r"other settings \(lr 0.0005 and now 0.001\)"):
        run(*what[:3], replace(TINY, lr=1e-3), path)


def test_what_cannot_be():
    even = ({"width": 15}, {"width": 18, "heads": 6}, {"width": 0})  # heads of a Mosaic have an even size
    numbers = ({"epochs": 0}, {"held_out": 1}, {"lr": 0.0}, {"lr": math.inf}, {"decay": -1.0}, {"dropout": 1.0})
    for changes in (*even, *numbers):
        with pytest.raises(UsageError):
            replace(TINY, **changes)
    with pytest.raises(UsageError, match="architecture 'lstm': choose from mosaic, gpt"):
        run(["gpt", "lstm"], [5], [0], TINY)
    with pytest.raises(UsageError, match="gpt: the loss is no number after . steps"):
        train("gpt", training_automata(TINY, 6, 0), replace(TINY, lr=1e30), 0)


def test_curves(tmp_path, monkeypatch):
    report = run(["gpt"], [5, 8], [0, 1], TINY)
    found = of_seeds(report, "gpt", "tvd")
    assert {n: len(v) for n, v in found.items()} == {5: 2, 8: 2}
    assert found[8] == [r.test.tvd for r in report.runs if r.automata == 8]
    assert of_seeds(report, "mosaic", "tvd") == {}
    lines = {}

    def drawn(pyplot, figure, path):
        for axis in figure.axes:
            lines[axis.get_ylabel()] = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
        save_figure(pyplot, figure, path)

    monkeypatch.setattr("thresher.mosaics.icl.save_figure", drawn)
    plot(report, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert set(lines) == {"accuracy", "TVD"}
    assert list(lines["TVD"]) == ["transformer", "chance", "ngram", "bayes"]
    assert lines["TVD"]["transformer"] == [[5, sum(found[5]) / 2], [8, sum(found[8]) / 2]]
    assert lines["accuracy"]["bayes"] == [
        [0, report.baselines["bayes"].accuracy],
        [1, report.baselines["bayes"].accuracy],
    ]


def test_the_command(tmp_path, capsys):
    app = typer.Typer()
    app.callback()(lambda: None)
    app.command()(with_options(icl))
    sizes = {"--epochs": 1, "--layers": 1, "--width": 16, "--heads": 2, "--held-out": 4, "--batch": 2}
    options = {"--out": tmp_path / "out", "--automata": 2, **sizes, "--threads": 1, "--json": "-"}
    command = ["icl", *(str(part) for option in options.items() for part in option)]
    assert start.run(app, command) == 0
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert [(r["architecture"], r["automata"], r["seed"]) for r in found["runs"]] == [("mosaic", 2, 0), ("gpt", 2, 0)]
    assert found["settings"]["sizes"] == json.loads(json.dumps(asdict(Sizes())))
    for name in ("Memory Mosaic, 2 automata: accuracy 0.", "ngram: accuracy 0.9", "icl.png written"):
        assert name in told.err
    assert (tmp_path / "out" / "icl.png").stat().st_size > 10_000
    assert start.run(app, command) == 0  # seconds, too, are those of the first time: nothing is done again
    assert json.loads(capsys.readouterr().out) == found
    assert start.run(app, [*command, "--arch", "gpt", "--seeds", "2"]) == 0
    told = capsys.readouterr()
    assert [(r["architecture"], r["seed"]) for r in json.loads(told.out)["runs"]] == [("gpt", 0), ("gpt", 1)]
    assert "transformer, 2 automata: accuracy 0." in told.err
    assert " to 0." in told.err
    for wrong, words in ((["--arch", "lstm"], "choose from mosaic, gpt"), (["--automata", "0"], "--automata 0")):
        assert start.run(app, [*command, *wrong]) == 2
        assert words in capsys.readouterr().err
