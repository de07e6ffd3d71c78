import pytest

from thresher.machine.cost import ModelShape
from thresher.speculation.policy import (
    MOST_CHOSEN,
    Acceptance,
    Case,
    Chunk,
    Clock,
    best_plan,
    expected_tokens,
    plan,
)

SHAPE = ModelShape(30, 9, 3, 64, 269_000_000, 134_500_000, 2)


def world(target, per_row, draft):
    """Seconds of passes: of the target by the tokens of all sequences and rows read, of a drafter a constant."""

    def seconds(maker, chunks):
        if maker == "target":
            return target * (1 + per_row * (sum(c.new for c in chunks) - 1)) + 1e-6 * sum(c.past for c in chunks)
        return draft

    return seconds


def trained(seconds, pasts, makers=("target", "self")):
    """A clock that has seen passes of all lengths."""
    clock = Clock(SHAPE, {})
    for _ in range(20):
        for n in range(1, MOST_CHOSEN + 2):
            for maker in makers:
                if maker == "target" or n == 1:
                    chunks = [Chunk(n, past) for past in pasts]
                    clock.observe(maker, chunks, seconds(maker, chunks))
    return clock


def cases(pasts, rates, most=MOST_CHOSEN):
    return [Case(past, None, None, most, [r] * MOST_CHOSEN) for past, r in zip(pasts, rates, strict=True)]


@pytest.mark.parametrize("drafting", [2, 3, 4, 6])
def test_passes_of_which_some_have_no_draft_are_learned(drafting):
    """Of eight sequences only some ever find something to look up: what such passes take is known all the same, and if
    it does not pay, nothing is looked up any more."""
    chunks = [Chunk(2 if i < drafting else 1, 2000) for i in range(8)]
    plain = [Chunk(1, 2000)] * 8
    clock = Clock(SHAPE, {})
    for _ in range(20):
        clock.observe("target", plain, 0.030)
    for _ in range(40):
        clock.observe("target", chunks, 0.040)
    assert clock.seconds("target", chunks) == pytest.approx(0.040, rel=0.1)
    assert clock.seconds("target", plain) < 0.036
    looked_up = [Case(2000, None, None, 1 if i < drafting else 0, [0.3] * MOST_CHOSEN) for i in range(8)]
    assert best_plan(clock, None, looked_up).gammas == [0] * 8
    sure = [Case(2000, None, None, 1 if i < drafting else 0, [1.0] * MOST_CHOSEN) for i in range(8)]
    assert (sum(best_plan(clock, None, sure).gammas) > 0) == (drafting > 2)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.81, 0.95, 1.0])
@pytest.mark.parametrize("gamma", [0, 1, 4, 8])
def test_tokens_of_a_step(alpha, gamma):
    """The closed form, its limits, and a simulation with a fixed seed (spec: T3)."""
    import numpy as np

    closed = gamma + 1 if alpha == 1 else (1 - alpha ** (gamma + 1)) / (1 - alpha)
    assert expected_tokens([alpha] * gamma) == pytest.approx(closed)
    right = np.random.default_rng(0).random((100_000, gamma)) < alpha
    assert abs(1 + right.cumprod(axis=1).sum(axis=1).mean() - closed) < 0.02


@pytest.mark.parametrize("per_row", [0.02, 0.15, 0.4])
@pytest.mark.parametrize("draft", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("rates", [[0.95], [0.6, 0.9], [0.1, 0.1, 0.1, 0.1], [0.98, 0.2, 0.9]])
def test_within_five_percent_of_the_best(per_row, draft, rates):
    """Of all common lengths, with the true times (spec: T9)."""
    pasts = [4096 + 100 * i for i in range(len(rates))]
    seconds = world(0.05, per_row, 0.05 * draft)
    chosen = best_plan(trained(seconds, pasts), "self", cases(pasts, rates))
    true = {}
    for g in range(MOST_CHOSEN + 1):
        taken = seconds("target", [Chunk(1 + g, p) for p in pasts]) + g * 0.05 * draft
        true[g] = sum(expected_tokens([r] * g) for r in rates) / taken
    taken = seconds("target", [Chunk(1 + g, p) for p, g in zip(pasts, chosen.gammas, strict=True)])
    taken += max(chosen.gammas) * 0.05 * draft
    rate = sum(expected_tokens([r] * g) for r, g in zip(rates, chosen.gammas, strict=True)) / taken
    assert rate > 0.95 * max(true.values())
    if max(true.values()) == true[0]:
        assert max(chosen.gammas) == 0


def test_bad_drafts_have_none():
    pasts = [512] * 4
    seconds = world(0.05, 0.3, 0.04)
    assert best_plan(trained(seconds, pasts), "self", cases(pasts, [0.05] * 4)).gammas == [0] * 4
    assert best_plan(trained(seconds, pasts), None, cases(pasts, [0.05] * 4)).gammas == [0] * 4


def test_each_sequence_has_its_own_length():
    pasts = [8192] * 4
    gammas = best_plan(trained(world(0.1, 0.1, 0.01), pasts), "self", cases(pasts, [0.97, 0.97, 0.97, 0.05])).gammas
    assert gammas[0] == gammas[1] == gammas[2] > 2
    assert gammas[3] <= 1


def test_no_more_than_there_is_room_for():
    pasts = [8192] * 2
    clock = trained(world(0.1, 0.02, 0.01), pasts)
    short = [Case(8192, None, None, 2, [0.99] * MOST_CHOSEN), Case(8192, None, None, 0, [0.99] * MOST_CHOSEN)]
    assert best_plan(clock, "self", short).gammas == [2, 0]


def test_another_length_must_be_clearly_better():
    pasts = [8192]
    clock = trained(world(0.1, 0.1, 0.02), pasts)
    rates = {g: plan(clock, "self", cases(pasts, [0.85]), g).rate for g in range(MOST_CHOSEN + 1)}
    best = max(rates, key=rates.get)
    near = next(g for g in rates if g != best and rates[g] * 1.03 > rates[best])
    assert best_plan(clock, "self", cases(pasts, [0.85]), near).gammas == [near]
    assert best_plan(clock, "self", cases(pasts, [0.85]), 0).gammas == [best]


def test_acceptance_follows_what_comes():
    acceptance = Acceptance((0.8,))
    assert acceptance.rates(3) == [0.8] * 3
    for _ in range(100):
        acceptance.observe([1.0, 0.0])
    first, second, third = acceptance.rates(3)
    assert first > 0.95
    assert second < 0.1
    assert third == second  # never seen: no better than the one before
    for _ in range(100):
        acceptance.observe([0.0])
    assert acceptance.rates(1)[0] < 0.2


def test_a_clock_learns_and_extrapolates():
    clock = Clock(SHAPE, {})
    before = clock.seconds("target", [Chunk(1, 4096)])
    for _ in range(30):
        clock.observe("target", [Chunk(1, 4096)], 3 * before)
    assert clock.seconds("target", [Chunk(1, 4096)]) == pytest.approx(3 * before)
    assert clock.seconds("self", [Chunk(1, 4096)]) == pytest.approx(3 * before)
    assert clock.seconds("target", [Chunk(1, 8192)]) > 3 * before
    clock.observe("target", [Chunk(1, 4096)], 1e6)  # a pass that was stopped
    assert clock.seconds("target", [Chunk(1, 4096)]) < 5 * before
