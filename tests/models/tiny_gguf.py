"""Writes tiny GGUF files with random weights and a tokenizer of bytes."""

import gguf
import numpy as np
from transformers.convert_slow_tokenizer import bytes_to_unicode

HIDDEN, HEADS, HEAD_DIM, LAYERS = 32, 2, 16, 2
TOKENS = [*bytes_to_unicode().values(), "<|end|>", "<|turn|>", "\u010a\u010a"]
PIECES = ["▁", "a", "b", "▁a", "▁b", "ab", "▁ab", "▁▁"]  # the best first
SENTENCEPIECE = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *PIECES, "<|turn|>"]


def write(path, skip=(), tensors=None, pre="smollm", values=None, sentencepiece=False, architecture="llama", **writing):
    """`skip`: names left out; `tensors`: more of them, by name; `values`: more entries, of Python's types; `writing`:
    what GGUFWriter takes, as how to split the file."""
    writer = gguf.GGUFWriter(str(path), architecture, **writing)
    writer.add_block_count(LAYERS)
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(48)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_rope_dimension_count(HEAD_DIM)
    (_add_sentencepiece if sentencepiece else _add_byte_level)(writer, pre)
    count = len(SENTENCEPIECE if sentencepiece else TOKENS)
    writer.add_vocab_size(count)
    for key, value in (values or {}).items():
        kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        kinds.get(type(value), writer.add_array)(key, value)
    shapes = {"token_embd.weight": (count, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for i in range(LAYERS):
        shapes |= {f"blk.{i}.attn_{n}.weight": (HIDDEN, HIDDEN) for n in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.{n}_norm.weight": (HIDDEN,) for n in ("attn", "ffn")}
        shapes |= {f"blk.{i}.ffn_{n}.weight": (48, HIDDEN) for n in ("gate", "up")}
        shapes[f"blk.{i}.ffn_down.weight"] = (HIDDEN, 48)
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        if name not in skip:
            writer.add_tensor(name, random.normal(0, 0.1, shape).astype(np.float32))
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_byte_level(writer, pre):
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * 256 + [3, 3, 1])
    writer.add_token_merges(["\u010a \u010a"])
    writer.add_eos_token_id(256)


def _add_sentencepiece(writer, pre):
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(SENTENCEPIECE)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(PIECES) + [3])
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(PIECES))] + [0.0])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
