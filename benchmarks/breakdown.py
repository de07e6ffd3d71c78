"""Where the time of a pass goes: linear layers, attention, and the rest, each run alone on the same memory.

python benchmarks/breakdown.py --tokens 6000 --weights bf16
"""

import argparse
import json
import statistics
import time
from dataclasses import replace

import torch

from thresher import LLM
from thresher.cache.sequence import KVSequence
from thresher.decoding.runner import Runner, Work
from thresher.evaluation.bench import prompt
from thresher.kernels import _native
from thresher.kernels.attention import AttentionPlan
from thresher.kernels.linear import PackedLinear
from thresher.machine.profile import median_seconds
from thresher.models.fuse import DecoderLayer, Linear


def linears(llm: LLM) -> tuple[list[PackedLinear], PackedLinear]:
    """The packed matrices of the layers, and that of the logits."""
    layers = [m.native.weights for m in llm.model.module.modules() if isinstance(m, DecoderLayer)]
    head = next(m.packed for m in llm.model.module.modules() if isinstance(m, Linear))
    return [p for w in layers for p in (w.qkv, w.out, w.gate_up, w.down)], head


def attention_seconds(llm: LLM, past: int, queries: int) -> float:
    layout = llm.runner.layout
    heads = llm.model.heads
    data = torch.randn(layout.layers, 2, heads.kv_heads, past + queries, heads.head_dim).to(layout.dtype)
    plan = AttentionPlan(heads, layout.dtype, _native.Workspace())
    plan.add(queries, past, [(data, past + queries)])
    q = torch.randn(queries, heads.q_heads, heads.head_dim).to(layout.dtype)
    k = torch.randn(queries, heads.kv_heads, heads.head_dim).to(layout.dtype)
    return median_seconds(lambda: [plan.attend(i, q, k, k, 0.125) for i in range(layout.layers)], 5)


def linear_seconds(llm: LLM, rows: int, logit_rows: int) -> float:
    layers, head = linears(llm)
    inputs = {p.in_features: torch.randn(rows, p.in_features).to(llm.model.dtype) for p in layers}
    last = inputs[head.in_features][:logit_rows]
    return median_seconds(lambda: [p(inputs[p.in_features]) for p in layers] + [head(last)], 5)


def loop_against_forward(llm: LLM, ids: list[int], rounds: int = 100) -> dict[str, float]:
    """Median milliseconds of a token by the plain loop over native layers, and by transformers' forward over them."""
    runners = {"loop_ms": llm.runner, "forward_ms": Runner(replace(llm.model, stack=None))}
    sequences = {name: KVSequence(runner.layout) for name, runner in runners.items()}
    times: dict[str, list[float]] = {name: [] for name in runners}
    for name, runner in runners.items():
        runner.run([Work(sequences[name], ids, 1)])
    for _ in range(rounds):
        for name, runner in runners.items():
            begin = time.perf_counter()
            runner.run([Work(sequences[name], [7], 1)])
            times[name].append(time.perf_counter() - begin)
    return {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--weights", default="bf16")
    options = parser.parse_args()
    llm = LLM(weights=options.weights)
    ids = prompt(llm, options.tokens)

    def prefill() -> KVSequence:
        sequence = KVSequence(llm.runner.layout)
        sequence.reserve(options.tokens + 256, exact=True)
        for begin in range(0, options.tokens, llm.chunk_size):
            chunk = ids[begin : begin + llm.chunk_size]
            llm.runner.run([Work(sequence, chunk, begin + len(chunk) == options.tokens)])
        return sequence

    sequence = prefill()
    chunks = [(b, min(llm.chunk_size, options.tokens - b)) for b in range(0, options.tokens, llm.chunk_size)]
    passes = {
        "prefill": (
            median_seconds(prefill, 3),
            sum(linear_seconds(llm, n, int(b + n == options.tokens)) for b, n in chunks),
            sum(attention_seconds(llm, b, n) for b, n in chunks),
        ),
        "decode": (
            median_seconds(lambda: llm.runner.run([Work(sequence, [7], True)]), 30),
            linear_seconds(llm, 1, 1),
            attention_seconds(llm, options.tokens, 1),
        ),
    }
    result = {
        name: {"ms": 1e3 * whole, "linear_ms": 1e3 * linear, "attention_ms": 1e3 * attention}
        | {"rest_ms": 1e3 * (whole - linear - attention)}
        for name, (whole, linear, attention) in passes.items()
    }
    result["one token, in turns"] = loop_against_forward(llm, ids)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
