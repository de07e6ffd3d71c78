from dataclasses import replace

import pytest

from thresher.attention.registry import parse_method
from thresher.errors import CapacityError, UsageError
from thresher.evaluation.calibrate import Calibration, calibrate
from thresher.kinetics.check import measured_seconds
from thresher.kinetics.law import DENSE, Reading
from thresher.kinetics.planner import Limits, Machine, Model, Pass, Work, cut, plan_of, rank, with_accuracy
from thresher.kinetics.traces import Question, Sample, Trace
from thresher.machine.devices import device
from thresher.machine.profile import MachineProfile
from thresher.machine.shapes import DECODERS, Decoder

QWEN = Model("qwen3-8b", "bf16", DECODERS["qwen3-8b"].shape())
SMALL = Model("qwen3-0.6b", "bf16", DECODERS["qwen3-0.6b"].shape())
H100 = Machine(device("h100"))


def test_time_is_the_sum_of_the_passes():
    work = Work(100, [400.0])
    plan = plan_of(QWEN, DENSE, 4, 1000, work, H100)
    passes = [H100.pass_seconds(QWEN, DENSE, Pass(1, 4, 100, t + 0.5)) for t in range(400)]
    # The last knot has only one sample left: the others are as long, so none of them ends before.
    assert plan.seconds - H100.prefill_seconds(QWEN.shape, 100) == pytest.approx(sum(passes), rel=0.03)
    assert plan.ms_per_token == pytest.approx(1e3 * sum(passes) / 400, rel=0.03)
    kv = QWEN.shape.kv_bytes_per_token
    assert plan.memory == QWEN.shape.stored_bytes + kv * (100 + 4 * 400)
    assert plan.capacity == (80e9 - QWEN.shape.stored_bytes) // (kv * (100 + 4 * 400))
    assert plan.joules == pytest.approx(700 * plan.seconds)
    assert plan_of(QWEN, DENSE, 4, 200, work, H100).seconds < plan.seconds
    priced = plan_of(QWEN, DENSE, 4, 1000, work, replace(H100, price=3.6))
    assert priced.money == pytest.approx(plan.seconds / 1000)


def test_samples_that_end_make_passes_cheaper():
    some = plan_of(QWEN, DENSE, 4, 10_000, Work(0, [1000.0, 8000.0]), H100)
    every = plan_of(QWEN, DENSE, 4, 10_000, Work(0, [8000.0]), H100)
    alone = plan_of(QWEN, DENSE, 2, 10_000, Work(0, [8000.0]), H100)
    assert alone.seconds < some.seconds < every.seconds


def test_more_devices_questions_and_readings():
    work = Work(2000, [4000.0])
    one = plan_of(QWEN, DENSE, 8, 4000, work, H100)
    assert plan_of(QWEN, DENSE, 8, 4000, work, replace(H100, devices=2)).seconds == pytest.approx(one.seconds / 2)
    assert plan_of(QWEN, DENSE, 8, 4000, work, replace(H100, efficiency=0.5)).seconds == pytest.approx(2 * one.seconds)
    assert plan_of(QWEN, DENSE, 8, 4000, work, replace(H100, additive=False)).seconds < one.seconds
    assert plan_of(QWEN, Reading(256), 8, 4000, work, H100).seconds < one.seconds
    batch = plan_of(QWEN, DENSE, 8, 4000, replace(work, batch=4), H100)
    assert one.seconds < batch.seconds < 4 * one.seconds
    assert batch.memory - QWEN.shape.stored_bytes == 4 * (one.memory - QWEN.shape.stored_bytes)


