"""One answer while it is being generated: its sequence, what was chosen, and the text that is certain."""

from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from thresher.attention.index import Growth, Index, Readings
from thresher.cache.sequence import KVSequence
from thresher.decoding.sampler import Choice, SampleState
from thresher.engine.requests import Event, PromptUsage, Request
from thresher.engine.stopping import TextStream
from thresher.speculation.speculator import Speculating


@dataclass(eq=False)
class Holder:
    """A sequence, and what is being built for its index beside the passes.

    queries: of the last tokens of its prompt, `[layers, n, q_heads, head_dim]`, which an index is fitted to.
    """

    sequence: KVSequence
    growth: "Future[Growth] | None" = None
    growth_target: int = 0
    queries: torch.Tensor | None = None


@dataclass(eq=False)
class Sample(Holder):
    """Sample number `number` of a request. pending: the token that was chosen and is not yet in the cache.
    speculating: how drafts are made for it, None for none."""

    request: Request = field(kw_only=True)
    number: int = field(kw_only=True)
    state: SampleState = field(kw_only=True)
    stream: TextStream = field(kw_only=True)
    limit: int = field(kw_only=True)
    prompt: PromptUsage = field(kw_only=True)
    speculating: Speculating | None = None
    pending: int = -1
    generated: int = 0

    def push(self, choice: Choice, eos: frozenset[int]) -> Event:
        """Take the next token. The event says what it gave and whether it was the last."""
        params = self.request.params
        self.state.push(choice.token)
        self.pending = choice.token
        self.generated += 1
        ended = choice.token in params.stop_token_ids or (not params.ignore_eos and choice.token in eos)
        text = "" if ended else self.stream.push(choice.token)
        prompt = self.prompt if self.generated == 1 else None
        last = ended or self.stream.stopped or self.generated == self.limit
        if not last:
            return Event(self.request.id, self.number, choice, text, prompt=prompt)
        text += self.stream.finish()
        matched: str | int | None = choice.token if ended else self.stream.matched
        return Event(
            self.request.id,
            self.number,
            choice,
            text,
            "length" if matched is None else "stop",
            matched=matched,
            readings=self.readings(),
            seed=self.state.seed,
            speculation=self.speculating.stats if self.speculating else None,
            prompt=prompt,
        )

    def readings(self) -> Readings | None:
        """What sparse attention has read for this sample, None if it was dense."""
        index = self.sequence.index
        return index.readings() if isinstance(index, Index) else None
