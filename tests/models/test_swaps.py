"""A native layer stands in for a stock one only where it is the same function, whatever the weights' format."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from conftest import SMALL, byte_tokenizer, tiny_config, tiny_module
from thresher import LLM
from thresher.errors import ModelError, UnsupportedModelError
from thresher.models import load as load_module
from thresher.models.check import read_check
from thresher.models.fuse import _Fuser
from thresher.models.load import checked

FORMATS = {"float32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


def fuser(module, weights):
    return _Fuser(module, FORMATS[weights], [])


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("kind", [Gemma3RMSNorm, LlamaRMSNorm])
def test_a_few_large_gains_do_not_hide_the_others(kind, weights):
    norm = kind(64, 1e-6).to(torch.float32 if weights == "float32" else torch.bfloat16)
    torch.manual_seed(0)
    for gains in (torch.zeros(64), 0.02 * torch.randn(64), torch.rand(64)):
        norm.weight.data = gains.to(norm.weight.dtype)
        norm.weight.data[:4] = torch.tensor([300.0, 120.0, 60.0, 15.0]).to(norm.weight.dtype)
        fused = fuser(norm, weights).norm(norm)
        assert fused is not None
        x = torch.eye(64)[None].to(norm.weight.dtype)
        torch.testing.assert_close(fused(x).float(), norm(x).float(), rtol=0.01, atol=1e-6)


class MLP(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(32, 48, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(48, 32, bias=False)
        self.act_fn = activation

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize(
    "name", ["silu", "gelu_pytorch_tanh", "gelu_new", "gelu", "quick_gelu", "gelu_10", "relu", "mish"]
)
def test_activations_are_compared_as_functions(name, weights):
    same = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
    torch.manual_seed(0)
    module = MLP(ACT2FN[name]).to(torch.float32 if weights == "float32" else torch.bfloat16)
    for scale in (1.0, 0.02):  # small weights make all activations alike
        for linear in (module.gate_proj, module.up_proj):
            linear.weight.data.mul_(scale)
        fused = fuser(module, weights).mlp(module)
        assert (fused.gate_up.activation if fused else None) == same.get(name)


def save(folder, name="llama", weights=None):
    module = tiny_module(name)
    module.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    if weights:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        weights(tensors)
        save_file(tensors, file, {"format": "pt"})
    return folder


FAULTS = {
    "missing: model.layers.1.mlp.down_proj": lambda t: t.pop("model.layers.1.mlp.down_proj.weight"),
    "left over: model.layers.1.mlp.extra": lambda t: t.update({"model.layers.1.mlp.extra": torch.ones(3)}),
    "another shape: model.layers.1.mlp.down_proj": lambda t: t.update(
        {"model.layers.1.mlp.down_proj.weight": torch.ones(3, 5)}
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_tensors_that_are_missing_left_over_or_misshapen(tmp_path, fault):
    with pytest.raises(ModelError, match=fault) as caught:
        LLM(save(tmp_path, weights=FAULTS[fault]), weights="float32")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model_type", ["doge", "diffllama"])
def test_models_whose_attention_is_more_than_ours_are_refused(model_type):
    """Doge hands attention a mask of its own, DiffLlama calls it twice a layer."""
    config = AutoConfig.for_model(model_type, **(SMALL | {"hidden_size": 64}))
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with pytest.raises(UnsupportedModelError):
        checked(lambda: module, byte_tokenizer(), model_type, "float32")


def test_the_whole_model_is_checked_once(tmp_path, monkeypatch):
    monkeypatch.setenv("THRESHER_CACHE", str(tmp_path / "cache"))
    folder = save(tmp_path / "model")
    said = []
    first = LLM(folder, weights="bf16", progress=said.append).model.check
    assert first.packed == "bf16"
    assert 0 < first.layers < 0.01
    assert any("checking" in message for message in said)
    said.clear()
    assert LLM(folder, weights="bf16", progress=said.append).model.check == first
    assert not said
    (kept,) = (tmp_path / "cache" / "checks").iterdir()
    kept.write_text(json.dumps({"attention": "x"}))
    assert read_check(kept) is None
    assert LLM(folder, weights="bf16").model.check == first


def test_wrong_native_layers_are_undone_and_a_wrong_attention_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("THRESHER_CACHE", str(tmp_path / "cache"))
    stock = load_module.fuse

    def wrong(module, *rest):
        module.get_output_embeddings().weight.data[5:9] += 1.0
        return stock(module, *rest)

    monkeypatch.setattr(load_module, "fuse", wrong)
    said = []
    make = lambda: tiny_module("llama")  # noqa: E731
    model = checked(make, byte_tokenizer(), "tiny", "float32", said.append)
    assert model.check.packed is None
    assert any("native float32 layers give other answers" in message for message in said)
    assert model.check.layers < 1e-6
    monkeypatch.setattr(load_module, "own_logits", lambda module, ids: torch.randn(len(ids), SMALL["vocab_size"]))
    monkeypatch.setenv("THRESHER_CACHE", str(tmp_path / "other"))
    with pytest.raises(UnsupportedModelError, match="not those of transformers"):
        checked(make, byte_tokenizer(), "tiny", "float32")


def wrong_in(monkeypatch, *formats):
    """Native layers that give other answers in some weight formats, and right ones in the others."""
    stock = load_module.fuse

    def fuse(module, dtype, *rest):
        if dtype in formats:
            module.get_output_embeddings().weight.data[5:9] += 2.0
        return stock(module, dtype, *rest)

    monkeypatch.setattr(load_module, "fuse", fuse)


def half():
    return tiny_module("llama").to(torch.bfloat16)


def test_layers_that_are_wrong_only_in_bf16_are_found(tmp_path, monkeypatch):
    """The judge says that they are right in float32; they are further off than rounding takes transformers' own."""
    monkeypatch.setenv("THRESHER_CACHE", str(tmp_path))
    wrong_in(monkeypatch, torch.bfloat16)
    model = checked(half, byte_tokenizer(), "tiny", "bf16")
    assert model.check.packed is None
    assert model.check.layers < 0.01
    again = checked(half, byte_tokenizer(), "tiny", "bf16")
    assert again.check == model.check
    assert len(again.stock_modules) == len(model.stock_modules)


