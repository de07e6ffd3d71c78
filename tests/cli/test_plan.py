"""thresher plan as a user calls it."""

import json

import pytest
from command_line import call, fails

LENGTHS = "6021\n8373\n\n8288\n"


@pytest.fixture
def lengths(tmp_path):
    (tmp_path / "lengths.txt").write_text(LENGTHS)
    return tmp_path / "lengths.txt"


def parsed(*arguments):
    done = call(*arguments, "--json", "-")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_cost(lengths):
    command = ("plan", "cost", "--model", "qwen3-8b", "--device", "b200-fp8", "--prompt", 177, "--lengths", lengths)
    one = parsed(*command, "--samples", 1)
    assert one["intensity"] == 562.5
    mean = sum(2 * 8.19e9 * g + 2 * (2 * 177 + g) * g * 32 * 128 * 36 for g in (6021, 8373, 8288)) / 3
    assert one["compute"] == pytest.approx(mean * 1e-12, rel=1e-12)
    many = parsed(*command, "--samples", "1,32", "--attention", "dense;topk256", "--attention", "block16x64;auto")
    assert "compute" not in many
    assert [(r["attention"], r["samples"]) for r in many["rows"]] == [
        (a, n) for a in ("dense", "topk256", "block16x64", "auto") for n in (1, 32)
    ]
    dense, sparse = many["rows"][1], many["rows"][3]
    assert dense["memory"] > 10 * sparse["memory"]
    switched = parsed(*command, "--batch", 16, "--until-last", "--prefill", "--kv", "fp8", "--weights", "int8")
    assert switched["memory"] != one["memory"]
    table = call(*command)
    assert "of it memory" in table.stderr
    assert table.stdout == ""
    assert parsed("plan", "cost", "--model", "qwen3-30b-a3b", "--device", "h100")["compute"] > 0


def test_plans_are_ranked():
    command = ("plan", "--model", "qwen3-4b,qwen3-8b", "--device", "h100", "--samples", "1,8", "--generate", "4096")
    found = parsed(*command, "--attention", "dense;topk512", "--acceptance", 0.9, "--price", 2)
    seconds = [p["seconds"] for p in found["plans"]]
    assert seconds == sorted(seconds)
    assert len(seconds) >= 8
    assert all(p["money"] > 0 and p["joules"] > 0 for p in found["plans"])
    assert "takes the least time" in found["why"]
    shown = call(*command)
    assert "takes the least time" in shown.stderr
    fails(2, "nearest is qwen3-4b", *command, "--memory", 3)
    fails(2, "nearest is qwen3-4b", *command, "--latency", 0.1)


def test_plans_by_traces(tmp_path, lengths):
    for method, right in (("dense", 3), ("topk512", 1)):
        settings = {"model": "qwen3-4b", "method": method, "task": "t", "max_tokens": 4096}
        lines = [{"traces": 1, "settings": settings}]
        lines += [
            {
                "question": q,
                "gold": "1",
                "sample": i,
                "length": 1000,
                "score": float(i < right),
                "answer": str(i),
                "prompt": 9,
            }
            for q in "ab"
            for i in range(4)
        ]
        (tmp_path / f"{method}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ("plan", "--model", "qwen3-4b", "--device", "h100", "--samples", "1,2", "--generate", "4096")
    command += (
        "--attention",
        "dense;topk512",
        "--traces",
        tmp_path / "dense.jsonl",
        "--traces",
        tmp_path / "topk512.jsonl",
    )
    found = parsed(*command)
    assert [(p["method"], p["samples"]) for p in found["plans"][:2]] == [("dense", 2), ("dense", 1)]
    assert found["plans"][0]["accuracy"]["mean"] == 1
    reached = parsed(*command, "--target", 0.4)["plans"]
    assert {p["method"] for p in reached} == {"dense", "topk512"}
    fails(2, "for 0.990", *command, "--target", 0.99, "--samples", 1)
    fails(2, "--target needs --traces", "plan", "--device", "h100", "--target", 0.5)
    fails(2, "choose best or majority", *command, "--judge", "jury")
    fails(2, "no gold", *command, "--traces", _broken(tmp_path))


def _broken(folder):
    path = folder / "broken.jsonl"
    settings = {"model": "m", "method": "dense", "task": "t", "max_tokens": 9}
    path.write_text(json.dumps({"traces": 1, "settings": settings}) + '\n{"question": "a"}\n')
    return path


def test_this_machine_is_timed_and_checked(tiny_folder):
    command = ("plan", "--model", tiny_folder, "--weights", "float32", "--prompt", 100, "--generate", 50)
    found = parsed(*command, "--attention", "dense", "--samples", "1,2", "--check")
    assert sorted(p["samples"] for p in found["plans"]) == [1, 2]
    assert [(c["context"], c["batch"]) for c in found["check"]] == [(100, 1), (100, 2), (150, 1), (150, 2)]
    assert all(c["measured_ms"] > 0 and c["predicted_ms"] > 0 for c in found["check"])
    fails(2, "an oracle does not run here", *command, "--attention", "topk64")
    fails(2, "this machine computes in", "plan", "--model", "qwen3-0.6b", "--weights", "fp8")
    fails(2, "--device this is one device", *command, "--devices", 2)
    fails(2, "use it with --device this", "plan", "--device", "h100", "--check")


def test_what_cannot_be_planned(lengths, tmp_path):
    cost = ("plan", "cost")
    fails(2, "there is this, a100", *cost, "--device", "tpu")
    fails(2, "did you mean qwen3-8b?", *cost, "--model", "qwen3-9b")
    fails(2, "there is llama-2-7b", *cost, "--model", "list")
    fails(2, "--weights int3", *cost, "--weights", "int3")
    fails(2, "--kv int3", *cost, "--kv", "int3")
    fails(2, "--samples 0", *cost, "--samples", 0)
    fails(2, "--batch 0", *cost, "--batch", 0)
    fails(2, "No such file", *cost, "--lengths", tmp_path / "none")
    lengths.write_text("12\nx\n")
    fails(2, "line 2: 'x'", *cost, "--lengths", lengths)
    lengths.write_text("nan\n")
    fails(2, "line 1: 'nan'", *cost, "--lengths", lengths)
    lengths.write_text("\n")
    fails(2, "no lengths", *cost, "--lengths", lengths)
    fails(2, "topk256", *cost, "--attention", "dence")
    fails(2, "--attention: nothing is given", *cost, "--attention", ";")
    fails(2, "--model: nothing is given", "plan", "--model", ",")
    fails(2, "--efficiency 2", "plan", "--device", "h100", "--efficiency", 2)
