"""Whole answers, gathered from events."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from thresher.decoding.sampler import Choice
from thresher.engine.requests import Event, PromptUsage
from thresher.speculation.speculator import SpeculationStats


@dataclass(frozen=True)
class Completion:
    """One answer.

    choices: a token each, with log-probabilities if they were asked for. finish_reason: "stop", "length", "cancelled"
    or "error"; matched: the stop string or token that ended it; error: what went wrong. prompt_tokens, cached_tokens:
    of the prompt in all, and of the context that it went on from; prompt_logprobs: of its tokens, if asked for.
    seed: of its random numbers. speculation: what became of drafts, if there were any to be.
    """

    text: str
    choices: tuple[Choice, ...]
    finish_reason: str
    matched: str | int | None = None
    error: Exception | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    prompt_logprobs: tuple[Choice | None, ...] | None = None
    seed: int | None = None
    speculation: SpeculationStats | None = None

    @property
    def token_ids(self) -> list[int]:
        return [c.token for c in self.choices]


@dataclass
class _Parts:
    texts: list[str] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    prompt: PromptUsage = field(default_factory=lambda: PromptUsage(0, 0))


def collect(events: Iterable[Event], prompts: int) -> list[list[Completion]]:
    """The answers to each of `prompts` prompts, in order of their samples. If every prompt failed, the first error is
    raised; one that failed among others has completions that say so."""
    parts: dict[tuple[int, int], _Parts] = {}
    done: dict[tuple[int, int], Completion] = {}
    for event in events:
        key = (event.request, event.sample)
        part = parts.setdefault(key, _Parts())
        part.texts.append(event.text)
        if event.choice:
            part.choices.append(event.choice)
        part.prompt = event.prompt or part.prompt
        if event.finish_reason:
            done[key] = Completion(
                "".join(part.texts),
                tuple(part.choices),
                event.finish_reason,
                event.matched,
                event.error,
                part.prompt.tokens,
                part.prompt.cached,
                part.prompt.logprobs,
                event.seed,
                event.speculation,
            )
    errors = [c.error for c in done.values() if c.error]
    if errors and len(errors) == len(done):
        raise errors[0]
    answers: list[list[Completion]] = [[] for _ in range(prompts)]
    for request, sample in sorted(done):
        answers[request].append(done[request, sample])
    return answers
