"""What a pass of a model of any shape takes on this machine: layers of that shape with random weights, in the engine.

A pass is taken apart: linear layers and all that does not depend on the context, by the number of sequences; attention
of one sequence under every method, by the bytes that the method reads by its own account.
"""

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from thresher.attention.base import AttentionMethod
from thresher.attention.dense import Dense
from thresher.cache.sequence import KVSequence
from thresher.decoding.runner import Runner, Work
from thresher.errors import CapacityError, UsageError
from thresher.evaluation.attention_bench import synthetic_rows
from thresher.evaluation.bench import interleaved, own_copies
from thresher.evaluation.machine import measure_machine
from thresher.machine.cost import attention_cost
from thresher.machine.memory import available_memory
from thresher.machine.profile import MachineProfile
from thresher.machine.shapes import Decoder
from thresher.models.load import WEIGHTS, prepare

_SHORT = 16  # tokens: attention to them is nothing
_WEIGHTS = 3 << 28  # bytes in bf16 of the layers that are made, at least two; more do not change the time of one
_TOGETHER = 2 << 30  # bytes of keys and values of sequences that are timed together
_ROUNDS = 5


@dataclass(frozen=True)
class Calibration:
    """Of a model whose shape was timed. passes: seconds of a pass without context by number of sequences; attention:
    by method (bytes, seconds) of one sequence, of all layers that see the whole context. dense_up_to: contexts up to
    which a method reads densely. together: by method, attention of as many sequences as were timed by as many times
    that of one: threads then have whole sequences to share."""

    profile: MachineProfile
    passes: dict[int, float]
    attention: dict[str, list[tuple[float, float]]]
    dense_up_to: dict[str, int]
    together: dict[str, float]

    def pass_seconds(self, sequences: float) -> float:
        """Between numbers of sequences that were timed by a line, beyond them in proportion."""
        known = sorted(self.passes)
        if sequences > known[-1]:
            return self.passes[known[-1]] * sequences / known[-1]
        return float(np.interp(sequences, known, [self.passes[n] for n in known]))

    def attention_seconds(self, method: str, context: float, size: float, sequences: float) -> float:
        """Of so many sequences that read so many bytes each. Raises KeyError for a method that was not timed."""
        name = "dense" if context <= self.dense_up_to[method] else method
        share = float(np.interp(sequences, [1, max(2, *self.passes)], [1.0, self.together[name]]))
        return sequences * share * self._one(self.attention[name], size)

    def _one(self, points: list[tuple[float, float]], size: float) -> float:
        if size <= points[0][0]:
            return points[0][1] * size / points[0][0]
        (x0, y0), (x1, y1) = points[-2:] if len(points) > 1 else [(0.0, 0.0), points[0]]
        if size > x1 > x0:
            return y1 + (size - x1) * max(0.0, y1 - y0) / (x1 - x0)
        return float(np.interp(size, [p[0] for p in points], [p[1] for p in points]))


