"""Continuous batching: which tokens of which sequences go into the next pass.

Every running sample decodes one token a pass, and prompts are read in chunks beside them, as many tokens as fit into
the time of a pass. The shortest remainder goes first, with a share for the prompt that came first, so that short
prompts overtake long ones and long ones still go on. A request is admitted when all memory that it may come to need
fits into the account; until then it waits, and a few smaller ones may pass it. What goes wrong for one request ends
that request and no other. A sample whose index is not built far enough sits out while the others go on.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from thresher.cache.sequence import KVSequence
from thresher.decoding.runner import Runner, Work
from thresher.decoding.sampler import Choice, SampleState, prompt_logprobs
from thresher.engine.admission import Admission, Waiting
from thresher.engine.indexing import IndexBuilder
from thresher.engine.memory import MemoryAccount
from thresher.engine.pacing import Chunk, Pace
from thresher.engine.requests import Event, PromptUsage, Request
from thresher.engine.sample import Holder, Sample
from thresher.engine.stopping import TextStream
from thresher.errors import CapacityError
from thresher.speculation.drafters import DraftModel
from thresher.speculation.speculator import Speculator, Turn
from thresher.speculation.verify import Draft, Verdict, verify

PASS_SECONDS = 0.05  # of a pass while others wait for it
ALONE = 4  # times as long may a pass be that nobody waits for
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


@dataclass(frozen=True)
class _Ready:
    """A sample whose next tokens can be chosen: logits `[tokens of the draft + 1, vocab]`."""

    sample: Sample
    logits: torch.Tensor
    draft: Draft


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
        draft_models: Mapping[str, DraftModel] | None = None,
    ) -> None:
        """positions: longest sequence; chunk_size: most prompt tokens of a pass; pass_seconds: time of a pass;
        draft_models: those that a request's `speculation` may name."""
        self._runner = runner
        self._memory = memory
        self._chunk_size = chunk_size
        self._pass_seconds = pass_seconds
        self._pace = Pace(runner.shape)
        self._queue = Admission(runner, memory, positions, draft_models or {})
        self._speculator = Speculator(runner, draft_models or {})
        self._prompts: list[_Prompt] = []  # in order of arrival
        self._samples: list[Sample] = []
        self._running: dict[int, int] = {}  # request -> samples that have not ended
        self._indexes = IndexBuilder(runner)

    @property
    def busy(self) -> bool:
        return bool(self._queue.waiting or self._prompts or self._samples)

    def sequences(self) -> list[KVSequence]:
        """Of all prompts and samples that run, and of draft models."""
        running = [p.sequence for p in self._prompts] + [s.sequence for s in self._samples]
        return running + self._speculator.sequences()

    def check(self, request: Request) -> None:
        """Raises UsageError or CapacityError if a request could never run."""
        self._queue.check(request)

    def add(self, request: Request) -> None:
        """Queue a request. Raises as `check` does."""
        self._queue.add(request)
        if request.base is not None and not request.grow:
            self._memory.hold(request.base)

    def cancel(self, request_id: int) -> list[Event]:
        """End a request now and release what it holds. The events say so of each of its samples."""
        return self._end(request_id, "cancelled", None)

    def fail(self, request_id: int, error: Exception) -> list[Event]:
        """End a request because of an error."""
        return self._end(request_id, "error", error)

    def runs(self, request_id: int) -> bool:
        """Whether a request waits or runs."""
        return request_id in self._running or self._queue.holds(request_id)

    def step(self) -> list[Event]:
        """Admit what fits, make one pass, choose the next tokens."""
        events = self._admit()
        ready: list[_Ready] = []
        for prompt in [p for p in self._prompts if p.logits is not None]:
            events += self._guarded(prompt.request, self._start_if_indexed, prompt, ready)
        started = [entry.sample for entry in ready]
        decoding: list[Sample] = []
        for sample in [s for s in self._samples if s not in started]:
            events += self._guarded(sample.request, self._join, sample, decoding)
        drafts = self._draft(decoding)
        reading = self._share_out([(1 + len(d.token_ids), s.sequence.length) for s, d in drafts])
        works = [self._decoding(sample, draft) for sample, draft in drafts]
        for prompt, n in reading:
            chunk = prompt.request.token_ids[prompt.done : prompt.done + n]
            works.append(Work(prompt.sequence, chunk, self._wanted(prompt, n)))
        begin = time.perf_counter()
        if works:
            chunks: list[Chunk] = [(len(w.token_ids), w.sequence.length) for w in works]
            results = self._run(
                works, self._first_captured(sum(len(w.token_ids) for w in works[: len(drafts)]), reading)
            )
            self._pace.observe(chunks, time.perf_counter() - begin)
            for (sample, draft), result in zip(drafts, results, strict=False):
                if isinstance(result, Exception):
                    events += self._end(sample.request.id, "error", result)
                else:
                    ready.append(_Ready(sample, result, draft))
            for (prompt, n), result in zip(reading, results[len(drafts) :], strict=True):
                if isinstance(result, Exception):
                    events += self._end(prompt.request.id, "error", result)
                else:
                    events += self._guarded(prompt.request, self._read, prompt, n, result, ready)
        elif not ready:
            self._indexes.wait([*self._prompts, *self._samples], self._pass_seconds)
        undisturbed = not reading and len(ready) == len(drafts)
        return events + self._choose(ready, begin if undisturbed else None)

    # Admission -------------------------------------------------------------------------------------------------------

    def _admit(self) -> list[Event]:
        events: list[Event] = []
        for entry in self._queue.admitted(lambda: bool(self._running)):
            request, params = entry.request, entry.request.params
            if entry.bytes > self._memory.free:
                self._speculator.let_go()
            if entry.needs.limit == 0 and not request.grow and params.prompt_logprobs is None:
                events += [Event(request.id, i, finish_reason="length") for i in range(params.n)]
            elif entry.bytes > self._memory.free:  # and nothing will become free by itself
                error = self._no_room(entry.bytes)
                events += [Event(request.id, i, finish_reason="error", error=error) for i in range(params.n)]
            else:
                events += self._guarded(request, self._start, entry)
        return events

    def _no_room(self, needed: int) -> CapacityError:
        held, budget = self._memory.held, self._memory.budget
        return CapacityError(
            f"{needed / 2**20:.0f} MiB of KV cache are needed, and open contexts hold {held / 2**20:.0f} of the "
            f"budget of {budget / 2**20:.0f} MiB; close some or raise --kv-budget"
        )

    def _start(self, entry: Waiting) -> list[Event]:
        request, limit = entry.request, entry.needs.limit
        self._running[request.id] = request.params.n
        self._memory.promise(request.id, entry.bytes)
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
        alone = len(unread) == 1 and not decoding and not self._queue.waiting
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

    def _first_captured(self, row: int, reading: list[tuple[_Prompt, int]]) -> list[tuple[int, _Prompt, int]]:
        """The tokens whose queries will be wanted for an index: (row of the first, prompt, how many). The prompts' rows
        begin at `row`."""
        captured = []
        for prompt, n in reading:
            skip = max(0, prompt.left - self._indexes.observed(prompt.request, prompt))  # tokens before them
            if skip < n:
                captured.append((row + skip, prompt, n - skip))
            row += n
        return captured

    def _read(self, prompt: _Prompt, n: int, logits: torch.Tensor, ready: list[_Ready]) -> list[Event]:
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

    def _start_if_indexed(self, prompt: _Prompt, ready: list[_Ready]) -> list[Event]:
        """Start the samples of a prompt that is read. Several share its index, so they wait until it is built."""
        request, params = prompt.request, prompt.request.params.with_seed()
        if params.n > 1 and not self._indexes.ready(prompt, request.indexed):
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
            if request.speculation:
                matching = request.params.seed is not None
                ends = frozenset(params.stop_token_ids)
                ends |= frozenset() if params.ignore_eos else self._runner.model.eos_token_ids
                sample.speculating = self._speculator.start(
                    request.speculation, sequence, sample.state, request.method, matching, ends
                )
            self._samples.append(sample)
            ready.append(_Ready(sample, prompt.logits[None], Draft()))
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
        if self._indexes.ready(sample, sample.request.method):
            decoding.append(sample)
        return []

    def _draft(self, decoding: list[Sample]) -> list[tuple[Sample, Draft]]:
        """Drafts of those that speculate, empty ones of the others. A sample whose draft's index is late goes on
        without."""
        turns: dict[Sample, Turn] = {}
        for sample in decoding:
            if sample.speculating:
                indexed = self._indexes.ready(sample, sample.request.indexed)
                turns[sample] = Turn(sample.speculating, sample.pending, sample.limit - sample.generated, indexed)
        made = self._speculator.drafts(list(turns.values())) if turns else []
        drafts = dict(zip(turns, made, strict=True))
        return [(sample, drafts.get(sample, Draft())) for sample in decoding]

    def _decoding(self, sample: Sample, draft: Draft) -> Work:
        token_ids = [sample.pending, *draft.token_ids]
        votes = self._speculator.votes(sample.speculating, len(token_ids)) if sample.speculating else None
        return Work(sample.sequence, token_ids, len(token_ids), sample.request.method, votes=votes)

    def _choose(self, ready: list[_Ready], begin: float | None) -> list[Event]:
        """The next tokens of each sample from its logits, judging its draft. begin: of a pass of these alone."""
        ready = [entry for entry in ready if entry.sample in self._samples]
        if not ready:
            return []
        cases = [(e.sample.state, e.draft, _matching(e.sample)) for e in ready]
        verdicts = verify(_stacked([row for e in ready for row in e.logits]), cases)
        self._learn(ready, verdicts, None if begin is None else time.perf_counter() - begin)
        events: list[Event] = []
        for entry, verdict in zip(ready, verdicts, strict=True):
            sample, rows = entry.sample, entry.sample.sequence.length - len(entry.draft.token_ids)
            if entry.draft.token_ids:
                sample.sequence.crop(rows + verdict.accepted)
            for choice in verdict.choices:
                if sample not in self._samples:
                    break  # it has ended, or its request has just failed
                if isinstance(choice, Exception):
                    events += self._end(sample.request.id, "error", choice)
                else:
                    events += self._guarded(sample.request, self._push, sample, choice)
        return events

    def _learn(self, ready: list[_Ready], verdicts: list[Verdict], seconds: float | None) -> None:
        """What became of drafts, and how long the pass has taken if it was of these alone."""
        judged = [
            (e.sample.speculating, e.draft, v)
            for e, v in zip(ready, verdicts, strict=True)
            if e.sample.speculating and e.sample.generated
        ]
        if judged:
            self._speculator.judged(judged, seconds if len(judged) == len(ready) else None)

    def _push(self, sample: Sample, choice: Choice) -> list[Event]:
        event = sample.push(choice, self._runner.model.eos_token_ids)
        if event.finish_reason:
            self._samples.remove(sample)
            self._forget(sample)
            self._sample_ended(sample.request)
        return [event]

    # Ends ------------------------------------------------------------------------------------------------------------

    def _guarded(self, request: Request, act: Callable[..., list[Event]], *args: Any) -> list[Event]:
        """Do something for one request; if it fails, only that request ends."""
        try:
            return act(*args)
        except Exception as error:
            return self._end(request.id, "error", error)

    def _end(self, request_id: int, reason: str, error: Exception | None) -> list[Event]:
        requests = [entry.request for entry in self._queue.take(request_id)]
        requests += [p.request for p in self._prompts if p.request.id == request_id]
        samples = [s for s in self._samples if s.request.id == request_id]
        numbers = [s.number for s in samples]
        if requests:
            numbers = list(range(requests[0].params.n))
        self._prompts = [p for p in self._prompts if p.request.id != request_id]
        for sample in samples:
            self._forget(sample)
        self._samples = [s for s in self._samples if s.request.id != request_id]
        self._running.pop(request_id, None)
        self._memory.promise(request_id, 0)
        return [Event(request_id, number, finish_reason=reason, error=error) for number in numbers]

    def _release(self, prompt: _Prompt) -> None:
        """A request without answers has ended."""
        self._prompts.remove(prompt)
        self._running.pop(prompt.request.id, None)
        self._memory.promise(prompt.request.id, 0)

    def _forget(self, sample: Sample) -> None:
        """What speculation keeps of a sample that has ended."""
        if sample.speculating:
            for sequence in self._speculator.end(sample.speculating):
                self._memory.hold(sequence)

    def _sample_ended(self, request: Request) -> None:
        self._running[request.id] -= 1
        left = self._running[request.id]
        if not left:
            del self._running[request.id]
        self._memory.promise(request.id, self._queue.needs(request).bytes(left) if left else 0)


def _matching(sample: Sample) -> bool:
    return sample.speculating is None or sample.speculating.matching


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
