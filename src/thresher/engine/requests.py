"""What goes into the engine and what comes out of it."""

from collections.abc import Sequence
from dataclasses import dataclass

from thresher.attention.base import AttentionMethod
from thresher.attention.index import Index, Readings
from thresher.attention.sparse import SparseMethod
from thresher.cache.sequence import KVSequence
from thresher.decoding.sampler import Choice
from thresher.decoding.sampling import SamplingParams
from thresher.speculation.settings import Speculation
from thresher.speculation.speculator import AUTO, SpeculationStats


@dataclass(frozen=True)
class Request:
    """Tokens to read on top of `base` (a cached context, or nothing), then `params.n` answers.

    id: names it in events; no two requests that run have the same. number: its place among the requests of one call;
    with the seed it decides the random numbers. method: how generated tokens read the cache. speculation: how drafts
    are made, None for none. priority: lower goes first. grow: no answers; the tokens become part of `base` itself, as a
    document is read.
    """

    id: int
    token_ids: Sequence[int]
    params: SamplingParams
    base: KVSequence | None = None
    method: AttentionMethod | None = None
    speculation: Speculation | None = None
    number: int = 0
    priority: int = 0
    grow: bool = False

    @property
    def prompt_length(self) -> int:
        return len(self.token_ids) + (self.base.length if self.base else 0)

    @property
    def indexed(self) -> AttentionMethod | None:
        """The method that an index is built for."""
        return indexed_method(self.method, self.speculation, self.base)


def indexed_method(
    method: AttentionMethod | None, speculation: Speculation | None, base: KVSequence | None
) -> AttentionMethod | None:
    """The method that an index is built for: that of the model's own drafts if it makes any, else how the cache is
    read. "auto" drafts use an index that the context has, but to build one takes longer than most answers gain."""
    if speculation is None or isinstance(method, SparseMethod):
        return method
    index = base.index if base else None
    known = isinstance(index, Index) and bool(index.blocks) and index.serves(AUTO)
    return {"self": speculation.method, "auto": AUTO if known else method}.get(speculation.drafter, method)


@dataclass(frozen=True)
class PromptUsage:
    """Of one prompt: tokens in all, those that its context held already, and if asked for the log-probability of each
    that was read (None for the first one of all, of which the model says nothing)."""

    tokens: int
    cached: int
    logprobs: tuple[Choice | None, ...] | None = None


@dataclass(frozen=True)
class Event:
    """One more token of one sample, or its end. `text` is what became certain, possibly nothing yet.

    request: the request's id (from `LLM.stream`: the place of its prompt). prompt: with the first event of a sample.
    finish_reason: None while it goes on; "stop" (an end token, or a stop token or string), "length", "cancelled" or
    "error". At the end, matched: the stop string or token that ended it; error: what went wrong; readings: what sparse
    attention has read; seed: of its random numbers; speculation: what became of drafts. prompt_done: tokens read so
    far, of a document that is being read.
    """

    request: int
    sample: int
    choice: Choice | None = None
    text: str = ""
    finish_reason: str | None = None
    matched: str | int | None = None
    error: Exception | None = None
    readings: Readings | None = None
    seed: int | None = None
    speculation: SpeculationStats | None = None
    prompt: PromptUsage | None = None
    prompt_done: int | None = None
