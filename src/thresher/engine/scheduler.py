"""Continuous batching: which tokens of which sequences go into the next pass.

Every running sample decodes one token a pass, and prompts are read in chunks beside them, as many tokens as fit into
the time of a pass. The shortest remainder goes first, with a share for the prompt that came first, so that short
prompts overtake long ones and long ones still go on. A request is admitted when all memory that it may come to need
fits into the account; until then it waits, and a few smaller ones may pass it. What goes wrong for one request ends
that request and no other. A sample whose index is not built far enough sits out while the others go on.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch

from thresher.attention.base import AttentionMethod
from thresher.attention.index import Growth, Index, index_bytes_per_token
from thresher.attention.snapkv import SnapKV
from thresher.attention.sparse import RECENT_QUERIES
from thresher.cache.sequence import KVSequence
from thresher.engine.memory import MemoryAccount
from thresher.engine.pacing import Chunk, Pace
from thresher.engine.requests import Event, PromptUsage, Request
from thresher.engine.runner import Runner, Work
from thresher.engine.sample import Holder, Sample
from thresher.engine.sampler import Choice, SampleState, choose, prompt_logprobs
from thresher.engine.stopping import TextStream
from thresher.errors import CapacityError, UsageError

PASS_SECONDS = 0.05  # of a pass while others wait for it
ALONE = 4  # times as long may a pass be that nobody waits for
OVERTAKES = 8  # requests that may be admitted past one that does not fit yet
LOGPROB_CHUNK = 64  # prompt tokens of a pass whose logits are all wanted
STREAM_CONTEXT = 8  # tokens of the prompt that the text of an answer is decoded after


@dataclass(eq=False)
class _Prompt(Holder):
    """A prompt that is being read; with `logits`, one that is read and waits for its index, which samples share."""

    request: Request = field(kw_only=True)
    limit: int = field(kw_only=True)
    done: int = 0
    logits: torch.Tensor | None = None
    logprobs: list[Choice | None] = field(default_factory=lambda: [None])

    @property
    def left(self) -> int:
        return len(self.request.token_ids) - self.done


@dataclass(eq=False)
class _Waiting:
    request: Request
    passed: int = 0


@dataclass(frozen=True)
class _Needs:
    """Bytes that a request may come to hold: for its prompt, and for each of its samples."""

    prompt: int
    sample: int


class Scheduler:
    """Runs requests to their end. `step` makes one pass and says what came of it. For one thread at a time."""

    def __init__(
        self,
        runner: Runner,
        *,
        memory: MemoryAccount,
        positions: int,
        chunk_size: int = 512,
        pass_seconds: float = PASS_SECONDS,
    ) -> None:
        """positions: longest sequence; chunk_size: most prompt tokens of a pass; pass_seconds: time of a pass."""
        self._runner = runner
        self._memory = memory
        self._positions = positions
        self._chunk_size = chunk_size
        self._pass_seconds = pass_seconds
        self._pace = Pace(runner.shape)
        self._waiting: list[_Waiting] = []
        self._prompts: list[_Prompt] = []  # in order of arrival
        self._samples: list[Sample] = []
        self._running: dict[int, int] = {}  # request -> samples that have not ended
        self._builder = ThreadPoolExecutor(1, "thresher-index")  # starts its thread when there is something to build

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._prompts or self._samples)

    def sequences(self) -> list[KVSequence]:
        """Of all prompts and samples that run."""
        return [p.sequence for p in self._prompts] + [s.sequence for s in self._samples]

    def check(self, request: Request) -> None:
        """Raises UsageError or CapacityError if a request could never run."""
        total = request.prompt_length
        if not request.token_ids:
            raise UsageError("the prompt is empty; give it at least one token")
        vocab = self._runner.model.vocab_size
        if not all(0 <= t < vocab for t in request.token_ids):
            raise UsageError(f"the prompt holds token ids outside of 0 .. {vocab - 1}")
        what = "document" if request.grow else "prompt"
        if total > self._positions:
            raise CapacityError(
                f"the {what} has {total} tokens, the model was trained for {self._positions} positions; "
                "shorten it, or allow RoPE extrapolation with --allow-extrapolation"
            )
        needed = self._promised(request, request.params.n)
        if needed > self._memory.budget:
            raise CapacityError(
                f"the {'document' if request.grow else 'request'} needs up to {needed / 2**20:.0f} MiB of KV cache, "
                f"the budget is {self._memory.budget / 2**20:.0f} MiB; shorten it or raise --kv-budget"
            )

    def add(self, request: Request) -> None:
        """Queue a request. Raises as `check` does."""
        self.check(request)
        if request.base is not None and not request.grow:
            self._memory.hold(request.base)
        self._waiting.append(_Waiting(request))

    def cancel(self, request_id: int) -> list[Event]:
        """End a request now and release what it holds. The events say so of each of its samples."""
        return self._end(request_id, "cancelled", None)

    def fail(self, request_id: int, error: Exception) -> list[Event]:
        """End a request because of an error."""
        return self._end(request_id, "error", error)

    def runs(self, request_id: int) -> bool:
        """Whether a request waits or runs."""
        return request_id in self._running or any(w.request.id == request_id for w in self._waiting)

    def step(self) -> list[Event]:
        """Admit what fits, make one pass, choose the next tokens."""
        events = self._admit()
        ready: list[tuple[Sample, torch.Tensor]] = []
        for prompt in [p for p in self._prompts if p.logits is not None]:
            events += self._guarded(prompt.request, self._start_if_indexed, prompt, ready)
        started = [sample for sample, _ in ready]
        decoding: list[Sample] = []
        for sample in [s for s in self._samples if s not in started]:
            events += self._guarded(sample.request, self._join, sample, decoding)
        reading = self._share_out([(1, s.sequence.length) for s in decoding])
        works = [Work(s.sequence, [s.pending], 1, s.request.method) for s in decoding]
        for prompt, n in reading:
            chunk = prompt.request.token_ids[prompt.done : prompt.done + n]
            works.append(Work(prompt.sequence, chunk, self._wanted(prompt, n)))
        if works:
            begin = time.perf_counter()
            chunks: list[Chunk] = [(len(w.token_ids), w.sequence.length) for w in works]
            results = self._run(works, self._first_captured(works, decoding, reading))
            self._pace.observe(chunks, time.perf_counter() - begin)
            for sample, result in zip(decoding, results, strict=False):
                if isinstance(result, Exception):
                    events += self._end(sample.request.id, "error", result)
                else:
                    ready.append((sample, result[0]))
            for (prompt, n), result in zip(reading, results[len(decoding) :], strict=True):
                if isinstance(result, Exception):
                    events += self._end(prompt.request.id, "error", result)
                else:
                    events += self._guarded(prompt.request, self._read, prompt, n, result, ready)
        elif not ready:
            self._wait_for_builder()
        return events + self._choose(ready)

    # Admission -------------------------------------------------------------------------------------------------------

    def _limit(self, request: Request) -> int:
        """Tokens a sample may produce: the last one needs no position of its own."""
        if request.grow:
            return 0
        return min(request.params.max_new_tokens, self._positions - request.prompt_length + 1)

    def _needs(self, request: Request) -> _Needs:
        """What no context holds already: rows of the new tokens, and an index of all that is read by one."""
        row = self._runner.layout.bytes_per_token
        grown = max(self._limit(request) - 1, 0)
        index = index_bytes_per_token(request.method, self._runner.index_shape, self._runner.model.layers)
        prompt = (request.prompt_length if request.grow else len(request.token_ids)) * row
        sample = grown * row
        if index and request.prompt_length + grown > self._runner.dense_up_to(request.method):
            base = request.base.index if request.base is not None else None
            shared = base.bytes if isinstance(base, Index) and base.serves(request.method) else 0
            prompt += max(0, round(index * request.prompt_length) - shared)
            sample += round(index * grown)
        return _Needs(prompt, sample)

    def _promised(self, request: Request, samples: int) -> int:
        needs = self._needs(request)
        return needs.prompt + samples * needs.sample

    def _admit(self) -> list[Event]:
        events: list[Event] = []
        held_up: _Waiting | None = None
        for entry in sorted(self._waiting, key=lambda w: w.request.priority):
            request, params = entry.request, entry.request.params
            limit = self._limit(request)
            if limit == 0 and not request.grow and params.prompt_logprobs is None:
                self._waiting.remove(entry)
                events += [Event(request.id, i, finish_reason="length") for i in range(params.n)]
                continue
            needed = self._promised(request, params.n)
            if needed > self._memory.free:
                if not self._running:  # nothing will become free by itself
                    events += self._end(request.id, "error", self._no_room(needed))
                    continue
                held_up = held_up or entry
                if held_up.passed >= OVERTAKES:
                    break
                continue
            if held_up:
                held_up.passed += 1
            self._waiting.remove(entry)
            events += self._guarded(request, self._start, request, limit, needed)
            if held_up and held_up.passed >= OVERTAKES:
                break
        return events

    def _no_room(self, needed: int) -> CapacityError:
        held, budget = self._memory.held, self._memory.budget
        return CapacityError(
            f"{needed / 2**20:.0f} MiB of KV cache are needed, and open contexts hold {held / 2**20:.0f} of the "
            f"budget of {budget / 2**20:.0f} MiB; close some or raise --kv-budget"
        )

    def _start(self, request: Request, limit: int, needed: int) -> list[Event]:
        self._running[request.id] = request.params.n
        self._memory.promise(request.id, needed)
        if request.grow and request.base is not None:
            sequence = request.base
        else:
            sequence = request.base.fork() if request.base is not None else KVSequence(self._runner.layout)
        # Memory that is reserved but not written costs nothing, so take what may be needed in one piece.
        single = request.params.n == 1
        sequence.reserve(len(request.token_ids) + (max(limit - 1, 0) if single else 0), exact=True)
        self._prompts.append(_Prompt(sequence, request=request, limit=limit))
        return []

    # Prompts ---------------------------------------------------------------------------------------------------------

    def _share_out(self, decoding: list[Chunk]) -> list[tuple[_Prompt, int]]:
        """Prompt tokens of the next pass."""
        unread = [p for p in self._prompts if p.logits is None]
        if not unread:
            return []
        alone = len(unread) == 1 and not decoding and not self._waiting
        shortest = sorted(unread, key=lambda p: (p.request.priority, p.left))
        first = shortest[0]
        seconds = self._pass_seconds * (ALONE if alone else 1)
        room = self._pace.room(seconds, decoding, first.sequence.length, self._chunk_size)
        oldest = unread[0]
        shares = {id(p): 0 for p in unread}
        shares[id(oldest)] = min(oldest.left, max(1, room // 4))
        room -= shares[id(oldest)]
        for prompt in shortest:
            n = min(room, prompt.left - shares[id(prompt)])
            shares[id(prompt)] += n
            room -= n
        capped = [
            (p, min(shares[id(p)], LOGPROB_CHUNK) if p.request.params.prompt_logprobs is not None else shares[id(p)])
            for p in unread
        ]
        return [(p, n) for p, n in capped if n]

    def _wanted(self, prompt: _Prompt, n: int) -> int:
        """Rows of logits of the prompt's next n tokens."""
        if prompt.request.grow:
            return 0
        if prompt.request.params.prompt_logprobs is not None:
            return n
        return int(n == prompt.left)

    def _first_captured(
        self, works: list[Work], decoding: list[Sample], reading: list[tuple[_Prompt, int]]
    ) -> list[tuple[int, _Prompt, int]]:
        """Of which works' tokens the queries will be wanted for an index: (row of the first, prompt, how many)."""
        captured = []
        row = len(decoding)
        for prompt, n in reading:
            wanted = self._observed(prompt)
            skip = max(0, prompt.left - wanted)  # tokens before those that are wanted
            if skip < n:
                captured.append((row + skip, prompt, n - skip))
            row += n
        return captured

    def _observed(self, prompt: _Prompt) -> int:
        """The last tokens of a prompt whose queries its index is fitted to, 0 if it needs none."""
        method, sequence = prompt.request.method, prompt.sequence
        if prompt.request.grow or method is None or len(prompt.request.token_ids) < RECENT_QUERIES:
            return 0
        if prompt.request.prompt_length <= self._runner.dense_up_to(method):
            return 0
        if not index_bytes_per_token(method, self._runner.index_shape, self._runner.model.layers):
            return 0
        if isinstance(sequence.index, Index) and sequence.index.blocks and sequence.index.serves(method):
            return 0
        return max(RECENT_QUERIES, method.observe if isinstance(method, SnapKV) else 0)

    def _read(
        self, prompt: _Prompt, n: int, logits: torch.Tensor, ready: list[tuple[Sample, torch.Tensor]]
    ) -> list[Event]:
        """The prompt's next n tokens are in the cache."""
        request = prompt.request
        prompt.done += n
        if request.params.prompt_logprobs is not None and not request.grow:
            following = list(request.token_ids[prompt.done - n + 1 : prompt.done + 1])
            prompt.logprobs += prompt_logprobs(logits[: len(following)], following, request.params.prompt_logprobs)
        if request.grow:
            event = Event(request.id, 0, prompt_done=prompt.sequence.length)
            if prompt.left:
                return [event]
            self._release(prompt)
            return [replace(event, finish_reason="length")]
        if prompt.left:
            return []
        if prompt.limit == 0:
            self._release(prompt)
            return [
                Event(request.id, i, finish_reason="length", prompt=self._usage(prompt))
                for i in range(request.params.n)
            ]
        prompt.logits = logits[-1]
        return self._start_if_indexed(prompt, ready)

    def _start_if_indexed(self, prompt: _Prompt, ready: list[tuple[Sample, torch.Tensor]]) -> list[Event]:
        """Start the samples of a prompt that is read. Several share its index, so they wait until it is built."""
        request, params = prompt.request, prompt.request.params.with_seed()
        if params.n > 1 and not self._indexed(prompt, request.method):
            return []
        assert prompt.logits is not None
        self._prompts.remove(prompt)
        for i in range(params.n):
            sequence = prompt.sequence
            if params.n > 1:
                sequence = sequence.fork()
                sequence.reserve(max(prompt.limit - 1, 1), exact=True)
            ids = sequence.token_ids
            sample = Sample(
                sequence,
                queries=prompt.queries,
                request=request,
                number=i,
                state=SampleState(
                    params,
                    ids,
                    request=request.number,
                    sample=i,
                    vocab_size=self._runner.model.vocab_size,
                    eos_token_ids=self._runner.model.eos_token_ids,
                ),
                stream=TextStream(
                    self._runner.model.tokenizer,
                    params.stop,
                    context=ids[-STREAM_CONTEXT:],
                    include_stop=params.include_stop,
                ),
                limit=prompt.limit,
                prompt=self._usage(prompt),
            )
            self._samples.append(sample)
            ready.append((sample, prompt.logits))
        return []

    def _usage(self, prompt: _Prompt) -> PromptUsage:
        request = prompt.request
        logprobs = tuple(prompt.logprobs) if request.params.prompt_logprobs is not None else None
        return PromptUsage(request.prompt_length, request.prompt_length - len(request.token_ids), logprobs)

    # Passes ----------------------------------------------------------------------------------------------------------

    def _run(self, works: Sequence[Work], captured: list[tuple[int, _Prompt, int]]) -> list[torch.Tensor | Exception]:
        """The logits that each work wants, or what went wrong with it: a pass that fails is made again one by one."""
        try:
            if captured:
                logits, queries = self._runner.run_with_queries(works)
                for row, prompt, n in captured:
                    part = queries[:, row : row + n].clone()
                    prompt.queries = part if prompt.queries is None else torch.cat([prompt.queries, part], dim=1)
            else:
                logits = self._runner.run(works)
        except Exception as error:
            if len(works) == 1:
                return [error]
            return [result for work in works for result in self._run([work], [])]
        return list(torch.split(logits, [work.logits for work in works]))

    def _join(self, sample: Sample, decoding: list[Sample]) -> list[Event]:
        if self._indexed(sample, sample.request.method):
            decoding.append(sample)
        return []

    def _choose(self, ready: list[tuple[Sample, torch.Tensor]]) -> list[Event]:
        """The next token of each sample from its logits."""
        ready = [(s, row) for s, row in ready if s in self._samples]
        if not ready:
            return []
        states = [sample.state for sample, _ in ready]
        choices = choose(_stacked([row for _, row in ready]), states)
        events: list[Event] = []
        for (sample, _), choice in zip(ready, choices, strict=True):
            if sample not in self._samples:
                continue  # its request has just failed
            if isinstance(choice, Exception):
                events += self._end(sample.request.id, "error", choice)
            else:
                events += self._guarded(sample.request, self._push, sample, choice)
        return events

    def _push(self, sample: Sample, choice: Choice) -> list[Event]:
        event = sample.push(choice, self._runner.model.eos_token_ids)
        if event.finish_reason:
            self._samples.remove(sample)
            self._sample_ended(sample.request)
        return [event]

    # Indexes ---------------------------------------------------------------------------------------------------------

    def _indexed(self, holder: Holder, method: AttentionMethod | None) -> bool:
        """Whether the index of a sequence is built as far as its next token needs; begins beside the passes what will
        be needed next. Which token first reads a block does not depend on when it was ready."""
        sequence = holder.sequence
        index = self._runner.index_for(sequence, method)
        if index is None:
            return True
        target, growth = index.target(sequence.length), holder.growth
        if growth is not None and target > index.covered and growth.done():
            holder.growth = None
            if holder.growth_target == target:
                index.adopt(growth.result())
                return True
            growth = None
        if growth is None:
            wanted = target if target > index.covered else index.ahead(sequence.length)
            if wanted > index.covered:
                holder.growth, holder.growth_target = self._build(holder, index, wanted), wanted
        return target <= index.covered

    def _build(self, holder: Holder, index: Index, target: int) -> "Future[Growth]":
        snapshot, captured = holder.sequence.view(holder.sequence.length), holder.queries

        @lru_cache
        def queries(n: int) -> torch.Tensor:
            if captured is not None and captured.shape[1] >= min(n, snapshot.length):
                return captured[:, -n:]
            return self._runner.recent_queries(snapshot, n)

        return self._builder.submit(index.grown, snapshot, target, queries)

    def _wait_for_builder(self) -> None:
        """Nothing else to do: all samples wait for their indexes."""
        growing = [h.growth for h in (*self._prompts, *self._samples) if h.growth is not None]
        if growing:
            wait(growing, timeout=self._pass_seconds, return_when="FIRST_COMPLETED")

    # Ends ------------------------------------------------------------------------------------------------------------

    def _guarded(self, request: Request, act: Callable[..., list[Event]], *args: Any) -> list[Event]:
        """Do something for one request; if it fails, only that request ends."""
        try:
            return act(*args)
        except Exception as error:
            return self._end(request.id, "error", error)

    def _end(self, request_id: int, reason: str, error: Exception | None) -> list[Event]:
        requests = [w.request for w in self._waiting if w.request.id == request_id]
        requests += [p.request for p in self._prompts if p.request.id == request_id]
        samples = [s for s in self._samples if s.request.id == request_id]
        numbers = [s.number for s in samples]
        if requests:
            numbers = list(range(requests[0].params.n))
        self._waiting = [w for w in self._waiting if w.request.id != request_id]
        self._prompts = [p for p in self._prompts if p.request.id != request_id]
        self._samples = [s for s in self._samples if s.request.id != request_id]
        self._running.pop(request_id, None)
        self._memory.promise(request_id, 0)
        return [Event(request_id, number, finish_reason=reason, error=error) for number in numbers]

    def _release(self, prompt: _Prompt) -> None:
        """A request without answers has ended."""
        self._prompts.remove(prompt)
        self._running.pop(prompt.request.id, None)
        self._memory.promise(prompt.request.id, 0)

    def _sample_ended(self, request: Request) -> None:
        self._running[request.id] -= 1
        left = self._running[request.id]
        if not left:
            del self._running[request.id]
        self._memory.promise(request.id, self._promised(request, left) if left else 0)


def _stacked(rows: list[torch.Tensor]) -> torch.Tensor:
    """Rows as a matrix; without a copy if they follow each other in one already."""
    first = rows[0]
    size = first.shape[0]
    base = first.storage_offset()
    storage = first.untyped_storage().data_ptr()
    for i, row in enumerate(rows):
        if row.untyped_storage().data_ptr() != storage or row.storage_offset() != base + i * size:
            return torch.stack(rows)
    return first.as_strided((len(rows), size), (size, 1))
