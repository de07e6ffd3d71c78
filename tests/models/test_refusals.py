"""What attention cannot do is refused by name when a model is loaded, never dropped."""

import pytest
import torch
import transformers as t

from conftest import SMALL, byte_tokenizer, tiny_module
from thresher.errors import ModelError, UnsupportedModelError
from thresher.models.interface import position_limit
from thresher.models.load import checked, prepare


def build(config):
    torch.manual_seed(0)
    return t.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def refused(config, words):
    with pytest.raises(UnsupportedModelError, match=words):
        prepare(build(config), byte_tokenizer(), "model", "float32")


def test_soft_cap():
    refused(t.Gemma2Config(**SMALL, query_pre_attn_scalar=16), "soft-capped")


def test_sinks():
    refused(t.GptOssConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1), "attention sinks")


def test_linear_layers():
    refused(
        t.Qwen3NextConfig(
            **SMALL,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
        ),
        r"Qwen3NextForCausalLM: layers \[0, 1, 2\] are not softmax attention",
    )


def test_no_attention_interface():
    config = t.BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=2)
    refused(config, "BloomForCausalLM does not use transformers' attention interface")


@pytest.mark.parametrize("error", [KeyError, TypeError, AttributeError, ValueError, IndexError])
def test_a_forward_that_fails(error, monkeypatch):
    module = tiny_module("llama")

    def fail(*args, **kwargs):
        raise error("what it needs")

    monkeypatch.setattr(module.model.layers[1].mlp, "forward", fail)
    with pytest.raises(UnsupportedModelError, match=f"does not run as a flattened batch: {error.__name__}: .*needs"):
        prepare(module, byte_tokenizer(), "failing", "float32")


def test_encoder_decoder():
    config = t.T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    torch.manual_seed(0)
    with pytest.raises(UnsupportedModelError, match="t5 is an encoder-decoder"):
        prepare(t.T5ForConditionalGeneration(config).eval(), byte_tokenizer(), "t5", "float32")


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"position_bias": torch.zeros(1)}, "position bias"),
        ({"is_causal": False}, "both directions"),
        ({"novel": 1}, "novel"),
    ],
)
def test_unknown_request_of_attention(request_, words):
    module = tiny_module("llama")
    attention = module.model.layers[2].self_attn
    stock = type(attention).forward

    class Asking(type(attention)):
        def forward(self, *args, **kwargs):
            return stock(self, *args, **request_, **kwargs)

    attention.__class__ = Asking
    with pytest.raises(UnsupportedModelError, match=words):
        prepare(module, byte_tokenizer(), "asking", "float32")


def test_weights_that_are_not_numbers():
    module = tiny_module("llama")
    module.model.layers[3].mlp.up_proj.weight.data[5, 5] = float("nan")
    with pytest.raises(ModelError, match=r"model\.layers\.3\.mlp\.up_proj\.weight contain NaN"):
        checked(lambda: module, byte_tokenizer(), "nan", "float32")


def test_rope_that_changes_with_length_stays_in_its_first_regime():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 128}
    assert position_limit(t.LlamaConfig(**SMALL, rope_parameters=rope)) == 128
    assert position_limit(t.LlamaConfig(**SMALL)) == 512
