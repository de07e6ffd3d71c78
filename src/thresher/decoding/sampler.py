"""From logits to tokens: what each sample remembers for it, and one native call for a batch of them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch

from thresher.decoding.sampling import SamplingParams
from thresher.errors import ModelError, UsageError
from thresher.kernels.sampling import Draw, Edits, reference_distribution

_BLOCK = 64  # uniform numbers drawn from a stream at once


@dataclass(frozen=True)
class Choice:
    """A token; with `logprobs`, its log-probability before any processing and the most likely (token, logprob)."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Stream(IntEnum):
    """What a sample draws random numbers for, each independent of the others."""

    TOKEN = 0
    DRAFT = 1
    ACCEPT = 2


def random_stream(seed: int, request: int, sample: int, stream: Stream = Stream.TOKEN) -> np.random.Generator:
    """The stream of a sample of a request: independent of every other and of the batch."""
    key = (request, sample, int(stream)) if stream else (request, sample)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)))


class SampleState:
    """What choosing a sample's next token depends on besides the logits: its tokens and its random stream.

    Token number i is drawn with number i of a stream, so undoing tokens undoes their draws. `edits`: how penalties,
    bias and the minimum length change single logits now, kept up with each token.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        *,
        request: int,
        sample: int,
        vocab_size: int,
        eos_token_ids: Collection[int],
    ) -> None:
        """request: number of the request in its call; sample: of the answer in its request.

        If `params.seed` is None a seed of the sample's own is drawn; `params.with_seed()` gives all samples of a
        request the same. Raises UsageError if a token id of the parameters is beyond the vocabulary.
        """
        self.params = params.with_seed()
        self.generated: list[int] = []
        self._uniforms: dict[Stream, list[float]] = {}
        self._streams: dict[Stream, np.random.Generator] = {}
        self._key = self.seed, request, sample
        self._bias = dict(params.logit_bias)
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)} if params.min_tokens else set()
        for name, asked in (("logit_bias", self._bias), ("stop_token_ids", params.stop_token_ids)):
            if any(t >= vocab_size for t in asked):
                raise UsageError(f"{name}: token id {max(asked)} is beyond the model's vocabulary of {vocab_size}")
        penalties = params.presence_penalty != 0 or params.frequency_penalty != 0
        self._counting = penalties or params.repetition_penalty != 1
        prompt = np.unique(np.asarray(prompt_token_ids, np.int32)) if params.repetition_penalty != 1 else ()
        self._prompt_count = len(prompt)
        others = sorted({*self._bias, *(t for t in ends if t < vocab_size)}.difference(np.asarray(prompt).tolist()))
        ids = np.concatenate([np.asarray(prompt, np.int32), np.asarray(others, np.int32)])
        # Slots of edited tokens: those of the prompt first, then others as they come.
        self._size = ids.size
        self._slots = {int(t): i for i, t in enumerate(ids)}
        self._ids = ids
        self._counts = np.zeros(self._size, np.int32)  # how often each was generated
        self._factors = np.ones(self._size, np.float32)
        self._factors[: self._prompt_count] = params.repetition_penalty
        self._offsets = np.zeros(self._size, np.float32)
        self._ends = [self._slots[t] for t in ends if t in self._slots]
        for slot in {*self._ends, *(self._slots[t] for t in self._bias)}:
            self._update(slot)

    @property
    def seed(self) -> int:
        """What reproduces the draws."""
        assert self.params.seed is not None
        return self.params.seed

    @property
    def edits(self) -> Edits:
        """Until the next token is pushed or popped."""
        n = self._size
        return Edits(self._ids[:n], self._factors[:n], self._offsets[:n])

    def uniform(self, ahead: int = 0, stream: Stream = Stream.TOKEN) -> float:
        """The number from [0, 1) of the next token, or of one `ahead` tokens later."""
        position = len(self.generated) + ahead
        numbers = self._uniforms.setdefault(stream, [])
        while len(numbers) <= position:
            if stream not in self._streams:
                self._streams[stream] = random_stream(*self._key, stream)
            numbers += self._streams[stream].random(_BLOCK).tolist()
        return numbers[position]

    def push(self, token: int) -> None:
        """A token was generated."""
        self.generated.append(token)
        self._count(token, 1)

    def pop(self, n: int = 1) -> None:
        """Undo the last n tokens."""
        for _ in range(n):
            self._count(self.generated.pop(), -1)

    def draw(self, stream: Stream = Stream.TOKEN, weights: bool = False) -> Draw:
        """How the next token is drawn, until one is pushed or popped. weights: whether what it is drawn in proportion
        to is wanted."""
        p = self.params
        uniform = self.uniform(stream=stream) if p.temperature else 0.0
        return Draw(p.temperature, p.top_k, p.top_p, p.min_p, uniform, self.edits, p.logprobs is not None, weights)

    def draws_along(self, token_ids: Sequence[int], weights: bool = False) -> list[Draw]:
        """How each of these tokens would be drawn behind those before it, and the one after them."""
        draws = []
        for i in range(len(token_ids) + 1):
            draw = self.draw(weights=weights)
            if draw.edits.ids.size:  # the next token changes them
                e = draw.edits
                draw = replace(draw, edits=Edits(e.ids.copy(), e.factors.copy(), e.offsets.copy()))
            draws.append(draw)
            if i < len(token_ids):
                self.push(token_ids[i])
        self.pop(len(token_ids))
        return draws

    def _count(self, token: int, change: int) -> None:
        if self._counting:
            slot = self._slots.get(token)
            if slot is None:
                slot = self._new_slot(token)
            self._counts[slot] += change
            self._update(slot)
        # The minimum length is reached, or no longer, by this token.
        if self.params.min_tokens and len(self.generated) - (change > 0) < self.params.min_tokens:
            for slot in self._ends:
                self._update(slot)

    def _new_slot(self, token: int) -> int:
        slot = self._slots[token] = self._size
        if slot == self._ids.size:
            room = max(64, slot)
            self._ids = np.concatenate([self._ids, np.zeros(room, np.int32)])
            self._counts = np.concatenate([self._counts, np.zeros(room, np.int32)])
            self._factors = np.concatenate([self._factors, np.ones(room, np.float32)])
            self._offsets = np.concatenate([self._offsets, np.zeros(room, np.float32)])
        self._ids[slot] = token
        self._size += 1
        return slot

    def _update(self, slot: int) -> None:
        params, count = self.params, int(self._counts[slot])
        seen = slot < self._prompt_count or count > 0
        self._factors[slot] = params.repetition_penalty if seen else 1
        offset = self._bias.get(int(self._ids[slot]), 0.0)
        offset -= params.presence_penalty * (count > 0) + params.frequency_penalty * count
        early = slot in self._ends and len(self.generated) < params.min_tokens
        self._offsets[slot] = -np.inf if early else offset


def choice_of(logits: torch.Tensor, token: int, logprobs: int | None, logsumexp: float) -> Choice | ModelError:
    """A token that was drawn from a row of logits `[vocab]`, -1 if they are not numbers."""
    if token < 0:
        return ModelError("the model produced logits that are not numbers; its weights or its KV cache are damaged")
    return Choice(token) if logprobs is None else _with_logprobs(logits, token, logprobs, logsumexp)


def prompt_logprobs(logits: torch.Tensor, token_ids: Sequence[int], top: int = 0) -> list[Choice]:
    """What the model thought of tokens it was given: row i of float32 logits `[tokens, vocab]` is the prediction of
    token_ids[i], that is, it was computed at the token before. top: how many of the most likely to report.

    Raises ModelError if a row is not numbers.
    """
    if logits.shape[0] != len(token_ids):
        raise ValueError(f"{logits.shape[0]} rows of logits for {len(token_ids)} tokens")
    logsumexp = logits.double().logsumexp(dim=-1).tolist()
    if not np.isfinite(logsumexp).all():
        raise ModelError("the model produced logits that are not numbers; its weights or its KV cache are damaged")
    return [_with_logprobs(logits[i], t, top, logsumexp[i]) for i, t in enumerate(token_ids)]


def processed_probabilities(logits: torch.Tensor, state: SampleState) -> npt.NDArray[np.float64]:
    """The distribution that the state's next token is drawn from, float64 `[vocab]`, summing to 1, of float32 logits
    `[vocab]`. For temperature > 0."""
    return reference_distribution(logits.numpy(), state.draw())


def _with_logprobs(logits: torch.Tensor, token: int, top: int, logsumexp: float) -> Choice:
    values, indices = logits.topk(min(top, logits.shape[0]))
    likely = zip(indices.tolist(), (values.double() - logsumexp).tolist(), strict=True)
    return Choice(token, float(logits[token]) - logsumexp, tuple(likely))
