"""The models that transformers knows, on our attention and layers, give transformers' own tokens."""

import copy

import pytest
import torch

from conftest import ARCHITECTURES, byte_tokenizer, tiny_module
from thresher.decoding.runner import Runner, Work
from thresher.decoding.sampling import SamplingParams
from thresher.engine.memory import MemoryAccount
from thresher.engine.requests import Request
from thresher.engine.scheduler import Scheduler
from thresher.models.fuse import Attention, DecoderLayer, GatedMLP, RMSNorm
from thresher.models.load import prepare


def greedy(module, prompt, n):
    """transformers' own greedy answer and the gap between the two best logits of each step."""
    ids = torch.tensor([prompt])
    out = module.generate(
        ids,
        max_new_tokens=n,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        attention_mask=torch.ones_like(ids),
    )
    return out.sequences[0, len(prompt) :].tolist()


@pytest.mark.parametrize("swap", [True, False], ids=["native layers", "stock layers"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_tokens_are_those_of_transformers(name, swap):
    module = tiny_module(name)
    torch.manual_seed(1)
    prompts = [torch.randint(3, 300, (n,)).tolist() for n in (1, 2, 17, 64, 130)]
    expected = [greedy(module, p, 64) for p in prompts]
    model = prepare(copy.deepcopy(module), byte_tokenizer(), name, "float32", swap)
    scheduler = Scheduler(Runner(model), memory=MemoryAccount(1 << 28), positions=512, chunk_size=50)
    got = [[] for _ in prompts]
    for i, p in enumerate(prompts):
        scheduler.add(Request(i, p, SamplingParams(max_new_tokens=64, ignore_eos=True)))
    while scheduler.busy:
        for event in scheduler.step():
            got[event.request].append(event.choice.token)
    assert got == expected


@pytest.mark.parametrize("weights", ["float32", "bf16", "int8"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "phi3"])
def test_whole_layers_are_swapped(name, weights):
    module = tiny_module(name).to(torch.float32 if weights == "float32" else torch.bfloat16)
    model = prepare(module, byte_tokenizer(), name, weights)
    kinds = [type(m) for m in model.module.modules()]
    assert kinds.count(DecoderLayer) == 4
    assert not model.stock_modules


def test_layers_of_another_order_are_swapped_in_parts():
    """Gemma-3 also normalises what attention and MLP give."""
    model = prepare(tiny_module("gemma3"), byte_tokenizer(), "gemma3", "float32")
    kinds = [type(m) for m in model.module.modules()]
    assert kinds.count(Attention) == kinds.count(GatedMLP) == 4
    assert kinds.count(RMSNorm) == 17
    assert not model.stock_modules


def test_experts_stay_stock_and_are_named():
    model = prepare(tiny_module("qwen3_moe"), byte_tokenizer(), "moe", "float32")
    assert any("Experts" in name or "Expert" in name for name in model.stock_modules)


@pytest.mark.parametrize("weights", ["bf16", "int8"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rounded_weights_stay_near(name, weights):
    """Not string equality: the distribution of the next token is close to that of float32."""
    module = tiny_module(name)
    tokens = torch.randint(3, 300, (40,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        reference = module(tokens[None]).logits[0, -1].log_softmax(0)
    runner = Runner(prepare(module.to(torch.bfloat16), byte_tokenizer(), name, weights))
    from thresher.cache.sequence import KVSequence

    logits = runner.run([Work(KVSequence(runner.layout), tokens.tolist(), True)])[0].log_softmax(0)
    divergence = float((reference.exp() * (reference - logits)).sum())
    assert divergence < (0.05 if weights == "bf16" else 0.4)


def test_a_module_that_computes_something_else_is_not_swapped():
    """A layer that looks like a known one but gives other numbers keeps its own code."""
    module = tiny_module("llama")
    attention = module.model.layers[1].self_attn
    stock = type(attention).forward

    class Odd(type(attention)):
        def forward(self, hidden_states, *args, **kwargs):
            out, weights = stock(self, hidden_states, *args, **kwargs)
            return 2 * out, weights

    attention.__class__ = Odd
    expected = greedy(module, [5, 6, 7], 20)
    model = prepare(module, byte_tokenizer(), "odd", "float32")
    assert isinstance(model.module.model.layers[1].self_attn, Odd)
    assert isinstance(model.module.model.layers[0], DecoderLayer)
    scheduler = Scheduler(Runner(model), memory=MemoryAccount(1 << 28), positions=512, chunk_size=50)
    scheduler.add(Request(0, [5, 6, 7], SamplingParams(max_new_tokens=20, ignore_eos=True)))
    got = []
    while scheduler.busy:
        got += [e.choice.token for e in scheduler.step()]
    assert got == expected
