"""Every command as a user calls it, with good and bad input."""

import json
import os
import re
import signal
import subprocess
import time
from importlib.metadata import version

import pytest
from command_line import COMMAND, call, fails
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from conftest import byte_tokenizer, tiny_module
from thresher.kernels.native import kernel_set

TEXT = "The quick brown fox jumps over the lazy dog. " * 8
CHECKSUM = re.compile(rb'"checksums": "([0-9a-f]{16})')


@pytest.fixture
def book(tmp_path):
    (tmp_path / "book.txt").write_text(TEXT)
    return tmp_path / "book.txt"


@pytest.fixture(scope="module")
def kv(tmp_path_factory, tiny_folder):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "book.txt").write_text(TEXT)
    done = call("read", folder / "book.txt", "-o", folder / "book.kv", "--model", tiny_folder, "--json", "-")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == len("[user]" + TEXT)
    return folder / "book.kv"


def test_help_names_every_command():
    text = call("--help").stdout
    assert all(name in text for name in ("generate", "read", "ask", "bench", "doctor"))
    for command in (
        ["generate"],
        ["read"],
        ["ask"],
        ["doctor"],
        ["bench", "decode"],
        ["bench", "prefill"],
        ["bench", "speculation"],
        ["plan", "speculation"],
    ):
        done = call(*command, "--help")
        assert done.returncode == 0
        assert "--json" in done.stdout


def test_no_command_shows_the_help_and_no_error():
    done = call()
    assert done.returncode == 2
    assert "Commands" in done.stdout + done.stderr
    assert "error" not in done.stderr


def test_version():
    assert call("--version").stdout == f"thresher {version('thresher')}\n"


def test_generate(tiny_folder):
    done = call("generate", "hello", "--model", tiny_folder, "--max-new-tokens", 5, "--json", "-", "--logprobs", 2)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)["answers"][0]
    assert len(answer["token_ids"]) == len(answer["logprobs"]) <= 5
    assert len(answer["logprobs"][0]["top"]) == 2


def test_generate_from_stdin_with_samples(tiny_folder):
    done = call(
        *("generate", "--file", "-", "--raw", "--model", tiny_folder, "--max-new-tokens", 4, "--n", 3),
        *("--temperature", 1),
        stdin=b"hello",
    )
    assert done.returncode == 0, done.stderr
    assert "(3 of 3)" in done.stdout


def test_no_new_tokens(tiny_folder):
    done = call("generate", "hello", "--model", tiny_folder, "--max-new-tokens", 0)
    assert done.returncode == 0
    assert done.stdout.strip() == ""


def test_ask(kv, tiny_folder, tmp_path):
    out = tmp_path / "out.json"
    done = call("ask", kv, "Who?", "Where?", "--model", tiny_folder, "--max-new-tokens", 4, "--json", out)
    assert done.returncode == 0, done.stderr
    assert [q["question"] for q in json.loads(out.read_text())["questions"]] == ["Who?", "Where?"]
    assert "first token" in done.stderr


def test_json_replaces_only_its_own(tmp_path):
    """And says so before any work is done."""
    (tmp_path / "own.json").write_text('{\n  "old": 1\n}\n')
    (tmp_path / "empty.json").write_text("")
    for name in ("own.json", "empty.json", "new.json"):
        assert call("methods", "--json", tmp_path / name).returncode == 0
        assert json.loads((tmp_path / name).read_text())[0]["name"] == "dense"
    kept = {
        "book.txt": "words",
        "other.json": '{"old": 1}',
        "bad.json": '{"old": ',
        "deep.json": "[" * 100000,
        "x.kv": "THRESHKV",
    }
    for name, text in kept.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "link.json").symlink_to(tmp_path / "own.json")
    (tmp_path / "nowhere.json").symlink_to(tmp_path / "nothing")
    (tmp_path / "folder").mkdir()
    before = (tmp_path / "own.json").read_text()
    for name in (*kept, "link.json", "nowhere.json", "folder"):
        fails(6, name, "methods", "--json", tmp_path / name)
    assert {name: (tmp_path / name).read_text() for name in kept} == kept
    assert (tmp_path / "own.json").read_text() == before
    assert (tmp_path / "link.json").is_symlink()


def test_json_to_pipes_and_devices(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE, text=True)
    assert call("methods", "--json", tmp_path / "pipe").returncode == 0
    assert json.loads(reader.communicate(timeout=30)[0])[0]["name"] == "dense"
    null = os.stat("/dev/null")
    assert call("methods", "--json", "/dev/null").returncode == 0
    assert os.stat("/dev/null") == null
    for name in ("-", "/dev/stdout"):
        assert '"name": "dense"' in call("methods", "--json", name).stdout


