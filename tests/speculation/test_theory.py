"""The cost model against what MagicDec publishes and against itself (spec: T8)."""

import pytest

from thresher.machine.shapes import DECODERS
from thresher.speculation.theory import (
    Drafter,
    Hardware,
    best_gain,
    critical_length,
    draft_seconds,
    gain,
    omega,
    target_seconds,
)

A100, H100 = Hardware(312e12, 2.039e12), Hardware(989e12, 3.35e12)
LLAMA3, LLAMA2 = DECODERS["llama-3.1-8b"].shape(), DECODERS["llama-2-7b"].shape()


def test_shapes_are_the_published_ones():
    """Parameters (less the input embedding) and bytes of a token's keys and values."""
    for name, billions, kv in (
        ("llama-3.1-8b", 7.50, 131072),
        ("llama-2-7b", 6.61, 524288),
        ("llama-3.1-70b", 69.50, 327680),
        ("tinyllama-1.1b", 1.034, 22528),
        ("qwen2.5-32b", 31.98, 262144),
    ):
        shape = DECODERS[name].shape()
        assert shape.weight_count == pytest.approx(billions * 1e9, rel=2e-3)
        assert shape.kv_bytes_per_token == kv


@pytest.mark.parametrize(
    ("shape", "hardware", "tokens"), [(LLAMA3, A100, 820), (LLAMA3, H100, 420), (LLAMA2, A100, 170)]
)
def test_critical_lengths(shape, hardware, tokens):
    """Those of the paper, where the input embedding counts too: within 8 %."""
    assert critical_length(shape, hardware) == pytest.approx(tokens, rel=0.08)


@pytest.mark.parametrize("shape", [LLAMA2, LLAMA3])
@pytest.mark.parametrize("tokens", [1, 4])
def test_at_the_critical_length_memory_and_arithmetic_are_equal(shape, tokens):
    """Of one sequence more: its keys and values against all its arithmetic."""
    length = critical_length(shape, A100, tokens)
    memory = length * shape.kv_bytes_per_token / A100.bandwidth
    flops = tokens * (2 * shape.weight_count + 4 * shape.layers * shape.q_heads * shape.head_dim * length)
    assert flops / A100.flops == pytest.approx(memory)


def test_a_machine_that_always_computes_longer():
    assert critical_length(DECODERS["smollm2-135m"].shape(), Hardware(110e9, 22e9), 4) is None


def test_limits_of_ratios():
    """A small model with all of its cache: its bytes by the target's (0.40 for 8B and 70B); verification: one pass."""
    big = DECODERS["llama-3.1-70b"].shape()
    drafter = Drafter(LLAMA3, [0.8])
    ratio = draft_seconds(drafter, A100, 256, 10_000_000) / target_seconds(big, A100, 256, 10_000_000)
    assert ratio == pytest.approx(131072 / 327680, rel=1e-3)
    ratios = [
        target_seconds(LLAMA3, A100, 64, n, 5) / target_seconds(LLAMA3, A100, 64, n)
        for n in (1000, 8000, 64000, 512000)
    ]
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[-1] < 1.02
    sparse = Drafter(LLAMA3, [0.8], budget=512)
    costs = [draft_seconds(sparse, A100, b, 32000) / target_seconds(LLAMA3, A100, b, 32000) for b in (1, 8, 64, 512)]
    assert costs == sorted(costs, reverse=True)


@pytest.mark.parametrize(("context", "rises"), [(150, False), (32000, True)])
def test_beyond_the_critical_length_more_sequences_gain_more(context, rises):
    drafter = Drafter(LLAMA3, [0.8], budget=64)
    few, many = (gain(LLAMA3, drafter, A100, b, context, 3).speedup for b in (64, 4096))
    assert (many > few) == rises


# Eight A100 with tensor parallelism; overhead and share of the peak from the published times without speculation.
PUBLISHED = Hardware(8 * 312e12 * 0.6, 8 * 2.039e12 * 0.74, 4.5e-3)
ROWS = [
    # target, draft, context, batch, gamma, speed-up, acceptance
    ("llama-3.1-8b", None, 32000, 32, 3, 1.22, 0.81),
    ("llama-3.1-8b", None, 100000, 32, 5, 1.84, 0.79),
    ("llama-2-7b", None, 8000, 64, 3, 1.48, 0.83),
    ("llama-2-7b", None, 32000, 32, 4, 2.00, 0.81),
    ("llama-2-7b", "tinyllama-1.1b", 8000, 32, 3, 1.29, 0.7),
    ("llama-2-7b", "tinyllama-1.1b", 8000, 64, 3, 1.57, 0.7),
    ("llama-2-7b", "tinyllama-1.1b", 8000, 128, 4, 1.66, 0.7),
    ("llama-2-7b", "tinyllama-1.1b", 32000, 32, 4, 1.91, 0.7),
]


@pytest.mark.parametrize(("batch", "ms"), [(32, 16.5), (64, 28.6), (128, 49.9)])
def test_published_times_of_a_pass(batch, ms):
    assert 1e3 * target_seconds(LLAMA2, PUBLISHED, batch, 8000) == pytest.approx(ms, rel=0.05)


@pytest.mark.parametrize(("target", "draft", "context", "batch", "gamma", "speedup", "acceptance"), ROWS)
def test_published_speedups(target, draft, context, batch, gamma, speedup, acceptance):
    shape = DECODERS[target].shape()
    drafter = Drafter(DECODERS[draft or target].shape(), [acceptance], budget=512)
    assert gain(shape, drafter, PUBLISHED, batch, context, gamma).speedup == pytest.approx(speedup, rel=0.2)


def test_none_where_none_pays():
    drafter = Drafter(LLAMA3, [0.8], budget=512)
    assert best_gain(LLAMA3, drafter, A100, 1, 512).gamma == 0
    assert best_gain(LLAMA3, Drafter(LLAMA3, [0.0], budget=512), A100, 64, 64000).speedup == 1
    assert omega(1.0, 5) == 6