def calibrate(
    decoder: Decoder,
    weights: str,
    methods: Sequence[AttentionMethod],
    sequences: Sequence[int],
    contexts: Sequence[int],
    progress: Callable[[str], None] = lambda message: None,
) -> Calibration:
    """Time passes of so many sequences, and attention under every method at every context; between and beyond those its
    time grows with the bytes.

    weights: bf16, int8 or float32. Raises UsageError for experts and recurrent layers, which are not timed, and
    CapacityError if memory is too small for two layers.
    """
    if decoder.experts or decoder.recurrent:
        raise UsageError("experts and recurrent layers are not timed on this machine; plan them for another device")
    layers = decoder.layers - sum(n for n, _ in decoder.windowed)
    per_layer = (decoder.shape().weight_count - decoder.hidden * decoder.vocab) * 2 // decoder.layers
    made = min(decoder.layers, max(2, _WEIGHTS // per_layer))
    # The module, its packed copy, and half as many layers once more.
    needed, free = 3 * made * per_layer + 6 * decoder.hidden * decoder.vocab, available_memory()
    if needed > free:
        raise CapacityError(f"timing such layers takes about {needed / 1e9:.0f} GB, and {free / 1e9:.0f} are free")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        progress("timing passes without context")
        head, passes = dict.fromkeys(sequences, 0.0), {}
        if made < decoder.layers:  # what is not a layer, from a model of half as many
            fewer = made // 2
            half = _passes(_runner(decoder, weights, fewer), sequences)
        runner = _runner(decoder, weights, made)
        whole = _passes(runner, sequences)
    for n in sequences:
        if made < decoder.layers:
            head[n] = max(0.0, whole[n] - (whole[n] - half[n]) / (made - fewer) * made)
        passes[n] = head[n] + (whole[n] - head[n]) * decoder.layers / made
    shape, most = replace(runner.shape, layers=made), max(sequences)
    attention: dict[str, list[tuple[float, float]]] = {}
    every: list[AttentionMethod] = [Dense(), *(m for m in methods if m != Dense())]
    for context in contexts:
        progress(f"timing attention to {context:,} tokens")
        for method, seconds in _attention(runner, every, context).items():
            size = method.cost(shape, context).bytes
            if method == Dense() or size < attention_cost(shape, context).bytes:
                attention.setdefault(str(method), []).append((size * layers / made, seconds * layers / made))
    for points in attention.values():
        points.sort()
    together = {}
    if most > 1:
        progress(f"timing attention of {most} sequences")
        room = _TOGETHER // (most * runner.layout.bytes_per_token)
        one, several = (_attention(runner, every, min(contexts[-1], max(64, room)), n) for n in (1, most))
        together = {str(m): min(1.5, several[m] / (most * one[m])) for m in every}
    known = {str(m): runner.dense_up_to(m) for m in every}
    for method in every:  # read densely wherever it was timed
        if str(method) not in attention:
            known[str(method)] = 1 << 62
    together = {str(m): together.get(str(m), 1.0) for m in every}
    return Calibration(measure_machine(runner.model.dtype), passes, attention, known, together)


def _runner(decoder: Decoder, weights: str, layers: int) -> Runner:
    """A model of the shape of Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights

    config = LlamaConfig(
        vocab_size=decoder.vocab,
        hidden_size=decoder.hidden,
        intermediate_size=decoder.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=decoder.q_heads,
        num_key_value_heads=decoder.kv_heads,
        head_dim=decoder.head_dim or decoder.hidden // decoder.q_heads,
        max_position_embeddings=1 << 20,
        tie_word_embeddings=True,
    )
    dtype = torch.float32 if weights == "float32" else torch.bfloat16
    with no_init_weights():
        module = LlamaForCausalLM._from_config(config, dtype=dtype).eval()
    drawn = 0.02 * torch.randn(1 << 20, dtype=torch.float32).to(
        dtype
    )  # over and over: drawing takes longer than timing
    for parameter in module.parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1)
        else:
            flat = parameter.data.view(-1)
            for begin in range(0, len(flat), len(drawn)):
                flat[begin : begin + len(drawn)] = drawn[: len(flat) - begin]
    tokenizer = SimpleNamespace(eos_token_id=None, chat_template=None)
    return Runner(prepare(module, tokenizer, "random weights", _checked(weights)))


def _checked(weights: str) -> str:
    if weights not in WEIGHTS:
        raise UsageError(f"weights '{weights}': this machine computes in {', '.join(WEIGHTS)}")
    return weights


def _passes(runner: Runner, sequences: Sequence[int]) -> dict[int, float]:
    """Seconds of a pass of one token each of so many sequences of a few tokens."""
    base = _sequence(runner, _SHORT)
    lists = {n: own_copies(base.fork(), n) for n in sequences}
    return _timed(runner, {n: [Work(s, [7], 1) for s in of] for n, of in lists.items()})


def _attention(
    runner: Runner, methods: Sequence[AttentionMethod], context: int, count: int = 1
) -> dict[AttentionMethod, float]:
    """Seconds that a context adds to a pass of so many sequences, which share nothing."""
    copies = own_copies(_sequence(runner, context), count)
    work: dict[Any, list[Work]] = {None: [Work(s, [7], 1) for s in own_copies(_sequence(runner, _SHORT), count)]}
    for method in methods:
        work[method] = []
        for copy in copies:
            sequence = copy.fork()
            sequence.index = None
            runner.prepare(sequence, method)
            sequence.reserve(256, exact=True)
            work[method].append(Work(sequence, [7], 1, method))
    found = _timed(runner, work)
    gc.collect()
    return {method: max(1e-7, found[method] - found[None]) for method in methods}


def _sequence(runner: Runner, context: int) -> KVSequence:
    """Keys and values of one layer in all of them: alike in what they have attention find."""
    rows, _ = synthetic_rows(runner.model.heads, context, seed=0)
    sequence = KVSequence(runner.layout)
    sequence.reserve(context + 256, exact=True)
    sequence.append([7] * context, rows.to(runner.layout.dtype).expand(runner.layout.layers, -1, -1, -1, -1))
    return sequence


def _timed(runner: Runner, work: dict[Any, list[Work]]) -> dict[Any, float]:
    """Median seconds of each pass, in turn."""
    named = [SimpleNamespace(name=str(i), batch=batch) for i, batch in enumerate(work.values())]
    times = interleaved(named, lambda one: runner.run(one.batch), _ROUNDS, steps=3)  # type: ignore[arg-type,attr-defined]
    return {key: statistics.median(times[one.name]) for key, one in zip(work, named, strict=True)}