def test_drafts_are_a_plan():
    work = Work(30_000, [2000.0])
    plain = plan_of(QWEN, DENSE, 8, 2000, work, H100)
    drafted = plan_of(QWEN, Reading(512), 8, 2000, work, H100, acceptance=0.9)
    assert drafted.method == "dense"
    assert drafted.gamma > 0
    assert drafted.speedup > 1
    assert drafted.seconds < plain.seconds
    assert drafted.eflops < plain.eflops
    by_method = plan_of(QWEN, parse_method("auto"), 8, 2000, work, H100, acceptance=0.9)
    assert 1 < by_method.speedup < drafted.speedup
    assert plan_of(QWEN, Reading(512), 1, 2000, work, H100, acceptance=0.0).gamma == 0


def trace(model, method, rates, n=8, length=100):
    questions = tuple(
        Question(
            str(i),
            "1",
            tuple(Sample(length, float(j < round(p * n)), "1" if j < round(p * n) else "2") for j in range(n)),
            10,
        )
        for i, p in enumerate(rates)
    )
    return Trace(model, method, "t", 1000, questions)


def plans(known=(), judge="best"):
    work = Work(10, [100.0])
    made = [plan_of(m, r, n, 1000, work, H100) for m in (QWEN, SMALL) for r in (DENSE, Reading(64)) for n in (1, 4)]
    return [with_accuracy(p, known, judge) for p in made]


KNOWN = [trace("qwen3-8b", "dense", [0.5, 1, 0.75]), trace("qwen3-0.6b", "dense", [0, 0.25, 0.5])]


def test_the_cheapest_without_traces():
    ranking = rank(plans(), Limits())
    seconds = [p.seconds for p in ranking.plans]
    assert seconds == sorted(seconds)
    assert len(seconds) == 8
    assert ranking.plans[0].model == "qwen3-0.6b"
    assert "no traces" in ranking.why
    assert str(ranking.plans[0]) in ranking.why


def test_the_most_accurate_with_traces():
    ranking = rank(plans(KNOWN), Limits())
    best = ranking.plans[0]
    assert (best.model, best.method, best.samples) == ("qwen3-8b", "dense", 4)
    assert best.accuracy.mean > 0.9
    assert "right most often" in ranking.why
    assert [p.accuracy is None for p in ranking.plans] == [False] * 4 + [True] * 4


def test_the_cheapest_that_reaches_a_target():
    ranking = rank(plans(KNOWN), Limits(accuracy=0.7))
    assert all(p.accuracy.mean >= 0.7 for p in ranking.plans)
    assert (ranking.plans[0].model, ranking.plans[0].samples) == ("qwen3-8b", 1)
    assert "reach 0.70" in ranking.why
    majority = plans(KNOWN, "majority")
    assert next(p for p in majority if p.samples == 4 and p.accuracy).accuracy.mean < 1


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(memory=1e9), r"nearest is qwen3-0.6b in bf16.*GB for 1.0"),
        (Limits(seconds=1e-3), r"nearest is qwen3-0.6b.* s for 0.001"),
        (Limits(eflops=1e-3), r"Tera-eFLOPs for 0.001"),
        (Limits(accuracy=0.999), r"nearest is qwen3-8b in bf16, dense, 4 x .*: right in 0.9\d\d for 0.999"),
    ],
)
def test_what_nothing_meets(limits, message):
    with pytest.raises(UsageError, match=message):
        rank(plans(KNOWN), limits)


def test_answers_beyond_the_cap_are_wrong():
    question = Question("a", "1", (Sample(50, 1.0, "1"), Sample(150, 1.0, "1")))
    shorter = cut(question, 100)
    assert [(s.length, s.score, s.answer, s.ended) for s in shorter.samples] == [
        (50, 1, "1", True),
        (100, 0, None, False),
    ]
    plan = with_accuracy(plan_of(QWEN, DENSE, 1, 60, Work(10, [100.0]), H100), KNOWN, "best")
    assert plan.accuracy.mean == 0
    with pytest.raises(UsageError, match="nothing to choose"):
        rank([], Limits())