def test_ask_takes_the_weights_of_the_file(book, tiny_folder, tmp_path):
    model = ("--model", tiny_folder)
    assert call("read", book, "-o", tmp_path / "x.kv", "--weights", "float32", *model).returncode == 0
    assert call("ask", tmp_path / "x.kv", "Who?", "--max-new-tokens", 2, *model).returncode == 0


def test_generate_says_when_a_method_was_not_used(tiny_folder):
    arguments = ("generate", "a short prompt", "--max-new-tokens", 2, "--model", tiny_folder)
    assert "attention was dense" not in call(*arguments).stderr
    said = " ".join(call(*arguments, "--attention", "topk:dense_below=99,budget=4").stderr.split())
    assert "attention was dense: topk:dense_below=99,budget=4 begins beyond 99 tokens" in said


def test_bad_input(kv, book, tiny_folder, tmp_path, monkeypatch):
    model = ("--model", tiny_folder)
    fails(2, "give a prompt", "generate", *model)
    fails(2, "prompt is empty", "generate", "", *model)
    fails(2, "temperature=-1.0", "generate", "hi", "--temperature", -1, *model)
    fails(2, "top_p=2.0", "generate", "hi", "--top-p", 2, *model)
    fails(2, "did you mean 'dense'", "generate", "hi", "--attention", "dens", *model)
    fails(2, "choose one of bf16", "generate", "hi", "--weights", "int2", *model)
    fails(3, "no such folder", "generate", "hi", "--model", "/no/such/model")
    fails(3, "not a GGUF", "generate", "hi", "--model", broken_gguf(tmp_path))
    fails(5, "512 positions", "generate", "x" * 600, *model)
    fails(2, "no such file", "read", tmp_path / "no.txt", "-o", tmp_path / "x.kv", *model)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    fails(2, "not UTF-8", "read", tmp_path / "latin.txt", "-o", tmp_path / "x.kv", *model)
    (tmp_path / "empty.txt").write_bytes(b"\n")
    fails(2, "is empty", "read", tmp_path / "empty.txt", "-o", tmp_path / "x.kv", *model)
    fails(6, "cannot be written", "read", book, "-o", tmp_path / "no" / "x.kv", *model)
    fails(6, "is a folder", "read", book, "-o", tmp_path, *model)
    fails(4, "no such file", "ask", tmp_path / "no.kv", "q", *model)
    fails(4, "not a KV file", "ask", book, "q", *model)
    fails(4, "float32", "ask", kv, "q", "--weights", "float32", *model)
    fails(2, "question is empty", "ask", kv, " ", *model)
    fails(2, "--contexts x", "bench", "decode", "--contexts", "x", *model)
    fails(2, "peer 'vllm'", "bench", "decode", "--contexts", "16", "--peers", "vllm", *model)
    fails(2, "comes from a GGUF", "bench", "decode", "--contexts", "16", "--peers", "llama.cpp", *model)
    kernel_set.cache_clear()
    monkeypatch.setenv("THRESHER_ISA", "mmx")
    fails(2, "not available here", "doctor", *model)
    monkeypatch.delenv("THRESHER_ISA")
    (tmp_path / "file").write_text("")
    gguf = tmp_path / "head.gguf"
    gguf.write_bytes(b"GGUF\x03" + bytes(3) + bytes(16) + bytes(100))
    monkeypatch.setenv("THRESHER_CACHE", str(tmp_path / "file"))
    fails(6, "THRESHER_CACHE", "generate", "hi", "--model", gguf)


def broken_gguf(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"not this")
    return tmp_path / "broken.gguf"


def test_huge_file(tiny_folder, tmp_path):
    with (tmp_path / "huge.txt").open("wb") as file:
        file.truncate(2**33)  # sparse
    fails(2, "larger than", "read", tmp_path / "huge.txt", "-o", tmp_path / "x.kv", "--model", tiny_folder)


def test_damaged_file(kv, tiny_folder, tmp_path):
    data = bytearray(kv.read_bytes())
    data[-100] ^= 1
    (tmp_path / "x.kv").write_bytes(data)
    fails(4, "do not match their checksum", "ask", tmp_path / "x.kv", "q", "--model", tiny_folder)


def test_debug_shows_the_traceback():
    done = call("generate", "hi", "--model", "/no/such/model", "--debug")
    assert done.returncode != 0
    assert "Traceback" in done.stderr


