"""Decode and prefill against the clock: our engine, the machine's floor, and peers, interleaved in one run."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from thresher.cache.sequence import KVSequence
from thresher.engine.llm import LLM
from thresher.engine.runner import Work
from thresher.evaluation.machine import measure_machine
from thresher.evaluation.peers import Engine
from thresher.machine.cost import Cost, attention_cost, weights_cost
from thresher.machine.profile import MachineProfile

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Timing:
    """One engine at one setting. Times in ms; bytes read per pass; ratios against the floor (time it must take)."""

    engine: str
    context: int
    batch: int
    median_ms: float
    min_ms: float
    tokens_per_second: float
    bytes: float
    flops: float
    floor_ms: float
    floor_ratio: float


class Thresher:
    """Our own engine as one of several."""

    def __init__(self, llm: LLM) -> None:
        self.name = f"thresher {llm.model.weights} {llm.attention}"
        self.weight_bytes = llm.model.weight_bytes
        self._llm = llm
        self.sequences: list[KVSequence] = []

    def prefill(self, token_ids: Sequence[int]) -> None:
        sequence = KVSequence(self._llm.runner.layout)
        sequence.reserve(len(token_ids) + 256, exact=True)
        for begin in range(0, len(token_ids), self._llm.chunk_size):
            chunk = token_ids[begin : begin + self._llm.chunk_size]
            self._llm.runner.run([Work(sequence, chunk, begin + len(chunk) == len(token_ids))])
        self.sequences = [sequence]

    def copies(self, batch: int) -> None:
        """Make the sequence `batch` ones with rows of their own."""
        first = self.sequences[0]
        for _ in range(batch - 1):
            other = KVSequence(first.layout)
            other.reserve(first.length + 256, exact=True)
            other.append(first.token_ids, first.rows(0, first.length))
            self.sequences.append(other)

    def adopt(self, sequence: KVSequence, batch: int = 1) -> None:
        self.sequences = [sequence]
        self.copies(batch)

    def decode(self, token_id: int) -> None:
        self._llm.runner.run([Work(s, [token_id], True, self._llm.attention) for s in self.sequences])


def prompt(llm: LLM, length: int) -> list[int]:
    """Token ids drawn with a fixed seed: dense engines take the same time for every text."""
    generator = torch.Generator().manual_seed(length)
    ids: list[int] = torch.randint(100, llm.model.vocab_size - 100, (length,), generator=generator).tolist()
    return ids


def bench_decode(
    llm: LLM,
    contexts: Sequence[int],
    batches: Sequence[int],
    peers: dict[str, Callable[[], Engine]],
    rounds: int,
    progress: Progress,
) -> Iterator[tuple[Timing, MachineProfile]]:
    """Time one decode step of every engine at every context, a few steps each in turn.

    The machine is measured again for every context: what memory delivers changes from minute to minute.
    """
    engines: list[Engine] = []
    for name, make in peers.items():
        progress(f"loading {name}")
        engines.append(make())
    own = Thresher(llm)
    shape = llm.runner.shape
    for context in contexts:
        for batch in batches:
            progress(f"{context} tokens x {batch}: reading the prompt")
            own.prefill(prompt(llm, context))
            for engine in engines:
                progress(f"{context} tokens x {batch}: {engine.name} takes over the prompt")
                engine.adopt(own.sequences[0], batch)
            own.copies(batch)
            running: list[Engine] = [own, *engines]
            progress(f"{context} tokens x {batch}: measuring")
            machine = measure_machine(llm.model.dtype)
            times = interleaved(running, lambda engine: engine.decode(7), rounds, steps=4)
            for engine in running:
                cost = weights_cost(shape, batch) + llm.attention.cost(shape, context).times(batch)
                if engine is not own:  # its own weights; every peer here reads all rows
                    rest = attention_cost(shape, context).times(batch)
                    cost = Cost(weights_cost(shape, batch).flops + rest.flops, engine.weight_bytes + rest.bytes)
                yield timing(engine.name, context, batch, times[engine.name], cost, machine, tokens=batch), machine
            own.sequences = []
            gc.collect()


def bench_prefill(
    llm: LLM, lengths: Sequence[int], peers: dict[str, Callable[[], Engine]], rounds: int, progress: Progress
) -> Iterator[tuple[Timing, MachineProfile]]:
    """Time reading a whole prompt, engines in turn."""
    engines: list[Engine] = [Thresher(llm)]
    for name, make in peers.items():
        progress(f"loading {name}")
        engines.append(make())
    shape = llm.runner.shape
    for length in lengths:
        ids = prompt(llm, length)
        machine = measure_machine(llm.model.dtype)
        progress(f"{length} tokens: measuring {', '.join(e.name for e in engines)}")
        times = interleaved(engines, lambda engine, ids=ids: engine.prefill(ids), rounds, steps=1, warm=False)  # type: ignore[misc]
        layers_only = shape.weight_count - llm.model.vocab_size * llm.model.module.config.get_text_config().hidden_size
        passes = -(-length // llm.chunk_size)
        flops = 2.0 * layers_only * length + attention_cost(shape, length // 2, length).flops
        cost = Cost(flops, float(passes * shape.weight_bytes + passes * length // 2 * shape.kv_bytes_per_token))
        for engine in engines:
            yield timing(engine.name, length, 1, times[engine.name], cost, machine, tokens=length), machine


def interleaved(
    engines: Sequence[Engine], run: Callable[[Engine], None], rounds: int, steps: int, warm: bool = True
) -> dict[str, list[float]]:
    """Seconds of each step of each engine; the engines take turns, in changing order."""
    times: dict[str, list[float]] = {engine.name: [] for engine in engines}
    for turn in range(rounds):
        for engine in engines if turn % 2 == 0 else list(reversed(engines)):
            if warm:  # the caches still hold the other engine's data
                run(engine)
            for _ in range(steps):
                begin = time.perf_counter()
                run(engine)
                times[engine.name].append(time.perf_counter() - begin)
    return times


def timing(
    name: str, context: int, batch: int, seconds: list[float], cost: Cost, machine: MachineProfile, tokens: int
) -> Timing:
    median = statistics.median(seconds)
    floor = machine.seconds(cost)
    return Timing(
        engine=name,
        context=context,
        batch=batch,
        median_ms=1e3 * median,
        min_ms=1e3 * min(seconds),
        tokens_per_second=tokens / median,
        bytes=cost.bytes,
        flops=cost.flops,
        floor_ms=1e3 * floor,
        floor_ratio=median / floor,
    )
