import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.attention.registry import parse_method
from thresher.errors import UsageError
from thresher.kinetics.law import (
    DENSE,
    PAPER,
    Reading,
    Terms,
    as_oracle,
    attended,
    drafted,
    expected_longest,
    law_cost,
    parse_reading,
    run_cost,
    step_cost,
)
from thresher.machine.cost import Cost, Experts, ModelShape, weights_cost
from thresher.machine.devices import DEVICES, device
from thresher.machine.shapes import DECODERS, decoder_of

# Qwen3-8B's answers to the question of Alice and Bob (answer 809) in the published tables of Kinetics.
LENGTHS = [
    6021, 8373, 8288, 12032, 8126, 7243, 7125, 8620, 8000, 7747, 8833, 9260, 8549, 9174, 7773, 10365,
    7638, 8497, 7329, 6951, 6782, 8319, 10573, 6726, 6513, 7475, 9184, 15372, 10794, 7563, 11152, 8293,
]  # fmt: skip
SMALL = ModelShape(2, 4, 2, 8, weight_bytes=2000, weight_count=1000, value_bytes=2)


def law_shape(name):
    decoder = DECODERS[name]
    return replace(decoder.shape(), weight_count=round(decoder.parameters), experts=None)


@pytest.mark.parametrize(
    ("samples", "compute", "memory"),
    [(1, 164.2376475, 3323.0677084), (2, 328.4752949, 6520.1120398), (32, 5255.6047185, 102431.4419825)],
)
def test_published_costs(samples, compute, memory):
    cost = run_cost(law_shape("qwen3-8b"), DENSE, 177, LENGTHS, samples).total
    intensity = device("b200-fp8").intensity
    assert intensity == 562.5
    assert cost.flops * 1e-12 == pytest.approx(compute, rel=1e-9)
    assert intensity * cost.bytes * 1e-12 == pytest.approx(memory, rel=1e-9)


sizes = st.integers(0, 300)


@given(prompt=sizes, length=sizes, budget=st.integers(1, 700))
def test_keys_attended_to_are_the_sum_over_tokens(prompt, length, budget):
    assert attended(prompt, length) == sum(prompt + t + 0.5 for t in range(length))
    assert attended(prompt, length, budget) == sum(min(budget, prompt + t + 0.5) for t in range(length))


@given(
    prompt=sizes,
    length=st.integers(1, 300),
    samples=st.integers(1, 5),
    block=st.sampled_from([0, 1, 4, 16]),
    many=st.integers(1, 64),
)
def test_costs_are_the_sum_over_tokens_layers_heads_and_samples(prompt, length, samples, block, many):
    reading = Reading(many * (block or 1), block)
    dim, q, kv, layers = SMALL.head_dim, SMALL.q_heads, SMALL.kv_heads, SMALL.layers
    flops = memory = dense_memory = 0.0
    for t in range(length):
        keys = min(reading.budget, prompt + t + 0.5)
        flops += samples * layers * q * keys * 4 * dim
        memory += samples * layers * kv * keys * 2 * dim * 2
        dense_memory += layers * kv * (prompt + samples * (t + 0.5)) * 2 * dim * 2
        if block:
            flops += samples * layers * q * (prompt + t + 0.5) / block * 2 * dim
            memory += layers * kv * (prompt + samples * (t + 0.5)) / block * dim * 2
    cost = law_cost(SMALL, reading, prompt, length, samples)
    assert cost.attention.flops == pytest.approx(flops, rel=1e-12)
    assert cost.attention.bytes == pytest.approx(memory, rel=1e-12)
    assert cost.linear == Cost(2.0 * 1000 * length * samples, 0)
    assert law_cost(SMALL, DENSE, prompt, length, samples).attention.bytes == pytest.approx(dense_memory, rel=1e-12)


@given(prompt=sizes, length=st.integers(1, 300), samples=st.integers(1, 4))
def test_limits_and_monotony(prompt, length, samples):
    dense = law_cost(SMALL, DENSE, prompt, length)
    assert law_cost(SMALL, Reading(prompt + length), prompt, length) == dense
    for more in (Reading(50), DENSE):
        base = law_cost(SMALL, more, prompt, length, samples).total
        for other in ((prompt + 1, length, samples), (prompt, length + 1, samples), (prompt, length, samples + 1)):
            grown = law_cost(SMALL, more, *other).total
            assert grown.flops >= base.flops
            assert grown.bytes >= base.bytes
    assert (
        law_cost(SMALL, Reading(51), prompt, length).total.bytes
        >= law_cost(SMALL, Reading(50), prompt, length).total.bytes
    )
    assert dense.eflops(0) == dense.total.flops


def test_ratio_of_attention_to_parameters_is_phi():
    """Section 3: Phi = [2 r C D + (r D + I D) G] / 2P for one sample, D the numbers of keys (and as many of values) of
    a token, and C's memory of all samples."""
    shape, prompt, length, intensity = law_shape("qwen3-8b"), 0, 8192, 562.5
    d = shape.layers * shape.kv_heads * shape.head_dim
    group = shape.q_heads / shape.kv_heads
    cost = law_cost(shape, DENSE, prompt, length)
    phi = (cost.attention.flops + intensity * cost.attention.bytes) / cost.linear.flops
    assert phi == pytest.approx((2 * group * d + 2 * intensity * d) * length / (2 * shape.weight_count))