def test_doctor_and_bench(tiny_folder, tmp_path):
    done = call("doctor", "--model", tiny_folder, "--json", "-")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["read_bytes_per_second"] > 1e8
    out = tmp_path / "b.json"
    model = ("--model", tiny_folder)
    done = call("bench", "decode", "--contexts", "64,300", "--batch", "1,2", "--rounds", 1, "--json", out, *model)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())
    assert [(r["context"], r["batch"]) for r in rows] == [(64, 1), (64, 2), (300, 1), (300, 2)]
    assert all(r["median_ms"] > 0 and r["floor_ratio"] > 0 for r in rows)
    done = call("bench", "prefill", "--lengths", "100", "--peers", "transformers", "--rounds", 1, "--json", out, *model)
    assert done.returncode == 0, done.stderr
    assert [r["engine"] for r in json.loads(out.read_text())] == [
        "thresher bf16 dense",
        "transformers bf16",
        "transformers float32",
    ]


def test_ctrl_c_while_generating(tiny_folder):
    child = subprocess.Popen(
        [
            *COMMAND,
            "generate",
            "hi",
            "--model",
            str(tiny_folder),
            "--max-new-tokens",
            "1000000",
            "--ignore-eos",
            "--allow-extrapolation",
            "--kv-budget",
            "4000",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    child.stdout.read(20)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err


def test_ctrl_c_while_reading_keeps_a_checkpoint(tiny_folder, tmp_path):
    (tmp_path / "long.txt").write_text(TEXT * 50)
    command = ["read", str(tmp_path / "long.txt"), "-o", str(tmp_path / "x.kv"), "--model", str(tiny_folder)]
    child = subprocess.Popen(
        [*COMMAND, *command, "--allow-extrapolation"],
        stderr=subprocess.PIPE,
        text=True,
    )
    part = tmp_path / "x.kv.part"  # its header names no checksum before the first checkpoint
    while not (part.exists() and (found := CHECKSUM.search(part.read_bytes()[:4096])) and int(found[1], 16)):
        assert child.poll() is None
        time.sleep(0.005)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert not (tmp_path / "x.kv").exists()
    done = call(*command, "--allow-extrapolation", "--json", "-")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["resumed_at"] >= 512
    assert sorted(os.listdir(tmp_path)) == ["long.txt", "x.kv"]


def test_methods_are_listed():
    done = call("methods", "--json", "-", "--contexts", "4096,65536")
    assert done.returncode == 0
    listed = {m["name"]: m for m in json.loads(done.stdout)}
    assert {"dense", "auto", "lsh", "verified"} <= listed.keys()
    assert listed["dense"]["exact"]
    assert listed["lsh"]["parameters"]["K"] == 9
    assert listed["auto"]["cost"]["65536"]["bytes"] < 0.1 * listed["dense"]["cost"]["65536"]["bytes"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("methods", "--heads", "9x2x64x4"), "--heads"),
        (("bench", "attention", "--heads", "3"), "--heads"),
        (("generate", "hello", "--certify", "0.1"), "estimates no error"),
        (("generate", "hello", "--attention", "lsh", "--certify", "-1"), "above 0"),
        (("eval", "fidelity", "--attention", "lhs"), "did you mean 'lsh'"),
    ],
)
def test_wrong_methods_end_in_one_line(arguments, words):
    done = call(*arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_attention_alone_is_timed():
    done = call(
        *("bench", "attention", "--heads", "4x2x64", "--contexts", "2048"),
        *("--attention", "sign:budget=64,dense_below=0", "--rounds", "1", "--json", "-"),
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [r["method"] for r in rows] == ["dense", "sign:dense_below=0,budget=64"]
    assert rows[1]["rows"] < 0.2
    assert rows[0]["error"] == 0 < rows[1]["error"]


def test_speculation(kv, tiny_folder, tmp_path):
    plain = call(
        "ask", kv, "Who?", "Where?", "--max-new-tokens", 40, "--ignore-eos", "--attention", "dense", "--json", "-"
    )
    answers = [q["answers"][0]["token_ids"] for q in json.loads(plain.stdout)["questions"]]
    out = tmp_path / "answers.json"
    for speculate in ("auto", "ngram:gamma=4", "self:streaming,window=16,gamma=4", f"model:{tiny_folder},gamma=3"):
        asked = ("ask", kv, "Who?", "Where?", "--max-new-tokens", 40, "--ignore-eos", "--speculate", speculate)
        done = call(*asked, "--json", out)
        assert done.returncode == 0, done.stderr
        assert "speculation: " in done.stderr
        found = [q["answers"][0] for q in json.loads(out.read_text())["questions"]]
        assert [a["token_ids"] for a in found] == answers
        assert all(a["speculation"]["passes"] <= 39 for a in found)
        if "model" in speculate:  # it is the same model
            assert found[0]["speculation"]["accepted"] == found[0]["speculation"]["drafted"]
            assert "100 % of 57 drafted tokens accepted" in done.stderr
    model = ("--model", tiny_folder, "--weights", "float32")
    sampled = ("generate", "Name", "--temperature", 1, "--max-new-tokens", 20, "--ignore-eos", *model, "--json", "-")
    done = call(*sampled, "--speculate", "ngram:gamma=2", "--seed", 5)
    assert (
        json.loads(done.stdout)["answers"][0]["text"]
        == json.loads(call(*sampled, "--seed", 5).stdout)["answers"][0]["text"]
    )
    assert json.loads(call(*sampled, "--speculate", "ngram:gamma=2").stdout)["seed"] is None


def test_speculation_that_cannot_be(kv, tiny_folder, tmp_path, monkeypatch):
    ask = ("ask", kv, "Who?", "--speculate")
    fails(2, "choose from auto, self", *ask, "fast")
    fails(2, "a draft has 1 to 15", *ask, "self:auto,gamma=-1")
    fails(2, "verified densely", *ask, "self:auto", "--attention", "sign")
    fails(2, "more than the context of the model", *ask, "self:snapkv,budget=1000000")
    fails(2, "name a sparse attention method", *ask, "self:dense")
    fails(3, "no such", *ask, f"model:{tmp_path / 'nowhere'}")
    other = tmp_path / "other"
    tiny_module("qwen3").save_pretrained(other)
    swapped = {token: 261 - i if 3 <= i <= 258 else i for token, i in byte_tokenizer().get_vocab().items()}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(swapped, "a"))).save_pretrained(other)
    fails(2, "has another vocabulary", *ask, f"model:{other}")
    monkeypatch.setattr("thresher.engine.llm.available_memory", lambda: 1000)
    fails(5, "takes about", *ask, f"model:{tiny_folder}", "--kv-budget", 64)


