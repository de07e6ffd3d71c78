"""Sample answers to problems with the engine, verify them, and keep them as traces that survive a kill."""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thresher.errors import UsageError
from thresher.evaluation.jsonlines import JsonLines
from thresher.kinetics.adaptive import Stopping
from thresher.kinetics.tasks import ASK, Problem, judge
from thresher.kinetics.traces import Sample, sample_of

if TYPE_CHECKING:
    from thresher.engine.llm import LLM

Entry = dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """What changes an answer.

    model: its name; method: as `parse_method` takes it; max_tokens: of an answer; ask: what is said behind a problem;
    shape: the fields of its ModelShape, by which traces have a cost; the rest as SamplingParams, by default what
    Kinetics samples with.
    """

    model: str
    task: str
    method: str = "dense"
    weights: str = "bf16"
    max_tokens: int = 512
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 20
    seed: int = 0
    framing: str = "chat"
    ask: str = ASK
    stopping: Stopping = field(default_factory=Stopping)
    shape: dict[str, Any] = field(default_factory=dict)


class TraceFile(JsonLines):
    """A file of traces that is being written. Samples by question and number are in `samples`. Raises what JsonLines
    does."""

    def __init__(self, path: Path, experiment: Experiment) -> None:
        self.samples: dict[str, dict[int, Sample]] = {}
        super().__init__(path, "traces", "a file of traces", "--out", asdict(experiment), self._read)

    def _read(self, entry: Entry) -> None:
        question, _, sample = sample_of(entry)
        self.samples.setdefault(question, {})[int(entry["sample"])] = sample

    def add(self, entry: Entry) -> None:
        """Keep a sample that is not there yet; it is in the file when this returns. Raises StorageError."""
        known = self.samples.setdefault(entry["question"], {})
        if entry["sample"] not in known:
            self.append(entry)
            known[entry["sample"]] = sample_of(entry)[2]

    @property
    def count(self) -> int:
        return sum(map(len, self.samples.values()))


@dataclass(frozen=True)
class Round:
    """Samples `first` to `first + count` of a problem: what one request to the engine is for."""

    problem: Problem
    first: int
    count: int


def seed_of(experiment: Experiment, question: str, first: int) -> int:
    """Of a request: the same however it is split over runs and processes."""
    text = f"{experiment.seed} {question} {first}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def rounds_left(
    problems: Sequence[Problem], samples: int, stopping: Stopping, known: Mapping[str, Mapping[int, Sample]]
) -> list[Round]:
    """The next request of every problem that needs more samples: all of them, or a step where stopping may end it."""
    step = samples if stopping.rule == "none" else stopping.step
    found = []
    for problem in problems:
        have = known.get(problem.key, {})
        first = 0
        while first < samples and all(i in have for i in range(first, min(first + step, samples))):
            first += step
        before = [have[i] for i in sorted(have) if i < first]
        if first < samples and not (before and stopping.done(before)):
            found.append(Round(problem, first, min(step, samples - first)))
    return found


def answer(llm: "LLM", experiment: Experiment, rounds: Sequence[Round]) -> Iterator[tuple[Problem, Entry]]:
    """The samples of some requests as they end: entries of a trace, but for score and answer. All decode together.
    Raises what ended an answer."""
    from thresher.decoding.sampling import SamplingParams

    params = [
        SamplingParams(
            max_new_tokens=experiment.max_tokens,
            temperature=experiment.temperature,
            top_p=experiment.top_p,
            top_k=experiment.top_k,
            seed=seed_of(experiment, r.problem.key, r.first),
            n=r.count,
        )
        for r in rounds
    ]
    texts: dict[tuple[int, int], list[str]] = {}
    tokens: dict[tuple[int, int], int] = {}
    prompts: dict[int, int] = {}
    begin = time.perf_counter()
    events = llm.stream([r.problem.text for r in rounds], params, experiment.framing, attention=experiment.method)
    for event in events:
        key = (event.request, event.sample)
        texts.setdefault(key, []).append(event.text)
        tokens[key] = tokens.get(key, 0) + (event.choice is not None)
        if event.prompt:
            prompts[event.request] = event.prompt.tokens
        if not event.finish_reason:
            continue
        if event.error:
            raise event.error
        one = rounds[event.request]
        yield (
            one.problem,
            {
                "question": one.problem.key,
                "gold": one.problem.gold,
                "sample": one.first + event.sample,
                "length": tokens.pop(key),
                "ended": event.finish_reason == "stop",
                "prompt": prompts.get(event.request),
                "seconds": round(time.perf_counter() - begin, 3),
                "text": "".join(texts.pop(key)),
            },
        )


def judged(problem: Problem, entry: Entry) -> Entry:
    """With answer and score. Only in a process's main thread."""
    found, score = judge(problem, entry["text"])
    return entry | {"answer": found, "score": score}


def chunks(rounds: Sequence[Round], at_once: int) -> Iterator[list[Round]]:
    """Requests that fit into so many sequences, at least one each."""
    part: list[Round] = []
    for one in rounds:
        if part and sum(r.count for r in part) + one.count > at_once:
            yield part
            part = []
        part.append(one)
    if part:
        yield part


Run = Callable[[Sequence[Round]], Iterable[Entry]]


def run(
    experiment: Experiment,
    problems: Sequence[Problem],
    samples: int,
    path: Path,
    answered: Run,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TraceFile:
    """Take `samples` answers to every problem, those in the file excepted. answered: gives the samples of requests,
    here or elsewhere. Raises what JsonLines and the engine do."""
    if len({p.key for p in problems}) != len(problems):
        raise UsageError("two problems have the same id")
    with TraceFile(path, experiment) as file:
        total = len(problems) * samples
        progress(file.count, total)
        while rounds := rounds_left(problems, samples, experiment.stopping, file.samples):
            for entry in answered(rounds):
                file.add(entry)
                progress(file.count, total)
    return file