def test_kv_sizes_are_the_published_ones():
    gib = 2**30
    published = {"qwen3-0.6b": 3.5, "qwen3-1.7b": 3.5, "qwen3-4b": 4.5, "qwen3-8b": 4.5, "qwen3-14b": 5, "qwen3-32b": 8}
    for name, size in published.items():
        assert DECODERS[name].shape().kv_bytes(32768) == size * gib
    kib = {"llama-3.1-8b": 128, "llama-3.1-70b": 320, "llama-3.2-1b": 32, "llama-3.2-3b": 112, "qwen3-30b-a3b": 96}
    kib |= {f"deepseek-r1-distill-qwen-{n}": k for n, k in [("1.5b", 28), ("7b", 56), ("14b", 192), ("32b", 256)]}
    for name, size in kib.items():
        assert DECODERS[name].shape().kv_bytes_per_token == size * 1024


@pytest.mark.parametrize("name", sorted(DECODERS))
def test_shapes_give_the_published_number_of_parameters(name):
    """The shape has one embedding, papers count one or two."""
    decoder = DECODERS[name]
    shape, embedding = decoder.shape(), decoder.vocab * decoder.hidden
    counts = [shape.active_count, shape.active_count + embedding]
    assert min(abs(c / decoder.parameters - 1) for c in counts) < 0.03
    if name == "qwen3-30b-a3b":
        assert (shape.stored_bytes / 2 + embedding) / 30.5e9 == pytest.approx(1, abs=0.01)


def test_experts_touched_by_a_batch():
    experts = Experts(count=4, used=1, weight_count=10, weight_bytes=20)
    shape = replace(SMALL, experts=experts)
    assert experts.touched(1) == pytest.approx(1)
    assert experts.touched(2) == pytest.approx(4 * (1 - (3 / 4) ** 2))
    assert weights_cost(shape, 1000).bytes == pytest.approx(2000 + 4 * 20)
    assert weights_cost(shape, 1).flops == 2 * 1010


def test_switches():
    paper = run_cost(SMALL, DENSE, 10, [20, 40], 2)
    weighed = run_cost(SMALL, DENSE, 10, [20, 40], 2, Terms(batch=4))
    assert weighed.total.bytes - paper.total.bytes == pytest.approx(2000 / 4 * 30 * 2)
    last = run_cost(SMALL, DENSE, 10, [20, 40], 2, Terms(until_last=True))
    assert last.total.bytes - paper.total.bytes == pytest.approx(SMALL.kv_bytes_per_token * 10 * (40 - 30))
    read = run_cost(SMALL, DENSE, 10, [20, 40], 2, Terms(prefill=True))
    assert read.total.flops - paper.total.flops == pytest.approx(2 * 1000 * 10 + 4 * 2 * 4 * 8 * 50)
    windowed = replace(SMALL, windowed=((3, 16),), state_bytes=100)
    bounded = run_cost(windowed, DENSE, 10, [20], 2)
    keys = sum(min(16, 10 + t + 0.5) for t in range(20))
    assert bounded.total.bytes - run_cost(SMALL, DENSE, 10, [20], 2).total.bytes == pytest.approx(
        2 * (3 * keys * SMALL.kv_bytes_per_layer + 2 * 100 * 20)
    )
    assert run_cost(windowed, DENSE, 10, [20], 2, Terms(bounded=False)) == run_cost(SMALL, DENSE, 10, [20], 2)


@given(
    prompt=sizes,
    length=st.integers(1, 200),
    samples=st.integers(1, 4),
    reading=st.sampled_from(["dense", "topk40", "block4x9"]),
)
def test_a_run_is_the_sum_of_its_passes(prompt, length, samples, reading):
    reading = parse_reading(reading)
    steps = [step_cost(SMALL, reading, prompt, t + 0.5, samples) for t in range(length)]
    whole = law_cost(SMALL, reading, prompt, length, samples)
    assert sum(s.attention.flops for s in steps) == pytest.approx(whole.attention.flops)
    assert sum(s.attention.bytes for s in steps) == pytest.approx(whole.attention.bytes)
    assert sum(s.linear.flops for s in steps) == pytest.approx(whole.linear.flops)
    assert {s.linear.bytes for s in steps} == {2000}


def test_a_pass_of_our_methods():
    shape, method = DECODERS["qwen3-8b"].shape(), parse_method("auto")
    assert step_cost(shape, method, 8000, 192, 3).attention == method.cost(shape, 8192).times(3)
    assert step_cost(shape, parse_method("dense"), 10, 5, 2) == step_cost(shape, DENSE, 10, 5, 2)


