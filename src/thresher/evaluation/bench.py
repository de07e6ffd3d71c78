"""Decode and prefill against the clock: our engine, the machine's floor, and peers, interleaved in one run."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from thresher.attention.base import AttentionMethod
from thresher.attention.index import Index
from thresher.attention.sparse import SparseMethod
from thresher.cache.sequence import KVSequence
from thresher.decoding.runner import Work
from thresher.engine.llm import LLM
from thresher.evaluation.fidelity import reading
from thresher.evaluation.machine import measure_machine
from thresher.evaluation.peers import Engine
from thresher.evaluation.teacher import prefill
from thresher.machine.cost import Cost, attention_cost, weights_cost
from thresher.machine.profile import MachineProfile

Progress = Callable[[str], None]
ROOM = 512  # rows kept free behind a prompt, for the steps that are measured


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
    """Our own engine with one attention method, as one of several."""

    def __init__(self, llm: LLM, method: AttentionMethod) -> None:
        self.name = f"thresher {llm.model.weights} {method}"
        self.weight_bytes = llm.model.weight_bytes
        self.method = method
        self._llm = llm
        self._sequences: list[KVSequence] = []

    def prefill(self, token_ids: Sequence[int]) -> None:
        sequence = KVSequence(self._llm.runner.layout)
        sequence.reserve(len(token_ids) + ROOM, exact=True)
        for begin in range(0, len(token_ids), self._llm.chunk_size):
            chunk = token_ids[begin : begin + self._llm.chunk_size]
            self._llm.runner.run([Work(sequence, chunk, begin + len(chunk) == len(token_ids))])
        self._sequences = [sequence]

    def adopt(self, sequence: KVSequence, batch: int = 1) -> None:
        self.share(own_copies(sequence, batch))

    def share(self, sequences: Sequence[KVSequence]) -> None:
        """Hold forks of these sequences, and an index of its own for each. All have the same rows, so it is built
        once."""
        self._sequences = [sequence.fork() for sequence in sequences]
        built: Index | None = None
        for sequence in self._sequences:
            sequence.index = None
            if built is None:
                built = self._llm.runner.prepare(sequence, self.method)
            else:
                meta, arrays = built.state()
                own = {name: array.clone() for name, array in arrays.items()}
                sequence.index = Index.restore(
                    built.method, built.shape, self._llm.model.layers, sequence.length, meta, own
                )
            sequence.reserve(ROOM, exact=True)

    def decode(self, token_id: int) -> None:
        self._llm.runner.run([Work(s, [token_id], True, self.method) for s in self._sequences])

    def cost(self, context: int) -> Cost:
        """A pass over all sequences: by what was counted while it was measured."""
        batch, shape = len(self._sequences), self._llm.runner.shape
        rest = self.method.cost(shape, context)
        index = self._sequences[0].index
        if isinstance(self.method, SparseMethod) and isinstance(index, Index) and index.readings().readings:
            rest = Cost(rest.flops, reading(index, self.method, self._llm, context).bytes)
        return weights_cost(shape, batch) + rest.times(batch)


def long_context(
    llm: LLM, length: int, text: str | None, synthetic_above: int | None, progress: Progress
) -> KVSequence:
    """A sequence of `length` tokens of `prompt`; beyond `synthetic_above` tokens of `synthetic_cache`."""
    progress(f"{length} tokens: reading the prompt")
    real = min(length, synthetic_above or length)
    sequence = prefill(llm, prompt(llm, real, text))
    return synthetic_cache(sequence, length) if real < length else sequence


def own_copies(sequence: KVSequence, batch: int) -> list[KVSequence]:
    """`batch` sequences with the same tokens, each with rows of its own."""
    copies = [sequence]
    for _ in range(batch - 1):
        other = KVSequence(sequence.layout)
        other.reserve(sequence.length + ROOM, exact=True)
        other.append(sequence.token_ids, sequence.rows(0, sequence.length))
        other.states = dict(sequence.states)
        copies.append(other)
    return copies


def prompt(llm: LLM, length: int, text: str | None = None) -> list[int]:
    """Token ids of a text, over and over; without one drawn with a fixed seed, which is as good for dense attention."""
    if text is not None:
        known: list[int] = llm.model.tokenizer.encode(text, verbose=False)
        return (known * (-(-length // len(known))))[:length]
    generator = torch.Generator().manual_seed(length)
    ids: list[int] = torch.randint(100, llm.model.vocab_size - 100, (length,), generator=generator).tolist()
    return ids


def synthetic_cache(sequence: KVSequence, length: int, seed: int = 0) -> KVSequence:
    """A sequence of `length` tokens whose keys and values are drawn like those of a shorter real one.

    After the real rows every token takes the rows that a real one (drawn at random, not among the first 64) has in all
    layers, with Gaussian noise of a tenth of each channel's spread: what attention then finds is as spread out and as
    peaked as in the real text, but tokens are no text, and only times and attention errors mean anything.
    """
    generator = torch.Generator().manual_seed(seed)
    real = sequence.rows(0, sequence.length)
    out = KVSequence(sequence.layout)
    out.reserve(length + ROOM, exact=True)
    out.append(sequence.token_ids, real)
    spread = real.float().std(dim=3, keepdim=True)
    while out.length < length:
        n = min(4096, length - out.length)
        chosen = torch.randint(min(64, sequence.length - 1), sequence.length, (n,), generator=generator)
        rows = real[:, :, :, chosen].float()
        rows += 0.1 * spread * torch.randn(rows.shape, generator=generator)
        out.append([sequence.token_ids[i] for i in chosen.tolist()], rows.to(real.dtype))
    if sequence.layout.state_bytes:
        out.states = {length: sequence.state()}
    return out


def bench_decode(
    llm: LLM,
    contexts: Sequence[int],
    batches: Sequence[int],
    methods: Sequence[AttentionMethod],
    peers: dict[str, Callable[[], Engine]],
    rounds: int,
    progress: Progress,
    text: str | None = None,
    synthetic_above: int | None = None,
) -> Iterator[tuple[Timing, MachineProfile]]:
    """Time one decode step of every method and engine at every context and batch, a few steps each in turn.

    synthetic_above: longer contexts are filled by `synthetic_cache` from a prompt of this many tokens. The machine is
    measured again for every context: what memory delivers changes from minute to minute.
    """
    others: list[Engine] = []
    for name, make in peers.items():
        progress(f"loading {name}")
        others.append(make())
    shape = llm.runner.shape
    for context in contexts:
        base = long_context(llm, context, text, synthetic_above, progress)
        for batch in batches:
            own = [Thresher(llm, method) for method in methods]
            copies = own_copies(base, batch)
            for engine in own:
                progress(f"{context} tokens x {batch}: {engine.name} gets ready")
                engine.share(copies)
            for peer in others:
                progress(f"{context} tokens x {batch}: {peer.name} takes over the prompt")
                peer.adopt(base, batch)
            progress(f"{context} tokens x {batch}: measuring")
            machine = measure_machine(llm.model.dtype)
            running: list[Engine] = [*own, *others]
            times = interleaved(running, lambda engine: engine.decode(7), rounds, steps=4)
            for engine in own:
                yield (
                    timing(engine.name, context, batch, times[engine.name], engine.cost(context), machine, batch),
                    machine,
                )
            for peer in others:  # its own weights; every peer here reads all rows
                rest = attention_cost(shape, context).times(batch)
                cost = Cost(weights_cost(shape, batch).flops + rest.flops, peer.weight_bytes + rest.bytes)
                yield timing(peer.name, context, batch, times[peer.name], cost, machine, batch), machine
            del own, copies, running
            gc.collect()


def bench_prefill(
    llm: LLM, lengths: Sequence[int], peers: dict[str, Callable[[], Engine]], rounds: int, progress: Progress
) -> Iterator[tuple[Timing, MachineProfile]]:
    """Time reading a whole prompt, engines in turn."""
    engines: list[Engine] = [Thresher(llm, llm.attention)]
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