def test_times_by_what_was_timed():
    shape, profile = SMALL.shape, MachineProfile(1, 1, 1)
    per_token = shape.kv_bytes_per_token
    lines = {"dense": [(512.0 * per_token, 0.001), (8192.0 * per_token, 0.016)], "auto": [(1e6, 0.002)]}
    known = Calibration(profile, {1: 0.1, 8: 0.2}, lines, {"dense": 0, "auto": 2048}, {"dense": 0.5, "auto": 1.0})
    seconds = measured_seconds({SMALL: known})
    assert seconds(SMALL, DENSE, Pass(1, 1, 512, 0)) == pytest.approx(0.101)
    assert seconds(SMALL, DENSE, Pass(1, 1, 256, 0)) == pytest.approx(0.1005)
    middle = 0.001 + 0.015 * (4000 - 512) / (8192 - 512)
    assert seconds(SMALL, DENSE, Pass(1, 1, 4000, 0)) == pytest.approx(0.1 + middle)
    assert seconds(SMALL, DENSE, Pass(8, 1, 8192, 0)) == pytest.approx(0.2 + 4 * 0.016)
    assert seconds(SMALL, DENSE, Pass(1, 1, 16384 - 512, 0)) == pytest.approx(0.1 + 0.016 + 0.015)
    # Samples of one prompt read its rows once.
    assert seconds(SMALL, DENSE, Pass(1, 8, 4096, 0)) == pytest.approx(0.2 + 4 * 0.001)
    assert seconds(SMALL, DENSE, Pass(16, 1, 0, 0)) == pytest.approx(0.4)
    method = parse_method("auto")
    assert seconds(SMALL, method, Pass(1, 1, 512, 0)) == pytest.approx(0.101)  # read densely
    assert seconds(SMALL, method, Pass(1, 1, 16384, 0)) == pytest.approx(
        0.1 + 0.002 * method.cost(shape, 16384).bytes / 1e6, rel=1e-6
    )


def test_layers_that_memory_has_no_room_for(monkeypatch):
    monkeypatch.setattr("thresher.evaluation.calibrate.available_memory", lambda: 10**6)
    with pytest.raises(CapacityError, match="and 0 are free"):
        calibrate(DECODERS["qwen3-0.6b"], "bf16", [], [1], [64])


def test_some_layers_stand_for_all(monkeypatch):
    """Twelve layers of which four are made: a pass takes about three times what these take, and what is no layer
    once."""
    monkeypatch.setattr("thresher.evaluation.calibrate._WEIGHTS", 4 * 2 * 590_000)
    decoder = Decoder(12, 4, 2, 256, 512, 512)
    some, all_of_four = (calibrate(d, "float32", [], [1], [64]) for d in (decoder, replace(decoder, layers=4)))
    size = some.attention["dense"][0][0]
    assert size == 12 * 64 * 2 * 2 * 64 * 4
    assert all_of_four.attention["dense"][0][0] == size / 3


def test_layers_are_timed():
    decoder = Decoder(6, 4, 2, 64, 128, 512)
    method = parse_method("streaming:sinks=1,window=32")
    found = calibrate(decoder, "float32", [method], [1, 3], contexts=(64, 512))
    assert found.passes[1] > 0
    assert set(found.passes) == {1, 3}
    assert [size for size, _ in found.attention["dense"]] == [n * 6 * 2 * 2 * 16 * 4 for n in (64, 512)]
    assert len(found.attention[str(method)]) == 2
    assert 0 < found.together["dense"] <= 1.5
    sparse = parse_method("topk:budget=16")
    assert calibrate(decoder, "bf16", [sparse], [1], contexts=(64,)).dense_up_to[str(sparse)] == 1 << 62
    for wrong in (replace(decoder, experts=4, experts_used=1), replace(decoder, recurrent=2)):
        with pytest.raises(UsageError, match="not timed"):
            calibrate(wrong, "bf16", [], [1], [64])
    with pytest.raises(UsageError, match="computes in"):
        calibrate(decoder, "fp8", [], [1], [64])
