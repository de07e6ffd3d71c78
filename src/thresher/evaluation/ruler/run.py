"""Run tasks: each prompt is read densely once, then every method answers from a fork of it."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from thresher.attention.base import AttentionMethod
from thresher.cache.sequence import KVSequence
from thresher.decoding.sampling import SamplingParams
from thresher.engine.llm import LLM
from thresher.engine.requests import Request
from thresher.evaluation.journal import Journal, ResultKey
from thresher.evaluation.ruler.samples import Sample, build_sample
from thresher.evaluation.ruler.sources import SampleKey, Sources
from thresher.evaluation.ruler.tasks import TASKS, Task
from thresher.evaluation.teacher import check_length, kv_read, prefill

PROMPTS_VERSION = 1  # raise it when a change here gives other prompts: old journals are then refused


@dataclass(frozen=True)
class Outcome:
    """One answer of one method. score: 0 .. 1; seconds: of the decode steps after the first, of which there are
    `steps`; kv_read: bytes that attention to the prompt reads in a decode step, as a share of dense."""

    task: str
    length: int
    index: int
    method: str
    score: float
    answer: str
    references: tuple[str, ...]
    prompt_tokens: int
    steps: int
    seconds: float
    kv_read: float


def run_settings(llm: LLM, sources: Sources, framing: str) -> dict[str, Any]:
    """What results depend on beside their key."""
    return {
        "command": "ruler",
        "prompts": PROMPTS_VERSION,
        "haystack": sources.sha256,
        "questions": [q.sha256 for q in sources.questions],
        "framing": framing,
        "weights": llm.model.weights,
        "tokenizer": llm.model.tokenizer_fingerprint,
    }


def run_tasks(
    llm: LLM,
    tasks: Sequence[Task],
    lengths: Sequence[int],
    samples: int,
    methods: Sequence[AttentionMethod],
    sources: Sources,
    *,
    framing: str,
    seed: int = 0,
    journal: Journal | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Outcome]:
    """Outcomes of all methods on each sample, sample by sample. progress: (done, all) tokens of prompts.

    Raises CapacityError if a length is too long for the model or the budget, UsageError if a task does not fit into it.
    """
    journal = journal or Journal(None, {})
    for length in lengths:
        check_length(llm, length)
        for task in tasks:  # a long run should not fail at its last task
            build_sample(SampleKey(task.name, length, samples - 1, seed), sources, llm.model.tokenizer, framing)
    total, done = sum(lengths) * samples * len(tasks), 0

    def read(tokens: int) -> None:
        progress(done + tokens, total)

    read(0)
    for length in lengths:
        for task in tasks:
            for index in range(samples):
                key = SampleKey(task.name, length, index, seed)
                yield from _run_sample(llm, key, methods, sources, framing, journal, read)
                done += length
                read(0)


def _run_sample(
    llm: LLM,
    key: SampleKey,
    methods: Sequence[AttentionMethod],
    sources: Sources,
    framing: str,
    journal: Journal,
    progress: Callable[[int], None],
) -> Iterator[Outcome]:
    sample: Sample | None = None
    sequence: KVSequence | None = None
    for method in methods:
        entry = ResultKey(key.task, key.length, key.index, key.seed, str(method), llm.model.fingerprint)
        known = journal.get(entry)
        if known is None:
            if sample is None or sequence is None:
                sample = build_sample(key, sources, llm.model.tokenizer, framing)
                sequence = prefill(llm, sample.token_ids[:-1], progress)
            outcome = answer(llm, sample, sequence, method)
            journal.put(entry, asdict(outcome))
            yield outcome
        else:
            yield Outcome(**(known | {"references": tuple(known["references"])}))


def answer(llm: LLM, sample: Sample, sequence: KVSequence, method: AttentionMethod) -> Outcome:
    """Decode greedily under a method from a fork of `sequence`, which holds all of the prompt but its last token."""
    task = TASKS[sample.key.task]
    scheduler = llm.scheduler()
    params = SamplingParams(max_new_tokens=task.tokens_to_generate, temperature=0)
    scheduler.add(Request(llm.engine.new_id(), [sample.token_ids[-1]], params, sequence, method))
    events = scheduler.step()  # reads the prompt's last token, densely as all prompts are
    begin = time.perf_counter()
    steps = 0
    while scheduler.busy:
        events += scheduler.step()
        steps += 1
    seconds = time.perf_counter() - begin
    text = "".join(event.text for event in events)
    return Outcome(
        task=task.name,
        length=sample.key.length,
        index=sample.key.index,
        method=str(method),
        score=task.score(text, sample.draft.references),
        answer=text,
        references=sample.draft.references,
        prompt_tokens=len(sample.token_ids),
        steps=steps,
        seconds=seconds,
        kv_read=kv_read(llm.runner, method, len(sample.token_ids)),
    )
