"""Tiny models with random weights, one for each architecture; nothing is fetched."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from thresher.kernels import native

hypothesis.settings.register_profile("thresher", deadline=None)  # a time is no property where machines are shared
hypothesis.settings.load_profile("thresher")

VOCAB = 300
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 80,  # not what the heads have together: sizes that agree by chance hide mistakes
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tiny_config(name):
    import transformers as t

    if name == "llama":
        return t.LlamaConfig(**SMALL)
    if name == "qwen2":
        return t.Qwen2Config(**SMALL, use_sliding_window=False)
    if name == "qwen3":
        return t.Qwen3Config(**SMALL)
    if name == "mistral":
        return t.MistralConfig(**SMALL, sliding_window=24)
    if name == "phi3":
        return t.Phi3Config(**SMALL)
    if name == "gemma3":
        return t.Gemma3TextConfig(
            **SMALL,
            sliding_window=24,
            layer_types=["sliding_attention", "full_attention"] * 2,
            query_pre_attn_scalar=16,
        )
    if name == "qwen3_moe":
        return t.Qwen3MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)
    raise KeyError(name)


ARCHITECTURES = ["llama", "qwen2", "qwen3", "mistral", "phi3", "gemma3", "qwen3_moe"]


def tiny_module(name, seed=0):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    module = AutoModelForCausalLM.from_config(tiny_config(name), dtype=torch.float32).eval()
    with torch.no_grad():  # norms and biases of a fresh model are ones and zeros, and would hide mistakes
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def byte_tokenizer():
    """Every byte is a token: ids 3 .. 258; chat template in the style of ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {c: i + 3 for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template="{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]",
    )


@pytest.fixture(params=native.isas())
def isa(request, monkeypatch):
    """The instruction set that kernels run with."""
    for module in ("attention", "elementwise", "hashing", "layer", "linear", "memory", "sampling"):
        monkeypatch.setattr(f"thresher.kernels.{module}.kernel_set", lambda: native.kernel_set(request.param))
    return request.param


@pytest.fixture
def set_threads():
    """One thread, until the test sets another number: single small steps are done by one sooner than by two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A tiny Llama with a byte tokenizer, saved as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_module("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    from thresher import LLM

    return LLM(tiny_folder, weights="float32")
