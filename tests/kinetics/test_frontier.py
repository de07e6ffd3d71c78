import itertools
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from thresher.errors import UsageError
from thresher.kinetics.frontier import best_models, costs_between, growth, held_out, oracle, oracle_interval, single
from thresher.kinetics.grid import Cell, Config, grid_of, sample_costs, table_cells, trace_cells
from thresher.kinetics.law import DENSE, Reading, run_cost
from thresher.kinetics.published import read_table, trace_of_table
from thresher.kinetics.traces import Question, Sample, Trace
from thresher.machine.devices import device
from thresher.machine.shapes import DECODERS

TABLES = Path(os.environ.get("THRESHER_AIME24", Path(__file__).parents[3] / "shared/data/kinetics-aime24"))
needs_tables = pytest.mark.skipif(not TABLES.is_dir(), reason="the published result tables of Kinetics are not here")
MODELS = [f"qwen3-{size}" for size in ("0.6b", "1.7b", "4b", "8b", "14b", "32b")]


def random_grid(seed=0, configs=6, questions=3, method="topk64"):
    rng = np.random.default_rng(seed)
    cells = []
    for i in range(configs):
        config = Config(f"m{i % 2}", method, 100, 2 ** (i // 2))
        for q in range(questions):
            c = int(rng.integers(0, 9))
            accuracy = float(rng.integers(0, 5)) / 4
            cells.append(Cell(config, str(q), accuracy, *rng.uniform(1, 10, 2).tolist(), 8, c, 50))
    return grid_of(cells)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("axis", ["eflops", "flops"])
def test_oracle_is_the_best_of_every_assignment(seed, axis):
    grid = random_grid(seed)
    for cost in (3.0, 7.0, 12.0, 20.0):
        best = 0.0
        price = grid.cost(axis)
        for chosen in itertools.product(range(-1, len(grid.configs)), repeat=3):
            if all(i < 0 or price[i, q] <= cost for q, i in enumerate(chosen)):
                best = max(best, sum(grid.accuracy[i, q] if i >= 0 else 0 for q, i in enumerate(chosen)) / 3)
        assert oracle(grid, np.array([cost]), axis)[0] == pytest.approx(best)


def test_more_money_and_more_choice_never_hurt():
    grid, costs = random_grid(7, 10, 20), costs_between(1, 30)
    whole = oracle(grid, costs)
    assert (np.diff(whole) >= 0).all()
    fixed, chosen = single(grid, costs)
    assert (fixed <= whole + 1e-12).all()
    assert chosen[0] is None
    assert fixed[0] == 0
    for name in grid.models:
        assert (oracle(grid.where(lambda c, name=name: c.model == name), costs) <= whole + 1e-12).all()
    best = best_models(grid, costs)
    assert (best.accuracy <= whole + 1e-12).all()
    assert best.model[0] is None
    assert (oracle(grid.where(lambda c: False), costs) == 0).all()
    for interval, mean in zip(oracle_interval(grid, costs), whole, strict=True):
        assert interval.low <= mean <= interval.high


def test_choosing_by_noise_gains_nothing_on_the_other_half():
    """Twenty configurations of the same chance: the oracle takes the luckiest, which is no better on other samples."""
    rng = np.random.default_rng(0)
    cells = [
        Cell(Config(f"m{i}", "dense", 9, 1), str(q), c / 16, 1.0, 1.0, 16, c, 5)
        for i in range(20)
        for q in range(50)
        for c in [int(rng.binomial(16, 0.4))]
    ]
    grid, costs = grid_of(cells), np.array([3.0])
    mean = grid.accuracy.mean()
    assert oracle(grid, costs)[0] > 0.6
    assert held_out(grid, costs)[0] == pytest.approx(mean, abs=0.02)
    assert held_out(grid, np.array([1.0]))[0] == 0


def test_grids_that_cannot_be():
    cell = Cell(Config("m", "dense", 9, 1), "a", 0.5, 1, 1, 2, 1, 5)
    for cells, message in (
        ([], "at least one"),
        ([cell, cell], "there twice"),
        ([cell, replace(cell, config=Config("n", "dense", 9, 1), question="b")], "has no question"),
    ):
        with pytest.raises(UsageError, match=message):
            grid_of(cells)
    grid = grid_of([replace(cell, correct=np.nan)])
    with pytest.raises(UsageError, match="how many are right"):
        held_out(grid, np.array([1.0]))
    with pytest.raises(UsageError, match="axis"):
        grid.cost("money")
    for low, high in ((0, 1), (2, 1), (1, np.inf)):
        with pytest.raises(UsageError, match="above 0"):
            costs_between(low, high)
    with pytest.raises(UsageError, match="at least two costs"):
        growth(grid, costs_between(1, 3))


def test_a_known_law_is_found():
    """Accuracy grows with the budget B up to cost^0.3 and with the samples: the best configuration at a cost c is the
    one of budget nearest c^0.3 and of tokens c^0.7."""
    rng = np.random.default_rng(1)
    budgets = [2**i for i in range(14)]
    counts = [2**i for i in range(17)]
    cells = []
    for q in range(40):
        lift = float(np.exp(rng.normal(0, 0.3)))
        for b in budgets:
            for n in counts:
                cost = lift * b * n
                worth = 1 - 1 / (1 + min(b ** (1 / 0.3), n ** (1 / 0.7)) / 1e4)
                cells.append(Cell(Config("m", f"topk{b}", 9, n), str(q), worth, cost, 0.0, n, 0, 1))
    found = growth(grid_of(cells), costs_between(100, 1e6), resamples=100)
    assert found.budget.low <= 0.3 + 0.02
    assert found.budget.high >= 0.3 - 0.02
    assert found.tokens.low <= 0.7 + 0.02
    assert found.tokens.high >= 0.7 - 0.02
    assert found.tokens.mean == pytest.approx(0.7, abs=0.06)
    assert found.budget.mean == pytest.approx(0.3, abs=0.06)


def test_the_cheapest_of_equals_counts():
    made = [(64, 1, 0.5, 20), (8, 1, 0.5, 10), (128, 4, 0.8, 100), (256, 16, 1.0, 1000)]
    cells = [Cell(Config("m", f"topk{b}", 9, n), "a", acc, cost, 0.0, 16, 0, 7) for b, n, acc, cost in made]
    found = growth(grid_of(cells), np.array([30.0, 300.0, 3000.0]))
    assert found.points == 2  # at 3,000 all is reached
    assert found.budget.mean == pytest.approx(np.log(128 / 8) / np.log(10))
    assert found.tokens.mean == pytest.approx(np.log(4) / np.log(10))


def test_cells_of_a_trace_are_those_of_the_law():
    samples = tuple(Sample(length, float(length < 30)) for length in (20, 40, 60, 80))
    trace = Trace("qwen3-8b", "topk64", "t", 100, (Question("a", "1", samples, 50),))
    shape = DECODERS["qwen3-8b"].shape()
    one, two = trace_cells(trace, shape, 100.0, [1, 2])
    assert (one.accuracy, two.accuracy) == (0.25, 0.5)
    assert two.compute == pytest.approx(2 * one.compute)
    assert one.length == 50
    each = sample_costs(trace, shape, 100.0)
    assert len(each) == 4
    assert each.mean() == pytest.approx(one.compute + one.memory)
    ours = replace(trace, method="topk:window=8,budget=52")
    (priced,), (free,) = (trace_cells(ours, shape, 100.0, [1], oracle_search=oracle) for oracle in (False, True))
    assert (free.compute, free.memory) == (one.compute, one.memory)
    assert priced.memory > free.memory
    with pytest.raises(UsageError, match="has no prompt length"):
        list(trace_cells(replace(trace, questions=(replace(trace.questions[0], prompt=None),)), shape, 1.0, [1]))


@pytest.fixture(scope="module")
def tables():
    found = [read_table(path) for path in sorted(TABLES.glob("*.csv"))]
    return sorted(found, key=lambda t: MODELS.index(t.model))


@pytest.fixture(scope="module")
def published(tables):
    return grid_of(c for t in tables if not (t.copy or t.doubt or "local128" in t.source) for c in table_cells(t))


@needs_tables
def test_published_accuracies(published):
    dense = {
        (c.model, c.samples): published.accuracy[i].mean()
        for i, c in enumerate(published.configs)
        if c.method == "dense"
    }
    for model, one, most in zip(
        MODELS, (0.115, 0.458, 0.717, 0.752, 0.796, 0.821), (0.467, 0.767, 0.867, 0.900, 0.900, 0.933), strict=True
    ):
        assert dense[model, 1] == pytest.approx(one, abs=1e-3)
        assert dense[model, {"qwen3-14b": 16, "qwen3-32b": 8}.get(model, 32)] == pytest.approx(most, abs=1e-3)
    for method, one, tokens, cost in (
        ("dense", 0.752, 13939, 11156),
        ("topk1024", 0.759, 14320, 1489),
        ("topk512", 0.756, 14819, 881),
        ("topk256", 0.701, 15963, 603),
        ("topk128", 0.643, 18540, 502),
        ("topk64", 0.420, 22049, 479),
        ("topk32", 0.226, 26225, 500),
    ):
        row = published.where(lambda c, m=method: (c.model, c.method, c.samples) == ("qwen3-8b", m, 1))
        assert row.accuracy.mean() == pytest.approx(one, abs=1e-3)
        assert row.length.mean() == pytest.approx(tokens, abs=1)
        assert row.cost("eflops").mean() == pytest.approx(cost, abs=1)


@needs_tables
def test_published_costs_and_their_split(published):
    for model, cost, compute in zip(
        MODELS, (8421, 9780, 10190, 11156, 10027, 14965), (51, 96, 177, 305, 438, 960), strict=True
    ):
        row = published.where(lambda c, m=model: (c.model, c.method, c.samples) == (m, "dense", 1))
        assert row.cost("eflops").mean() == pytest.approx(cost, abs=1)
        assert row.cost("flops").mean() == pytest.approx(compute, abs=1)


@needs_tables
def test_published_frontiers(published):
    costs = 10 ** np.arange(2.75, 5.01, 0.25)
    dense = best_models(published.where(lambda c: c.method == "dense"), costs)
    sparse = best_models(published.where(lambda c: c.method != "dense"), costs)
    assert dense.accuracy == pytest.approx([0, 0.067, 0.200, 0.300, 0.400, 0.590, 0.724, 0.822, 0.840, 0.873], abs=1e-3)
    assert sparse.accuracy == pytest.approx(
        [0.657, 0.733, 0.780, 0.821, 0.842, 0.875, 0.924, 0.933, 0.933, 0.933], abs=1e-3
    )
    sizes = [m and m.removeprefix("qwen3-") for m in dense.model]
    assert sizes == [None, "4b", "14b", "4b", "14b", "14b", "14b", "14b", "32b", "32b"]
    assert [m.removeprefix("qwen3-") for m in sparse.model[:8]] == ["4b", "4b", "8b", "8b", *["32b"] * 4]
    gaps = sparse.accuracy - dense.accuracy
    assert gaps[0] == pytest.approx(0.657, abs=1e-3)
    assert gaps[-1] == pytest.approx(0.060, abs=1e-3)


@needs_tables
def test_published_frontier_by_arithmetic_alone(published):
    costs = 10 ** np.array([2, 2.5, 2.75, 3, 3.25, 3.5])
    found = best_models(published.where(lambda c: c.method == "dense"), costs, "flops")
    assert found.accuracy == pytest.approx([0.336, 0.692, 0.782, 0.812, 0.837, 0.856], abs=1e-3)
    assert [m.removeprefix("qwen3-") for m in found.model] == ["1.7b", "4b", "4b", "4b", "14b", "8b"]


@needs_tables
def test_a_table_that_was_costed_as_dense_is_doubted(tables):
    doubted = [t for t in tables if t.doubt]
    assert [(t.model, t.method) for t in doubted] == [("qwen3-32b", "topk128")]


def law_shape(model, parameters=None):
    decoder = DECODERS[model]
    return replace(decoder.shape(), weight_count=round(parameters or decoder.parameters))


def solve_prompt(cost_of, cost):
    """The prompt whose cost is this, where the cost grows linearly with it."""
    at_zero = cost_of(0)
    return (cost - at_zero) / (cost_of(1) - at_zero)


def test_prompt_of_a_stated_cost():
    shape = law_shape("qwen3-0.6b")
    cost_of = lambda prompt: run_cost(shape, Reading(20), prompt, [100, 30]).total.flops  # noqa: E731
    dense = lambda prompt: run_cost(shape, DENSE, prompt, [100, 30]).total.flops  # noqa: E731
    assert solve_prompt(dense, dense(177)) == pytest.approx(177)
    assert cost_of(50) == cost_of(20)  # beyond the budget a prompt costs nothing


def prompts_of(table, shape, intensity):
    """By what reading a dense cache costs for one answer; the tables do not state them."""
    found = {}
    for row in (r for r in table.rows if r.samples == 1):

        def memory(prompt, row=row):
            return intensity * run_cost(shape, DENSE, prompt, row.lengths).total.bytes * 1e-12

        found[row.question] = solve_prompt(memory, row.memory)
    return found


@needs_tables
def test_law_gives_the_published_costs(tables):
    """Prompts that follow from the memory of one answer are whole and the same for all models; then so are all other
    costs, of sparse tables but for the sign that is wrong in the published code. The 14B's have 14.33e9 parameters."""
    intensity, prompts = device("b200-fp8").intensity, None
    for table in (t for t in tables if t.method == "dense"):
        shape = law_shape(table.model, 14.33e9 if table.model == "qwen3-14b" else None)
        found = prompts_of(table, shape, intensity)
        assert all(abs(p - round(p)) < 1e-3 for p in found.values())
        prompts = prompts or {q: round(p) for q, p in found.items()}
        assert found == pytest.approx(prompts)
        for row in table.rows:
            cost = run_cost(shape, DENSE, prompts[row.question], row.lengths, row.samples).total
            assert cost.flops * 1e-12 == pytest.approx(row.compute, rel=1e-9)
            assert intensity * cost.bytes * 1e-12 == pytest.approx(row.memory, rel=1e-9)
    assert len(prompts) == 30
    assert prompts["1"] == 177
    sparse, shape = next(t for t in tables if (t.model, t.method) == ("qwen3-8b", "topk256")), law_shape("qwen3-8b")
    trace = trace_of_table(sparse, lambda row: prompts[row.question])
    rows = [r for r in sparse.rows if r.samples == 1]
    for cell, row in zip(trace_cells(trace, shape, intensity, [1]), rows, strict=True):
        too_many = max(0, 256 - prompts[row.question]) ** 2 * shape.kv_bytes_per_token
        assert cell.memory + intensity * too_many * 1e-12 == pytest.approx(row.memory, rel=1e-9)
        assert cell.accuracy == pytest.approx(row.coverage)


@needs_tables
def test_published_growth(published):
    """Paper: a cost twice as high takes 1.18 times the budget (exponent 0.24) and 1.74 times the tokens (0.80)."""
    costs = costs_between(45, 4e4)
    for model in MODELS:
        found = growth(published.where(lambda c, m=model: c.model == m), costs, resamples=100)
        assert 0.1 <= found.budget.mean <= 0.46
        assert 0.67 <= found.tokens.mean <= 0.92
        assert found.budget.high < found.tokens.low
