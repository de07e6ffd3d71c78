"""What a user can ask of sampling, checked when it is asked."""

import math
from dataclasses import dataclass

from thresher.errors import UsageError

_MAX_SEED = 2**64 - 1


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop. Every request draws from random streams of its own.

    max_new_tokens: 0 produces nothing. temperature: 0 is greedy. top_k: 0 is off. top_p, min_p, repetition_penalty: as
    in transformers. presence_penalty: taken once from every token already generated. stop: strings that end the answer
    and are not part of it. logprobs: also report the log-probability of each token and of the n most likely.
    n: independent answers. Raises UsageError on a value that makes no sense.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    seed: int = 0
    n: int = 1

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        self._integer("max_new_tokens", 0, 1 << 31)
        self._integer("top_k", 0, 1 << 31)
        self._integer("seed", 0, _MAX_SEED)
        self._integer("n", 1, 1024)
        if self.logprobs is not None:
            self._integer("logprobs", 0, 1000)
        self._number("temperature", 0, 100)
        self._number("top_p", 0, 1, open_below=True)
        self._number("min_p", 0, 1)
        self._number("repetition_penalty", 0, 100, open_below=True)
        self._number("presence_penalty", -100, 100)
        if not all(isinstance(s, str) and s for s in stop):
            raise UsageError(f"stop={self.stop!r}: stop strings must be texts that are not empty")
        if not all(type(t) is int and t >= 0 for t in self.stop_token_ids):
            raise UsageError(f"stop_token_ids={self.stop_token_ids!r}: must be token ids")

    def _integer(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if type(value) is not int or not low <= value <= high:
            raise UsageError(f"{name}={value!r}: must be a whole number from {low} to {high}")

    def _number(self, name: str, low: float, high: float, open_below: bool = False) -> None:
        value = getattr(self, name)
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not good or not low <= value <= high or (open_below and value == low):
            raise UsageError(f"{name}={value!r}: must be a number {'above' if open_below else 'from'} {low} to {high}")
