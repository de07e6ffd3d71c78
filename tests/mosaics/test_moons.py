import math
from dataclasses import asdict

import pytest
import torch

from thresher.errors import UsageError
from thresher.mosaics import moons
from thresher.mosaics.moons import SHARPNESS, Mosaic, Settings

QUICK = Settings(steps=450, block=216, starts=1)  # common period 72: half as fine as the default


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    pass


def random_net(heads, seed=0):
    return moons.initial(heads, torch.Generator().manual_seed(seed))


def sequences(count=3, steps=40, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return moons.draw(moons.triples(), count, steps, Settings().pace, generator)


def test_triples():
    found = moons.triples()
    assert len(set(found)) == 35
    common = [moons.common_period(t) for t in found]
    assert common == sorted(common)
    train, held_out = moons.split()
    assert [*train, held_out] == found[:9]
    assert [moons.common_period(t) for t in [*train, held_out]] == [2, 3, 3, 3, 3, 5, 6, 6, 6]
    assert held_out == (1, 1.5, 2)
    assert held_out not in train
    assert {p for t in train for p in t} >= set(held_out)


def test_orbits_come_back_after_the_common_period_and_not_before():
    pace = 24  # so that every period is a whole number of steps
    for triple in moons.triples():
        common = round(moons.common_period(triple) * pace)
        x = moons.orbits(torch.tensor([triple]), torch.tensor([7]), 2 * common, pace)[0]
        assert torch.allclose(x[:common], x[common:], atol=1e-5)
        away = (x[1:common] - x[0]).abs().amax(-1)
        assert away.min() > 1e-3
        for i, period in enumerate(triple):
            one, turn = x[:, 2 * i : 2 * i + 2], round(period * pace)
            assert torch.allclose(one[:-turn], one[turn:], atol=1e-5)
            assert torch.allclose(one.norm(dim=-1), torch.ones(()))


def test_a_block_holds_its_turns():
    train, held_out = moons.split()
    longest = max(map(moons.common_period, [*train, held_out]))
    assert 3 * longest * moons.PUBLISHED.pace == pytest.approx(800)
    assert moons.in_steps(held_out, Settings().pace).common == pytest.approx(400 / 3)
    settings = Settings(steps=9, batch=4, block=399)
    assert [settings.shape(s) for s in range(9)] == [(12, 133)] * 6 + [(4, 399)] * 3
    assert moons.PUBLISHED.shape(0) == moons.PUBLISHED.shape(499) == (64, 800)


def test_matrices_are_complex():
    net = random_net(3)
    x = torch.randn(7, 6)
    for weights, matrix in zip(net.weights, moons.matrices(net.weights), strict=True):
        expected = torch.view_as_complex(x.view(7, 3, 2)) @ torch.view_as_complex(weights).T
        assert torch.allclose(torch.view_as_real(expected).view(7, 6), x @ matrix.T, atol=1e-6)


def by_definition(net, x, weigh):
    """Kernel regression pair by pair over one sequence [T, 6]."""
    key, value, output = moons.matrices(net.weights)
    width = 6 // net.heads
    found = [torch.zeros(6, dtype=x.dtype)]
    for t in range(1, len(x)):
        answers = []
        for h in range(net.heads):
            part = slice(h * width, (h + 1) * width)
            weights = [weigh(key[part] @ x[t], key[part] @ x[i]) for i in range(t)]
            values = [value[part] @ x[i + 1] for i in range(t)]
            answers.append(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))
        found.append(output @ torch.cat(answers))
    return torch.stack(found)


@pytest.mark.parametrize("heads", [1, 3])
def test_predictions_are_those_of_the_definition(heads):
    net = Mosaic(heads, random_net(heads).weights.double())
    x = sequences().double()
    expected = torch.stack([by_definition(net, s, lambda q, k: torch.exp(SHARPNESS * q @ k)) for s in x])
    assert torch.allclose(moons.predict(net, x), expected, atol=1e-12, rtol=0)