def test_bf16_layers_where_int8_loses_too_much(tmp_path, monkeypatch):
    monkeypatch.setenv("THRESHER_CACHE", str(tmp_path))
    wrong_in(monkeypatch, torch.int8)
    said = []
    model = checked(half, byte_tokenizer(), "tiny", "int8", said.append)
    assert (model.weights, model.check.packed) == ("bf16", "bf16")
    assert model.stack is not None
    assert any("native int8 layers give other answers" in message for message in said)
    assert checked(half, byte_tokenizer(), "tiny", "int8").weights == "bf16"


def test_the_judge_is_not_loaded_without_memory_for_it(tmp_path, monkeypatch):
    monkeypatch.setenv("THRESHER_CACHE", str(tmp_path))
    monkeypatch.setattr(load_module, "available_memory", lambda: 0)
    monkeypatch.setattr(load_module, "SWAPPED_BOUND", {"bf16": 0.0})
    assert checked(half, byte_tokenizer(), "tiny", "bf16").check.packed is None
    monkeypatch.undo()
    monkeypatch.setenv("THRESHER_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(load_module, "SWAPPED_BOUND", {"bf16": 0.0})
    assert checked(half, byte_tokenizer(), "tiny", "bf16").check.packed == "bf16"


def test_ends_of_an_answer():
    module = AutoModelForCausalLM.from_config(tiny_config("llama"))
    module.generation_config.eos_token_id = None
    tokenizer = byte_tokenizer()
    assert load_module.eos_token_ids(module, tokenizer) == {2}  # of the config
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>\n{% endfor %}"
    assert load_module.eos_token_ids(module, tokenizer) == {2, tokenizer.convert_tokens_to_ids("<|im_end|>")}
