"""What a user can ask of sampling, checked when it is asked."""

import math
import numbers
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import InitVar, dataclass, replace
from typing import Any, cast

from thresher.errors import UsageError

_MAX_SEED = 2**64 - 1


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop. Every sample of every request draws from a random stream of its own.

    max_new_tokens: 256 if not given; 0 produces nothing. min_tokens: no end token before so many. temperature: 0 is
    greedy, else 0.01 or more. top_k: 0 or -1 is off. top_p, min_p, repetition_penalty: as in transformers and in its
    order, top-k, top-p, min-p (vLLM applies min-p first, which differs where they are used together).
    presence_penalty: taken once from every token already generated; frequency_penalty: as often as it was generated.
    logit_bias: token id -> what is added to its logit after the penalties, -100 to 100; kept as sorted pairs.
    stop: strings that end the answer, special tokens by their text too; include_stop: they are part of it.
    stop_token_ids: end the answer like end tokens. logprobs: also report the log-probability of each token and of the n
    most likely; prompt_logprobs: the same of the prompt. seed: None draws one, see `with_seed`. n: independent answers.
    max_tokens: another name of max_new_tokens, for construction only.

    Numbers of numpy are taken. Raises UsageError on a value that makes no sense.
    """

    max_new_tokens: int = cast(int, None)  # so that it is known whether it was given
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    seed: int | None = None
    n: int = 1
    max_tokens: InitVar[int | None] = None

    def __post_init__(self, max_tokens: int | None) -> None:
        if max_tokens is not None:
            _integer("max_tokens", max_tokens, 0, 1 << 31)
            if self.max_new_tokens is not None and self.max_new_tokens != max_tokens:
                raise UsageError(
                    f"max_tokens={max_tokens!r} and max_new_tokens={self.max_new_tokens!r}: two names of one "
                    "number; give one"
                )
            self._set("max_new_tokens", max_tokens)
        elif self.max_new_tokens is None:
            self._set("max_new_tokens", 256)
        self._set("top_k", 0 if self.top_k is not True and self.top_k == -1 else self.top_k)
        for name, low, high in (
            ("max_new_tokens", 0, 1 << 31),
            ("min_tokens", 0, 1 << 31),
            ("top_k", 0, 1 << 31),
            ("n", 1, 1024),
        ):
            self._set(name, _integer(name, getattr(self, name), low, high))
        for name, low, high in (("logprobs", 0, 1000), ("prompt_logprobs", 0, 1000), ("seed", 0, _MAX_SEED)):
            if getattr(self, name) is not None:
                self._set(name, _integer(name, getattr(self, name), low, high))
        for name, least, most in (
            ("temperature", 0, 100),
            ("top_p", 0, 1),
            ("min_p", 0, 1),
            ("repetition_penalty", 0.01, 100),
            ("presence_penalty", -100, 100),
            ("frequency_penalty", -100, 100),
        ):
            self._set(name, _number(name, getattr(self, name), least, most))
        if 0 < self.temperature < 0.01:
            raise UsageError(f"temperature={self.temperature!r}: must be 0 (greedy) or a number from 0.01 to 100")
        if self.top_p == 0:
            raise UsageError(f"top_p={self.top_p!r}: must be a number above 0, up to 1")
        if self.min_tokens > self.max_new_tokens:
            raise UsageError(f"min_tokens={self.min_tokens}: more than max_new_tokens={self.max_new_tokens}")
        for name in ("include_stop", "ignore_eos"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name}={getattr(self, name)!r}: must be True or False")
        self._set("stop", _stop_strings(self.stop))
        self._set("stop_token_ids", _token_ids(self.stop_token_ids))
        self._set("logit_bias", _biases(self.logit_bias))

    def with_seed(self) -> "SamplingParams":
        """These, with a seed from the operating system if there was none. A request calls it once, for all samples."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(64))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


def _integer(name: str, value: Any, low: int, high: int) -> int:
    good = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not good or not low <= int(value) <= high:
        raise UsageError(f"{name}={value!r}: must be a whole number from {low} to {high}")
    return int(value)


def _number(name: str, value: Any, low: float, high: float) -> float:
    good = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or not low <= value <= high:
        raise UsageError(f"{name}={value!r}: must be a number from {low} to {high}")
    return float(value)


def _stop_strings(value: Any) -> tuple[str, ...]:
    listed = (value,) if isinstance(value, str) else () if value is None else value
    stop = tuple(listed) if isinstance(listed, Iterable) else (listed,)
    if not all(isinstance(s, str) and s for s in stop):
        raise UsageError(f"stop={value!r}: stop strings must be texts that are not empty")
    return stop


def _token_ids(value: Any) -> tuple[int, ...]:
    ids = tuple(value) if isinstance(value, Iterable) else () if value is None else (value,)
    if not all(isinstance(t, numbers.Integral) and not isinstance(t, bool) and int(t) >= 0 for t in ids):
        raise UsageError(f"stop_token_ids={value!r}: must be token ids")
    return tuple(int(t) for t in ids)


def _biases(value: Any) -> tuple[tuple[int, float], ...]:
    try:
        pairs = dict(value or ())
    except (TypeError, ValueError):
        raise UsageError(f"logit_bias={value!r}: must be a mapping of token ids to numbers") from None
    return tuple(
        sorted((_integer("logit_bias", t, 0, 1 << 31), _number("logit_bias", b, -100, 100)) for t, b in pairs.items())
    )