def test_softmax_is_gaussian_where_keys_have_one_length():
    """As in a head that has one moon: |q - k|^2 = 2 - 2 q k, of which the 2 cancels."""
    weights = random_net(3).weights.double()
    weights[0] = 0
    weights[0, range(3), [2, 0, 1]] = torch.tensor([0.6, 0.8]).double()
    net, x = Mosaic(3, weights), sequences().double()
    gaussian = [by_definition(net, s, lambda q, k: torch.exp(-SHARPNESS / 2 * (q - k).square().sum())) for s in x]
    # Orbits are of float32, so their keys have one length to 1e-7 only.
    assert torch.allclose(moons.predict(net, x), torch.stack(gaussian), atol=1e-5, rtol=0)
    exact = x.unflatten(-1, (3, 2))
    exact = (exact / exact.norm(dim=-1, keepdim=True)).flatten(-2)
    gaussian = [by_definition(net, s, lambda q, k: torch.exp(-SHARPNESS / 2 * (q - k).square().sum())) for s in exact]
    assert torch.allclose(moons.predict(net, exact), torch.stack(gaussian), atol=1e-12, rtol=0)


@pytest.mark.parametrize("heads", [1, 3])
def test_nothing_leaks(heads):
    net, x = random_net(heads), sequences()
    found = moons.predict(net, x)
    for t in (0, 1, 17, 38):
        changed = x.clone()
        changed[:, t + 1 :] = torch.randn(changed[:, t + 1 :].shape, generator=torch.Generator().manual_seed(t))
        assert torch.equal(moons.predict(net, changed)[:, : t + 1], found[:, : t + 1])
        changed = x.clone()
        changed[:, t] += 0.1
        same = (moons.predict(net, changed)[:, t] == found[:, t]).all()
        assert same == (t == 0)  # the first has no memory to ask


@pytest.mark.parametrize("heads", [1, 3])
def test_attention_gives_the_predictions(heads):
    net, x = random_net(heads), sequences(1)
    weights = moons.attention(net, x[0])
    assert weights.triu().abs().max() == 0
    assert torch.allclose(weights.sum(-1)[:, 1:], torch.ones(heads, 39))
    _, value, output = moons.matrices(net.weights)
    values = (x[0, 1:] @ value.T).view(39, heads, -1).transpose(0, 1)
    answers = (weights[:, :, :-1] @ values).transpose(0, 1).reshape(40, 6) @ output.T
    assert torch.allclose(answers, moons.predict(net, x)[0], atol=1e-5)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("context", [1, 2, 15])
def test_generation_is_prediction_again_and_again(heads, context):
    net, x = random_net(heads), sequences()
    expected = x[:, :context]
    for _ in range(6):
        expected = torch.cat((expected, moons.predict(net, expected)[:, -1:]), 1)
    assert torch.allclose(moons.generate(net, x[:, :context], 6), expected[:, context:], atol=1e-5)


def test_the_same_seed_gives_the_same_net():
    settings = Settings(steps=6, batch=2, block=216)
    first, again, other = (moons.train(3, seed, settings) for seed in (1, 1, 2))
    assert torch.equal(first[0].weights, again[0].weights)
    assert first[1] == again[1]
    assert not torch.equal(first[0].weights, other[0].weights)


def test_training_never_sees_the_held_out_moons(monkeypatch):
    seen, draw = [], moons.draw
    monkeypatch.setattr(moons, "draw", lambda choices, *rest: seen.append(choices) or draw(choices, *rest))
    moons.train(1, 0, Settings(steps=3, batch=2, block=216))
    assert seen == [moons.split()[0]] * 5  # 2 of each start, and 1


def test_the_better_start_goes_on(monkeypatch):
    """Losses are told by the test: the first start goes up, the second down."""
    nets, told = [], iter([1.0, 2.0, 1.0, 0.5, 0.1])

    def step(net, optimizer, at, settings, generator):
        nets.append(net)
        return next(told)

    monkeypatch.setattr(moons, "_step", step)
    steps = []
    settings = Settings(steps=3, batch=2, block=216)
    net, loss = moons.train(3, 0, settings, steps.append)
    assert steps == list(range(1, settings.all_steps + 1))
    assert nets[0] is nets[1]
    assert nets[2] is nets[3] is nets[4]
    assert not torch.equal(nets[0].weights, nets[2].weights)
    assert torch.equal(net.weights, nets[2].weights)
    assert loss == 0.1


def owning(moon_of, rest, heads=3):
    """Heads that own these moons, and everything else as large as `rest`."""
    weights = torch.full((3, 3, 3, 2), rest / math.sqrt(2))
    for head, moon in enumerate(moon_of):
        for matrix, row, column in ((0, head, moon), (1, head, moon), (2, moon, head)):
            weights[matrix, row, column] = torch.tensor([0.6, -0.8])
    return Mosaic(heads, weights)


