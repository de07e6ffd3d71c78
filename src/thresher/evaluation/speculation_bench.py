"""Speculation against plain decoding through the scheduler, in turns, beside what single passes predict."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thresher.attention.base import AttentionMethod
from thresher.attention.dense import Dense
from thresher.attention.sparse import SparseMethod
from thresher.cache.sequence import KVSequence
from thresher.decoding.runner import Runner, Work
from thresher.decoding.sampling import SamplingParams
from thresher.engine.llm import LLM
from thresher.engine.requests import Request
from thresher.engine.scheduler import Scheduler
from thresher.evaluation.bench import long_context, own_copies
from thresher.machine.profile import median_seconds
from thresher.speculation.settings import Speculation
from thresher.speculation.speculator import AUTO, NGRAM, TARGET, VIEWS, SpeculationStats

APART = 37  # tokens by which the contexts of a batch differ, so that their answers do


@dataclass(frozen=True)
class SpeculationTiming:
    """One setting. tokens_per_second: of all sequences, median of the turns; speedup: over plain decoding, median of
    the ratios within a turn; predicted: the same from the times of single passes and the passes there were.
    acceptance: drafted tokens that stood, at each position; gammas: passes with drafts of each length; same: whether
    the tokens were those of plain decoding, None where chance decides."""

    setting: str
    context: int
    batch: int
    temperature: float
    tokens_per_second: float
    speedup: float
    predicted: float
    tokens_per_pass: float
    acceptance: list[float]
    gammas: list[int]
    drafters: dict[str, int]
    same: bool | None


@dataclass(frozen=True)
class _Run:
    rate: float  # tokens a second
    tokens: list[list[int]]
    stats: list[SpeculationStats]


def bench_speculation(
    llm: LLM,
    contexts: Sequence[int],
    batches: Sequence[int],
    temperatures: Sequence[float],
    settings: Sequence[Speculation],
    tokens: int,
    rounds: int,
    progress: Callable[[str], None],
    text: str | None,
    synthetic_above: int | None,
) -> Iterator[SpeculationTiming]:
    """Generate `tokens` tokens of every sequence with every setting and without, in turn.

    synthetic_above: longer contexts are filled by `synthetic_cache` from a prompt of this many tokens.
    """
    for context in contexts:
        base = long_context(llm, context, text, synthetic_above, progress)
        for batch in batches:
            starts = [_Start(s.fork(), context - 1 - APART * i) for i, s in enumerate(own_copies(base, batch))]
            for temperature in temperatures:
                yield from _compare(llm, starts, context, temperature, settings, tokens, rounds, progress)


class _Start:
    """A cached sequence that answers go on from: its last token is not in the cache yet. Keeps an index of each method
    that drafts with it."""

    def __init__(self, sequence: KVSequence, length: int) -> None:
        self.sequence = sequence
        self.last = sequence.token_ids[length]
        sequence.crop(length)
        self._indexes: dict[str, Any] = {}

    def ready(self, llm: LLM, method: AttentionMethod | None) -> KVSequence:
        """The sequence with the index of a method."""
        if isinstance(method, SparseMethod) and not method.visibility():
            self.sequence.index = self._indexes.get(method.index_key())
            self._indexes[method.index_key()] = llm.runner.prepare(self.sequence, method)
        return self.sequence


def _method(setting: Speculation | None) -> AttentionMethod | None:
    """How the model's own drafts read the cache."""
    return {"self": setting.method, "auto": AUTO}.get(setting.drafter) if setting else None


def _compare(
    llm: LLM,
    starts: Sequence[_Start],
    context: int,
    temperature: float,
    settings: Sequence[Speculation],
    tokens: int,
    rounds: int,
    progress: Callable[[str], None],
) -> Iterator[SpeculationTiming]:
    listed: list[Speculation | None] = [None, *settings]
    schedulers = [llm.scheduler() for _ in listed]
    runs: list[list[_Run]] = [[] for _ in listed]
    times = _PassTimes(llm, starts)
    for turn in range(rounds):
        order = list(range(len(listed)))
        for i in order if turn % 2 == 0 else reversed(order):
            progress(f"{context} tokens x {len(starts)}, turn {turn + 1}: {listed[i] or 'plain'}")
            runs[i].append(_generate(schedulers[i], llm, starts, temperature, listed[i], tokens))
            times.measure(listed[i], *_passes(runs[i][-1].stats))
    plain = runs[0]
    for setting, own in zip(listed, runs, strict=True):
        merged = [s for run in own for s in run.stats]
        drafted, accepted = (_summed([getattr(s, name) for s in merged]) for name in ("drafted", "accepted"))
        gammas, drafters = _passes(merged)
        passes = sum(gammas)
        produced = sum(len(t) - 1 for run in own for t in run.tokens)
        yield SpeculationTiming(
            setting=str(setting) if setting else "plain",
            context=context,
            batch=len(starts),
            temperature=temperature,
            tokens_per_second=statistics.median(run.rate for run in own),
            speedup=statistics.median(run.rate / other.rate for run, other in zip(own, plain, strict=True)),
            predicted=times.predicted(gammas, drafters, produced / passes) if passes else 1.0,
            tokens_per_pass=produced / passes if passes else 1.0,
            acceptance=[a / d for a, d in zip(accepted, drafted, strict=True)],
            gammas=gammas,
            drafters=drafters,
            same=None if temperature else own[0].tokens == plain[0].tokens,
        )


