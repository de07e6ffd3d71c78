"""thresher eval as a user calls it."""

import json

import pytest
from command_line import call, fails

TEXT = "The miller went to the river. There he saw a heron! Was it asleep? It was not; it waited for a fish. " * 40


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def test_ruler(text, tiny_folder, tmp_path):
    out = tmp_path / "out.json"
    command = ("eval", "ruler", "--model", tiny_folder, "--allow-extrapolation", "--haystack", text, "--samples", 2)
    command += ("--lengths", "1500", "--tasks", "niah_single_1,qa_1", "--json", out)
    command += ("--journal", tmp_path / "journal")
    done = call(*command, "--attention", "streaming:sinks=1,window=64;streaming:sinks=1,window=9")
    assert done.returncode == 0, done.stderr
    assert "streaming:sinks=1,window=9, 1500 tokens" in done.stdout
    assert "fails with dense" in done.stderr
    assert "not SQuAD" in done.stderr
    first = json.loads(out.read_text())
    assert len(first["outcomes"]) == 2 * 2 * 3
    assert any("not SQuAD" in note for note in first["notes"])
    again = call(*command, "--attention", "streaming:sinks=1,window=9", "--attention", "streaming:sinks=1,window=64")
    assert again.returncode == 0, again.stderr
    assert "holds 12 results" in again.stderr
    second = json.loads(out.read_text())
    assert {str(o) for o in second["outcomes"]} == {str(o) for o in first["outcomes"]}


def test_perplexity(text, tiny_folder, tmp_path):
    out = tmp_path / "out.json"
    done = call(
        *("eval", "perplexity", text, "--model", tiny_folder, "--context", 100, "--tokens", 10, "--windows", 2),
        *("--attention", "streaming:sinks=1,window=9", "--json", out),
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.glob("*.journal"))  # its own journal has done its work
    rows = json.loads(out.read_text())["summaries"]
    assert [row["method"] for row in rows] == ["dense", "streaming:sinks=1,window=9"]
    assert rows[1]["ratio"]["low"] <= rows[1]["ratio"]["mean"] <= rows[1]["ratio"]["high"]


def test_help_and_bad_input(text, tiny_folder):
    assert "Dense is always" in " ".join(call("eval", "ruler", "--help").stdout.replace("│", "").split())
    model = ("--model", tiny_folder, "--haystack", text)
    fails(2, "task 'hay': not known", "eval", "ruler", "--tasks", "hay", *model)
    fails(2, "did you mean 'streaming'", "eval", "ruler", "--attention", "dense;streamin", *model)
    fails(5, "512 positions", "eval", "ruler", "--lengths", "4096", *model)
    fails(2, "the text has", "eval", "perplexity", text, "--model", tiny_folder, "--windows", 1000)