def test_heads_that_own_a_moon_each():
    least, separated = moons.owners(owning((2, 0, 1), 0.1))
    assert least == pytest.approx(10)
    assert separated
    assert not moons.owners(owning((2, 0, 1), 0.21))[1]  # not clear enough
    assert moons.owners(owning((2, 0, 1), 0.1, heads=1)) == (pytest.approx(10), False)
    twice = owning((2, 2, 1), 0.1)
    assert moons.owners(twice)[0] <= 1
    assert not moons.owners(twice)[1]
    for matrix in range(3):  # key, value or output of another moon
        crossed = owning((2, 0, 1), 0.1)
        crossed.weights[matrix] = owning((2, 1, 0), 0.1).weights[matrix]
        assert moons.owners(crossed) == (pytest.approx(10), False)


def test_dominance_looks_along_rows_and_columns():
    found = torch.tensor([[1, 0.25, 0], [0, 2, 0], [0, 0, 3]])
    assert moons.dominance(found) == pytest.approx(4)  # 1 to 0.25 in its row; 2 to 0.25 in its column
    assert moons.dominance(found.T) == pytest.approx(4)


@pytest.fixture(scope="module")
def trained():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    steps = []
    found = moons.run(QUICK, [0], sequences=12, generated=4, progress=lambda done, total: steps.append((done, total)))
    torch.set_num_threads(threads)
    assert steps == [(i, 900) for i in range(1, 901)]
    return found


def test_three_heads_know_the_moons_long_before_one(trained):
    """The claim of the paper, on periods that no training sequence had together."""
    one, three = sorted(trained.nets, key=lambda n: n.heads)
    assert three.separated
    assert three.dominance > 5
    assert not one.separated
    for of_one, of_three, kind in (
        (one.train, three.train, trained.train),
        (one.held_out, three.held_out, trained.held_out),
    ):
        assert of_three.before < 0.03 < 0.06 < of_one.before
        assert of_one.after < of_one.before / 2
        assert of_three.settled < 1.5 * kind.longest
        assert 0.9 * kind.common < of_one.settled < 1.2 * kind.common
        assert len(of_three.prediction) == 1.75 * 72


def test_measures_are_of_the_predictions(trained):
    net = trained.nets[1]
    moon = trained.held_out
    prediction = net.held_out.prediction
    between = [e for t, e in enumerate(prediction, 1) if 1.5 * moon.longest <= t < 0.9 * moon.common]
    assert net.held_out.before == pytest.approx(sum(between) / len(between), abs=1e-5)
    settled = net.held_out.settled
    assert prediction[settled - 2] > moons.CLOSE >= max(prediction[settled - 1 :])
    assert len(net.held_out.generation) == len(trained.contexts)
    largest = {name: max(range(3), key=lambda i: m[0][i]) for name, m in net.maps.items()}
    assert largest["key"] == largest["value"]


def test_a_picture_of_it(trained, tmp_path):
    pytest.importorskip("matplotlib")
    from thresher.mosaics.moons_plot import attention_of, plot_moons

    plot_moons(trained, tmp_path / "moons.png")
    assert (tmp_path / "moons.png").stat().st_size > 50_000
    one, three = (attention_of(trained, net) for net in trained.nets)
    assert one.shape == (1, 108, 108)
    assert three.shape == (3, 108, 108)


def test_the_command(capsys, tmp_path):
    import json

    from thresher.cli.mosaic_moons import moons as command

    target = tmp_path / "moons.json"
    command(seeds="4", steps=3, batch=1, block=72, json=target)
    found = json.loads(target.read_text())
    assert [(n["heads"], n["seed"]) for n in found["nets"]] == [(1, 4), (3, 4)]
    assert found["settings"] == asdict(Settings(steps=3, batch=1, block=72))
    assert "0 of 1 nets" in capsys.readouterr().err


def test_what_cannot_be():
    from thresher.cli.mosaic_moons import moons as command

    for given in ({"steps": 0}, {"batch": -1}, {"turns": 0.5}, {"turns": math.nan}, {"starts": 0}):
        with pytest.raises(UsageError, match="at least 1"):
            Settings(**given)
    for given in ({"short": 1.5}, {"short": -0.1}, {"short": 0}):
        with pytest.raises(UsageError, match="short is between"):
            Settings(**given)
    with pytest.raises(UsageError, match="needs 2 a turn, so 72"):
        Settings(block=71)
    with pytest.raises(UsageError, match="2 heads"):
        moons.run(Settings(), [0], heads=[2])
    for seeds in ("", "1,", "-1", "1.5", "x"):
        with pytest.raises(UsageError, match="--seeds"):
            command(seeds=seeds)
