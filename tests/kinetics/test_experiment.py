import json
import sys

import pytest

from thresher.engine.llm import LLM
from thresher.errors import StorageError, UsageError
from thresher.kinetics.adaptive import Stopping
from thresher.kinetics.experiment import Experiment, Round, TraceFile, answer, chunks, rounds_left, run, seed_of
from thresher.kinetics.published import read_trace
from thresher.kinetics.spread import here, on_ray, processes
from thresher.kinetics.tasks import generate
from thresher.kinetics.traces import Sample

PROBLEMS = generate("sums", 4, 1)
SETTINGS = {"weights": "float32", "max_tokens": 12, "framing": "plain"}


@pytest.fixture(scope="module")
def llm(tiny_folder):
    return LLM(tiny_folder, weights="float32")


def experiment(**changes):
    return Experiment("tiny", "sums1", **(SETTINGS | changes))


def fake(experiment_, right=lambda problem, index: False):
    """Answers without a model."""

    def answered(rounds):
        for r in rounds:
            for i in range(r.first, r.first + r.count):
                score = float(right(r.problem, i))
                yield {"question": r.problem.key, "gold": r.problem.gold, "sample": i, "length": 5, "score": score}

    return answered


def entries(path):
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def test_every_sample_once(llm, tmp_path):
    path = tmp_path / "t.jsonl"
    run(experiment(), PROBLEMS, 3, path, here(llm, experiment()))
    found = entries(path)
    assert sorted((e["question"], e["sample"]) for e in found) == sorted((p.key, i) for p in PROBLEMS for i in range(3))
    assert all(0 < e["length"] <= 12 and e["prompt"] > 10 and e["seconds"] > 0 for e in found)
    trace = read_trace(path)
    assert (trace.model, trace.method, trace.cap, trace.samples) == ("tiny", "dense", 12, 3)
    assert len({e["text"] for e in found}) > 6  # samples are not all the same


def test_killed_anywhere_it_goes_on(llm, tmp_path):
    path = tmp_path / "t.jsonl"
    run(experiment(), PROBLEMS, 3, path, here(llm, experiment()))
    drop = lambda e: {k: v for k, v in e.items() if k != "seconds"}  # noqa: E731
    whole = {(e["question"], e["sample"]): drop(e) for e in entries(path)}
    data = path.read_bytes()
    for cut in range(0, len(data), len(data) // 6):
        path.write_bytes(data[:cut])
        run(experiment(), PROBLEMS, 3, path, here(llm, experiment()))
        found = entries(path)
        assert len(found) == 12
        assert {(e["question"], e["sample"]): drop(e) for e in found} == whole


def test_other_settings_are_refused(tmp_path):
    path = tmp_path / "t.jsonl"
    run(experiment(), PROBLEMS, 1, path, fake(experiment()))
    with pytest.raises(UsageError, match=r"other settings \(max_tokens 12 and now 13\)"):
        run(experiment(max_tokens=13), PROBLEMS, 1, path, fake(experiment()))
    with TraceFile(path, experiment()), pytest.raises(StorageError, match="another run is writing"):
        TraceFile(path, experiment())
    path.write_text("a,b\n")
    with pytest.raises(UsageError, match="is not a file of traces; give another --out"):
        TraceFile(path, experiment())
    with pytest.raises(UsageError, match="same id"):
        run(experiment(), [PROBLEMS[0]] * 2, 1, tmp_path / "u", fake(experiment()))


def test_more_samples_are_added(tmp_path):
    path = tmp_path / "t.jsonl"
    run(experiment(), PROBLEMS[:2], 2, path, fake(experiment()))
    with TraceFile(path, experiment()) as file:
        assert [r.count for r in rounds_left(PROBLEMS, 2, Stopping(), file.samples)] == [2, 2]
    run(experiment(), PROBLEMS, 2, path, fake(experiment()))
    assert len(entries(path)) == 8


def test_stopping_early(tmp_path):
    rule = Stopping("verifier", step=2)
    one = experiment(stopping=rule)
    asked = []

    def answered(rounds):
        asked.append([(r.problem.key, r.first, r.count) for r in rounds])
        yield from fake(one, lambda p, i: (p is PROBLEMS[0] and i == 1) or (p is PROBLEMS[1] and i == 3))(rounds)

    run(one, PROBLEMS[:3], 5, tmp_path / "t", answered)
    keys = [p.key for p in PROBLEMS]
    assert asked == [
        [(keys[0], 0, 2), (keys[1], 0, 2), (keys[2], 0, 2)],
        [(keys[1], 2, 2), (keys[2], 2, 2)],
        [(keys[2], 4, 1)],
    ]
    run(one, PROBLEMS[:3], 5, tmp_path / "t", lambda rounds: pytest.fail("asked again"))


def test_seeds_are_those_of_the_request():
    one = experiment()
    assert seed_of(one, "a", 0) == seed_of(one, "a", 0) != seed_of(one, "a", 4)
    assert seed_of(one, "a", 0) != seed_of(experiment(seed=1), "a", 0)
    assert 0 <= seed_of(one, "a", 0) < 2**64


def test_chunks_keep_order_and_bounds():
    rounds = [Round(p, 0, n) for p, n in zip(PROBLEMS, (3, 3, 70, 1), strict=True)]
    assert [[r.count for r in part] for part in chunks(rounds, 64)] == [[3, 3], [70], [1]]
    assert list(chunks([], 64)) == []


def test_sparse_answers_and_failures(llm):
    found = list(answer(llm, experiment(method="topk:budget=64"), [Round(PROBLEMS[0], 0, 2)]))
    assert sorted(entry["sample"] for _, entry in found) == [0, 1]
    with pytest.raises(UsageError):
        list(answer(llm, experiment(method="nothing"), [Round(PROBLEMS[0], 0, 1)]))


def test_processes_give_the_same_samples(llm, tiny_folder, tmp_path):
    one = experiment()
    run(one, PROBLEMS[:2], 2, tmp_path / "a", here(llm, one))
    with processes(str(tiny_folder), one, 2, 1) as spread:
        run(one, PROBLEMS[:2], 2, tmp_path / "b", spread)
    a, b = ({(e["question"], e["sample"]): e["text"] for e in entries(tmp_path / name)} for name in ("a", "b"))
    assert a == b


def test_samples_of_the_file_are_known(tmp_path):
    run(experiment(), PROBLEMS[:1], 1, tmp_path / "t", fake(experiment(), lambda p, i: True))
    with TraceFile(tmp_path / "t", experiment()) as file:
        assert file.samples == {PROBLEMS[0].key: {0: Sample(5, 1.0)}}


def test_ray_gives_the_same_samples(llm, tiny_folder, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed")
    one = experiment()
    run(one, PROBLEMS[:2], 2, tmp_path / "a", here(llm, one))
    run(one, PROBLEMS[:2], 2, tmp_path / "b", on_ray(str(tiny_folder), one, None, 1))
    a, b = ({(e["question"], e["sample"]): e["text"] for e in entries(tmp_path / name)} for name in ("a", "b"))
    assert a == b


def test_ray_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"thresher\[ray\]"):
        on_ray("model", experiment(), None, 1)