def test_longest_of_several():
    known = [3.0, 1.0, 7.0, 5.0]
    pairs = [max(a, b) for i, a in enumerate(known) for b in known[i + 1 :]]
    assert expected_longest(known, 2) == pytest.approx(sum(pairs) / len(pairs))
    assert expected_longest(known, 1) == pytest.approx(4)
    assert expected_longest(known, 4) == 7
    again = sum(max(a, b) for a in known[:1] * 2 for b in known[:1] * 2) / 4
    assert expected_longest(known[:1], 2) == again
    five = expected_longest([0.0, 1.0], 5)
    assert five == pytest.approx(1 - 2**-5)


def test_our_methods_by_their_own_cost():
    shape = DECODERS["qwen3-8b"].shape()
    method = parse_method("auto")
    cost = run_cost(shape, method, 1000, [8000])
    by_loop = sum(method.cost(shape, 1000 + t).bytes for t in range(0, 8000, 5)) * 5
    assert cost.attention.bytes == pytest.approx(by_loop, rel=0.01)
    assert run_cost(shape, parse_method("dense"), 100, [50], 3) == run_cost(shape, DENSE, 100, [50], 3)
    assert cost.attention.bytes < run_cost(shape, DENSE, 1000, [8000]).attention.bytes / 2


def test_drafts_save_memory_and_cost_arithmetic():
    plain = law_cost(SMALL, DENSE, 1000, 100)
    draft = law_cost(SMALL, Reading(50), 1000, 100)
    assert drafted(plain, draft, 0, 1) == plain
    both = drafted(plain, draft, 3, 2.5)
    ratio = draft.attention.bytes / plain.attention.bytes
    assert both.attention.bytes == pytest.approx(plain.attention.bytes * (3 * ratio + 1) / 2.5)
    assert both.linear.flops == pytest.approx(plain.linear.flops * 7 / 2.5)


def test_seconds():
    cost = law_cost(SMALL, DENSE, 100, 10)
    parts = [(p.flops / 1e9, p.bytes / 1e8) for p in (cost.linear, cost.attention)]
    assert cost.seconds(1e9, 1e8) == pytest.approx(sum(map(sum, parts)))
    assert cost.seconds(1e9, 1e8, additive=False) == pytest.approx(sum(map(max, parts)))
    assert cost.eflops(10) == pytest.approx(cost.seconds(1e9, 1e8) * 1e9)


def test_readings_as_text():
    for text in ("dense", "topk256", "block16x64"):
        assert str(parse_reading(text)) == text
    assert parse_reading("block16x64") == Reading(1024, 16)
    assert parse_reading("auto") == parse_method("auto")
    for wrong in ("block0x4", "topk-1", "dence", "block16"):
        with pytest.raises(UsageError, match="topk256"):
            parse_reading(wrong)
    for nothing in ([], [-1]):
        with pytest.raises(UsageError, match="at least one length"):
            run_cost(SMALL, DENSE, 1, nothing)


def test_our_top_k_with_a_search_that_costs_nothing():
    assert as_oracle(parse_method("topk:window=8,budget=16")) == Reading(28)
    for other in ("auto", "topk:budget=0.1", "quest"):
        assert as_oracle(parse_method(other)) == parse_method(other)
    assert as_oracle(DENSE) is DENSE


def test_devices():
    assert device("h100").intensity == pytest.approx(989 / 3.35)
    assert device("950:46").intensity == pytest.approx(950 / 46)
    assert all(d.memory > 0 and d.source.startswith("https://") for d in DEVICES.values())
    for wrong in ("h300", "1:0", "a:b", "inf:1", "1:2:3"):
        with pytest.raises(UsageError, match="GFLOP/s:GB/s"):
            device(wrong)
    assert math.isinf(device("1:1").memory)


def test_shapes_of_configurations():
    from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen3MoeConfig, Qwen3NextConfig

    plain = decoder_of(LlamaConfig(num_hidden_layers=3, hidden_size=64, num_attention_heads=4, num_key_value_heads=2))
    assert plain.shape().layers == 3
    assert plain.shape().experts is None
    gemma = decoder_of(Gemma3TextConfig(num_hidden_layers=12, sliding_window=512)).shape()
    assert gemma.layers == 2
    assert gemma.windowed == ((10, 512),)
    assert gemma.kv_bytes(10_000) == (2 * 10_000 + 10 * 512) * gemma.kv_bytes_per_layer
    mistral = decoder_of(MistralConfig(num_hidden_layers=4, sliding_window=4096)).shape()
    assert (mistral.layers, mistral.windowed) == (0, ((4, 4096),))
    assert decoder_of(MistralConfig(num_hidden_layers=4, sliding_window=None)).shape().windowed == ()
    moe = decoder_of(Qwen3MoeConfig(num_experts=16, num_experts_per_tok=2)).shape()
    assert (moe.experts.count, moe.experts.used) == (16, 2)
    hybrid = decoder_of(Qwen3NextConfig(num_hidden_layers=8))
    shape = hybrid.shape()
    assert shape.layers == 2
    assert shape.state_bytes == 6 * hybrid.state_numbers * 4 > 0
    with pytest.raises(UsageError, match="latent attention"):
        decoder_of(type("DeepseekV3Config", (LlamaConfig,), {"kv_lora_rank": 512})())


def test_paper_has_no_switch_on():
    assert Terms(None, False, False, True) == PAPER
