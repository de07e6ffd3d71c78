"""thresher mosaic as a user calls it."""

import csv
import json

import pytest
from command_line import call, fails

from thresher.engine.llm import LLM

TEXT = "".join(f"the fox number {i % 13} jumps over the {i % 7} lazy dogs, and so on.\n" for i in range(300))
SMALL = ("--layers", 1, "--width", 32, "--heads", 2, "--block", 40, "--batch", 4, "--steps", 12, "--threads", 1)


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    pass


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "a.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "mosaic"
    done = call("mosaic", "train", "--out", out, "--data", data, *SMALL, "--json", "-")
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout), done.stderr


def test_train_leaves_a_model_a_curve_and_a_plot(trained):
    out, found, said = trained
    assert found["settings"]["layers"] == 1
    assert found["curve"][-1]["step"] == 12
    with (out / "loss.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [p["step"] for p in found["curve"]]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "validation loss" in said
    assert f"thresher generate --model {out}".replace(" ", "") in "".join(said.split())  # however it is wrapped


def test_the_model_is_generated_from_read_and_asked(trained, tmp_path):
    out = trained[0]
    done = call("generate", "--model", out, "--raw", "the fox ", "--max-new-tokens", 9, "--ignore-eos", "--json", "-")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["answers"][0]["token_ids"]) == 9
    book = tmp_path / "book.txt"
    book.write_text(TEXT[:3000])
    done = call("read", book, "-o", tmp_path / "book.kv", "--model", out)
    assert done.returncode == 0, done.stderr
    assert "trained with contexts of 40 tokens" in done.stderr
    done = call("ask", tmp_path / "book.kv", "the fox", "--max-new-tokens", 5, "--ignore-eos", "--json", "-")
    assert done.returncode == 0, done.stderr
    info = json.loads(call("info", out, "--json", "-").stdout)
    assert info["trained_length"] == 40
    assert info["state_bytes"] == LLM(out).runner.layout.state_bytes > 0


def test_train_goes_on_or_refuses(trained, data):
    out, found, _ = trained
    again = call("mosaic", "train", "--out", out, "--data", data, *SMALL, "--json", "-")
    assert json.loads(again.stdout) == found
    fails(2, "another training (width 32)", "mosaic", "train", "--out", out, "--data", data, *SMALL, "--width", 64)


def test_text_compares(data, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("something else, and more of it. " * 40)
    command = ("mosaic", "text", "--out", tmp_path / "text", "--data", data, "--other", other, "--layers", "1,2")
    command += ("--seeds", 2, "--width", 32, "--heads", 2, "--block", 32, "--batch", 2, "--steps", 6, "--threads", 1)
    done = call(*command, "--json", "-")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["models"]
    assert [(r["layers"], r["seed"], r["arch"]) for r in rows] == [
        (depth, seed, arch) for depth in (1, 2) for seed in (0, 1) for arch in ("mosaic", "gpt")
    ]
    assert all(r["tokens"] == 6 * 2 * 32 and len(r["other_by_part"]) == 8 for r in rows)
    assert (tmp_path / "text" / "text.png").exists()
    assert "2 layers, gpt: validation" in done.stderr


def test_inspect_writes_a_page(trained, tmp_path):
    page = tmp_path / "page.html"
    done = call("mosaic", "inspect", trained[0], "--prompt", "the fox number 3 jumps over", "--out", page)
    assert done.returncode == 0, done.stderr
    assert "<html" in page.read_text()[:200].lower()


def test_moons_and_icl_run(tmp_path):
    done = call("mosaic", "moons", "--seeds", "0", "--steps", 6, "--block", 216, "--threads", 1, "--json", "-")
    assert done.returncode == 0, done.stderr
    assert [net["heads"] for net in json.loads(done.stdout)["nets"]] in ([1, 3], [3, 1])
    command = ("mosaic", "icl", "--out", tmp_path / "icl", "--automata", "4", "--epochs", 1, "--held-out", 4)
    done = call(*command, "--layers", 1, "--width", 16, "--heads", 2, "--threads", 1, "--json", "-")
    assert done.returncode == 0, done.stderr
    assert {r["architecture"] for r in json.loads(done.stdout)["runs"]} == {"mosaic", "gpt"}


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("choose one of tiny", ("--preset", "huge")),
        ("choose one of mosaic", ("--arch", "rnn")),
        ("no even part", ("--width", 30, "--heads", 4)),
        ("neither bytes", ("--tokenizer", "/nothing/there")),
        ("give more text", ("--block", 100000)),
        ("choose float32 or bf16", ("--precision", "fp4")),
    ],
)
def test_what_train_refuses(data, tmp_path, words, arguments):
    code = 3 if "neither" in words else 2
    fails(code, words, "mosaic", "train", "--out", tmp_path / "m", "--data", data, *arguments)


def test_no_plan_is_made_for_it(trained):
    words = "MemoryMosaicConfig is not a decoder that a plan can be made for: it is made of associative memories"
    fails(2, words, "plan", "cost", "--model", trained[0], "--device", "h100", "--prompt", 9, "--generate", 9)


def test_no_text(tmp_path):
    fails(2, "give a text file", "mosaic", "train", "--out", tmp_path / "m", "--data", tmp_path)
