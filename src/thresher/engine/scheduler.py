"""Continuous batching: which tokens of which sequences go into the next pass.

Every running sample decodes one token a pass. Prompts are read in chunks beside them, smaller ones while others
decode, so that a long prompt slows running answers but never stops them. A request is admitted when the rows it may
need at most fit into the KV budget; until then it waits.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from thresher.attention.base import AttentionMethod
from thresher.attention.index import Index, Readings
from thresher.cache.sequence import KVSequence
from thresher.engine.runner import Runner, Work
from thresher.engine.sampler import Choice, next_token, random_stream
from thresher.engine.sampling import SamplingParams
from thresher.engine.stopping import TextStream
from thresher.errors import CapacityError, UsageError

MIXED_CHUNK = 64  # prompt tokens read in a pass that also decodes


@dataclass(frozen=True)
class Request:
    """Tokens to read on top of `base` (a cached context, or nothing), then `params.n` answers."""

    index: int
    token_ids: Sequence[int]
    params: SamplingParams
    base: KVSequence | None = None

    @property
    def prompt_length(self) -> int:
        return len(self.token_ids) + (self.base.length if self.base else 0)


@dataclass(frozen=True)
class Event:
    """One more token of one sample, or its end. `text` is what became certain, possibly nothing yet.

    finish_reason: None while it goes on, "stop" (end token or stop string) or "length". readings: at the end, what
    sparse attention has read for the sample.
    """

    request: int
    sample: int
    choice: Choice | None
    text: str
    finish_reason: str | None
    readings: Readings | None = None


@dataclass(eq=False)
class _Sample:
    request: Request
    index: int
    sequence: KVSequence
    stream: TextStream
    rng: np.random.Generator
    limit: int
    pending: int = -1  # chosen, not yet in the cache
    generated: list[int] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)  # what a repetition penalty looks at


@dataclass(eq=False)
class _Prefill:
    request: Request
    sequence: KVSequence
    limit: int
    done: int = 0


class Scheduler:
    """Runs requests to their end. `step` makes one pass and says what came of it."""

    def __init__(
        self,
        runner: Runner,
        method: AttentionMethod,
        positions: int,
        kv_budget: int,
        chunk_size: int,
    ) -> None:
        """positions: longest sequence; kv_budget: bytes of keys and values; chunk_size: prompt tokens of a pass."""
        self._runner = runner
        self._method = method
        self._positions = positions
        self._budget_rows = kv_budget // runner.layout.bytes_per_token
        self._chunk_size = chunk_size
        self._waiting: deque[Request] = deque()
        self._prefills: deque[_Prefill] = deque()
        self._samples: list[_Sample] = []
        self._held: dict[int, tuple[int, int]] = {}  # request -> rows of the budget, samples still running

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._prefills or self._samples)

    def add(self, request: Request) -> None:
        """Queue a request. Raises UsageError or CapacityError if it could never run."""
        total = request.prompt_length
        if not request.token_ids:
            raise UsageError("the prompt is empty; give it at least one token")
        vocab = self._runner.model.vocab_size
        if not all(0 <= t < vocab for t in request.token_ids):
            raise UsageError(f"the prompt holds token ids outside of 0 .. {vocab - 1}")
        if total > self._positions:
            raise CapacityError(
                f"the prompt has {total} tokens, the model was trained for {self._positions} positions; "
                "shorten it, or allow RoPE extrapolation with --allow-extrapolation"
            )
        rows = self._rows(request)
        if rows > self._budget_rows:
            size = self._runner.layout.bytes_per_token
            raise CapacityError(
                f"the request needs up to {rows * size / 2**20:.0f} MiB of KV cache, the budget is "
                f"{self._budget_rows * size / 2**20:.0f} MiB; shorten it or raise --kv-budget"
            )
        self._waiting.append(request)

    def step(self) -> list[Event]:
        """Admit what fits, make one pass, choose the next tokens."""
        events = self._admit()
        decoding = list(self._samples)
        batch = [Work(s.sequence, [s.pending], True, self._method) for s in decoding]
        reading: list[tuple[_Prefill, int]] = []
        room = MIXED_CHUNK if decoding else self._chunk_size
        for prefill in self._prefills:
            n = min(room, len(prefill.request.token_ids) - prefill.done)
            if n == 0:
                break
            chunk = prefill.request.token_ids[prefill.done : prefill.done + n]
            batch.append(Work(prefill.sequence, chunk, prefill.done + n == len(prefill.request.token_ids)))
            reading.append((prefill, n))
            room -= n
        if not batch:
            return events
        logits = iter(self._runner.run(batch))
        for sample in decoding:
            events.append(self._choose(sample, next(logits)))
        for prefill, n in reading:
            prefill.done += n
            if prefill.done == len(prefill.request.token_ids):
                self._prefills.remove(prefill)
                row = next(logits)
                for sample in self._start_samples(prefill):
                    events.append(self._choose(sample, row))
        return events

    def _limit(self, request: Request) -> int:
        """Tokens a sample may produce: the last one needs no position of its own."""
        return min(request.params.max_new_tokens, self._positions - request.prompt_length + 1)

    def _rows(self, request: Request) -> int:
        return len(request.token_ids) + request.params.n * max(self._limit(request) - 1, 0)

    def _admit(self) -> list[Event]:
        events = []
        while self._waiting:
            request = self._waiting[0]
            params, rows, limit = request.params, self._rows(request), self._limit(request)
            if sum(r for r, _ in self._held.values()) + rows > self._budget_rows:
                break
            self._waiting.popleft()
            if limit == 0:
                events += [Event(request.index, i, None, "", "length") for i in range(params.n)]
                continue
            sequence = request.base.fork() if request.base else KVSequence(self._runner.layout)
            # Memory that is reserved but not written costs nothing, so take what may be needed in one piece.
            sequence.reserve(len(request.token_ids) + (limit - 1 if params.n == 1 else 0), exact=True)
            self._held[request.index] = (rows, params.n)
            self._prefills.append(_Prefill(request, sequence, limit))
        return events

    def _start_samples(self, prefill: _Prefill) -> list[_Sample]:
        request, params = prefill.request, prefill.request.params
        samples = []
        if params.n > 1:  # so that the samples share the index
            self._runner.prepare(prefill.sequence, self._method)
        for i in range(params.n):
            sequence = prefill.sequence
            if params.n > 1:
                sequence = sequence.fork()
                sequence.reserve(max(prefill.limit - 1, 1), exact=True)
            stream = TextStream(self._runner.model.tokenizer, params.stop)
            rng = random_stream(params.seed, i)
            seen = set(sequence.token_ids) if params.repetition_penalty != 1 else set()
            samples.append(_Sample(request, i, sequence, stream, rng, prefill.limit, seen=seen))
        self._samples += samples
        return samples

    def _choose(self, sample: _Sample, logits: torch.Tensor) -> Event:
        params = sample.request.params
        choice = next_token(logits, params, sample.seen, sample.generated, sample.rng)
        sample.generated.append(choice.token)
        sample.seen.add(choice.token)
        sample.pending = choice.token
        ended = choice.token in params.stop_token_ids or (
            not params.ignore_eos and choice.token in self._runner.model.eos_token_ids
        )
        text = "" if ended else sample.stream.push(choice.token)
        reason = "stop" if ended or sample.stream.stopped else None
        if reason is None and len(sample.generated) == sample.limit:
            reason = "length"
        readings = None
        if reason:
            text += sample.stream.finish()
            self._finish(sample)
            index = sample.sequence.index
            readings = index.readings() if isinstance(index, Index) else None
        return Event(sample.request.index, sample.index, choice, text, reason, readings)

    def _finish(self, sample: _Sample) -> None:
        self._samples.remove(sample)
        rows, running = self._held.pop(sample.request.index)
        if running > 1:
            self._held[sample.request.index] = (rows, running - 1)