def _generate(
    scheduler: Scheduler,
    llm: LLM,
    starts: Sequence[_Start],
    temperature: float,
    setting: Speculation | None,
    tokens: int,
) -> _Run:
    """Every sequence goes on from its last token; timed while all of them run, as in an engine where others wait: with
    drafts they end at different times."""
    params = SamplingParams(max_new_tokens=tokens, temperature=temperature, ignore_eos=True)
    ids = [llm.engine.new_id() for _ in starts]
    for number, (id, start) in enumerate(zip(ids, starts, strict=True)):
        base = start.ready(llm, _method(setting))
        scheduler.add(Request(id, [start.last], params, base, Dense(), setting, number))
    found: dict[int, list[int]] = {id: [] for id in ids}
    stats: list[SpeculationStats] = []
    begin = end = 0.0
    before = after = 0
    ended = False
    while scheduler.busy:
        for event in scheduler.step():
            if event.error:
                raise event.error
            if event.choice:
                found[event.request].append(event.choice.token)
            if event.speculation:
                stats.append(event.speculation)
            ended = ended or event.finish_reason is not None
        produced = sum(len(t) for t in found.values())
        if not begin and all(found.values()):
            begin, before = time.perf_counter(), produced
        if not end and ended:
            end, after = time.perf_counter(), produced
    return _Run((after - before) / (end - begin), list(found.values()), stats)


class _PassTimes:
    """Seconds of single passes over the same sequences, measured a few times within each turn."""

    def __init__(self, llm: LLM, starts: Sequence[_Start]) -> None:
        self._llm = llm
        self._starts = starts
        self._known: dict[tuple[str, int], list[float]] = {}  # (maker, new tokens of each sequence)

    def measure(self, setting: Speculation | None, gammas: Sequence[int], drafters: Mapping[str, int]) -> None:
        """The passes that a run has had: drafts of these lengths by these makers."""
        for tokens in {1, *(gamma + 1 for gamma, count in enumerate(gammas) if count)}:
            forks = [start.sequence.fork() for start in self._starts]
            self._time(TARGET, tokens, self._llm.runner, forks, None)
        for drafter in drafters:
            if drafter in self._llm.draft_models:
                model = self._llm.draft_models[drafter]
                forks = [sequence.fork() for sequence in model.sequences()[-len(self._starts) :]]
                self._time(drafter, 1, model.runner, forks, model.method)
            elif drafter != NGRAM:
                method = setting.method if setting and setting.drafter == "self" else None
                method = method or VIEWS[drafter]
                forks = [start.ready(self._llm, method).fork() for start in self._starts]
                self._time(drafter, 1, self._llm.runner, forks, method)

    def predicted(self, gammas: Sequence[int], drafters: Mapping[str, int], tokens_per_pass: float) -> float:
        """Speed-up of passes whose drafts had these lengths and makers."""
        drafting = sum(drafters.values())
        a_draft = sum(n * self._median(name, 1) for name, n in drafters.items() if name != NGRAM) / max(drafting, 1)
        seconds = sum(
            count * (self._median(TARGET, gamma + 1) + gamma * a_draft) for gamma, count in enumerate(gammas) if count
        )
        return tokens_per_pass * self._median(TARGET, 1) / (seconds / sum(gammas))

    def _median(self, maker: str, tokens: int) -> float:
        return statistics.median(self._known[maker, tokens])

    def _time(
        self, maker: str, tokens: int, runner: Runner, forks: list[KVSequence], method: AttentionMethod | None
    ) -> None:
        lengths = [s.length for s in forks]
        for fork in forks:
            fork.reserve(tokens, exact=True)

        def run() -> None:
            works = [Work(s, [7] * tokens, tokens, method, draft=maker != TARGET) for s in forks]
            runner.run(works).argmax(dim=-1)
            for s, n in zip(forks, lengths, strict=True):
                s.crop(n)

        self._known.setdefault((maker, tokens), []).append(median_seconds(run, 3))


def _passes(stats: Sequence[SpeculationStats]) -> tuple[list[int], dict[str, int]]:
    """Passes by the length of their draft, and by who drafted."""
    drafters = {name: sum(s.drafters.get(name, 0) for s in stats) for name in {n for s in stats for n in s.drafters}}
    return _summed([s.gammas for s in stats]), drafters


def _summed(rows: Sequence[Sequence[int]]) -> list[int]:
    """Sums by position of rows that may be of different length."""
    longest = max((len(row) for row in rows), default=0)
    return [sum(row[i] for row in rows if i < len(row)) for i in range(longest)]
