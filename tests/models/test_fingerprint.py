import copy

import torch

from conftest import byte_tokenizer, tiny_module
from thresher.models.fingerprint import model_fingerprint, tokenizer_fingerprint


def fingerprint(module):
    return model_fingerprint(module.config, module.state_dict())


def test_same_for_every_dtype_and_attention():
    module = tiny_module("llama")
    first = fingerprint(module)
    other = copy.deepcopy(module).to(torch.bfloat16)
    other.config._attn_implementation = "sdpa"
    assert fingerprint(other) == first


def test_different_for_other_weights_shape_or_rope():
    module = tiny_module("llama")
    first = fingerprint(module)
    assert fingerprint(tiny_module("llama", seed=1)) != first
    changed = copy.deepcopy(module)
    changed.model.layers[2].self_attn.k_proj.weight.data[0, 0] += 1
    assert fingerprint(changed) != first
    changed = copy.deepcopy(module)
    changed.config.rope_parameters = {"rope_type": "default", "rope_theta": 5e5}
    assert fingerprint(changed) != first


def test_tokenizer():
    first = tokenizer_fingerprint(byte_tokenizer())
    assert tokenizer_fingerprint(byte_tokenizer()) == first
    other = byte_tokenizer()
    other.add_tokens(["new"])
    assert tokenizer_fingerprint(other) != first
    other = byte_tokenizer()
    other.chat_template += "!"
    assert tokenizer_fingerprint(other) != first
    other = byte_tokenizer()
    other("some text", truncation=True, max_length=3)
    assert tokenizer_fingerprint(other) == first