def test_plan_and_bench_speculation(tiny_folder, tmp_path):
    out = tmp_path / "out.json"
    plan = ("plan", "speculation", "--machine", "a100", "--batch", "1,64", "--context", "2048,100000")
    done = call(*plan, "--model", "llama-3.1-8b", "--plot", tmp_path / "plan.png", "--json", out)
    assert done.returncode == 0, done.stderr
    rows = {(r["batch"], r["context"]): r for r in json.loads(out.read_text())["rows"]}
    assert rows[1, 2048]["gamma"] == 0
    assert rows[64, 100000]["speedup"] > 1.5
    assert (tmp_path / "plan.png").stat().st_size > 1000
    assert call(*plan, "--model", tiny_folder, "--draft", "model:smollm2-135m").returncode == 0
    assert call("plan", "speculation", "--machine", "950:46", "--acceptance", "0.9,0.8").returncode == 0
    fails(2, "GFLOP/s:GB/s", "plan", "speculation", "--machine", "950:x")
    fails(2, "there is this, a100", "plan", "speculation", "--machine", "tpu")
    fails(2, "--acceptance 1.5", "plan", "speculation", "--acceptance", "1.5")
    fails(2, "self:METHOD or model:NAME", "plan", "speculation", "--draft", "other")
    fails(2, "there is llama-2-7b", "plan", "speculation", "--model", "list")
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 8)
    bench = ("bench", "speculation", "--model", tiny_folder, "--weights", "float32", "--text", text)
    few = ("--contexts", 200, "--batch", 2, "--tokens", 12, "--rounds", 1, "--temperature", "0,0.7")
    done = call(*bench, *few, "--speculate", "auto;self:streaming,window=16,gamma=2;ngram:gamma=2", "--json", out)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())
    assert [r["setting"] for r in rows[:4]] == ["plain", "auto", "self:streaming,window=16,gamma=2", "ngram:gamma=2"]
    assert all(r["same"] for r in rows if r["temperature"] == 0)
    assert all(r["same"] is None for r in rows if r["temperature"])
    assert rows[2]["drafters"] == {"self:streaming:window=16": rows[2]["gammas"][2] + rows[2]["gammas"][1]}
    fails(2, "--temperature x", *bench, "--temperature", "x")
