"""Perplexity of a text under several methods: dense prefill of a context, then given tokens decoded one by one."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from thresher.attention.base import AttentionMethod
from thresher.attention.dense import Dense
from thresher.cache.sequence import KVSequence
from thresher.engine.llm import LLM
from thresher.errors import UsageError
from thresher.evaluation.journal import Journal, ResultKey
from thresher.evaluation.statistics import Interval, bootstrap_difference, bootstrap_mean
from thresher.evaluation.teacher import check_length, kv_read, prefill, score_tokens

DENSE = Dense.name


@dataclass(frozen=True)
class WindowScore:
    """One method on one window of the text.

    losses: nats of each scored token. kv_read: bytes that attention reads, as a share of dense.
    """

    index: int
    method: str
    losses: tuple[float, ...]
    seconds: float
    kv_read: float


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean loss, over all windows. ratio: to dense, from token-wise paired losses; None for dense itself."""

    method: str
    windows: int
    tokens: int
    perplexity: Interval
    ratio: Interval | None
    ms: float
    kv_read: float


def text_windows(token_ids: Sequence[int], context: int, tokens: int, windows: int) -> list[list[int]]:
    """`windows` stretches of `context + tokens` token ids, spread evenly over the text, without overlap.

    Raises UsageError if the text is too short for them.
    """
    if context < 1 or tokens < 1 or windows < 1:
        raise UsageError(f"context={context}, tokens={tokens}, windows={windows}: each must be 1 or more")
    width = context + tokens
    if windows * width > len(token_ids):
        raise UsageError(
            f"{windows} windows of {context} + {tokens} tokens need {windows * width}, the text has {len(token_ids)}; "
            "give a longer text, or fewer or shorter windows"
        )
    stride = (len(token_ids) - width) // max(windows - 1, 1)
    return [list(token_ids[i * stride : i * stride + width]) for i in range(windows)]


def score_windows(
    llm: LLM,
    windows: Sequence[Sequence[int]],
    context: int,
    methods: Sequence[AttentionMethod],
    *,
    journal: Journal | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[WindowScore]:
    """Scores of all methods on each window. progress: (done, all) windows' tokens, every method counted.

    The context's last token is decoded under the method, so that every scored token depends on it. A tokenizer that
    begins texts with a special token has it before each window. Raises CapacityError if a window is too long.
    """
    journal = journal or Journal(None, {})
    begin = begin_tokens(llm.model.tokenizer)
    check_length(llm, len(begin) + max(len(window) for window in windows))
    total = sum(len(window) for window in windows) * len(methods)
    done = 0
    for index, window in enumerate(windows):
        ids = [*begin, *window]
        split = len(begin) + context
        sequence: KVSequence | None = None
        for method in methods:
            key = ResultKey("perplexity", context, index, 0, str(method), llm.model.fingerprint)
            known = journal.get(key)
            if known is None:
                if sequence is None:
                    sequence = prefill(llm, ids[: split - 1])
                started = time.perf_counter()
                logprobs, _ = score_tokens(llm.runner, sequence, ids[split - 1], ids[split:], method)
                seconds = time.perf_counter() - started
                read = kv_read(llm.runner, method, split)
                score = WindowScore(index, str(method), tuple(-p for p in logprobs), seconds, read)
                journal.put(key, asdict(score))
            else:
                score = WindowScore(**(known | {"losses": tuple(known["losses"])}))
            done += len(window)
            progress(done, total)
            yield score


def run_settings(llm: LLM, text_sha256: str, context: int, tokens: int, windows: int) -> dict[str, Any]:
    """What results depend on beside their key."""
    return {
        "command": "perplexity",
        "text": text_sha256,
        "context": context,
        "tokens": tokens,
        "windows": windows,
        "weights": llm.model.weights,
        "tokenizer": llm.model.tokenizer_fingerprint,
    }


def summarize(scores: Sequence[WindowScore], seed: int = 0) -> list[Perplexity]:
    """One row for each method. Intervals take tokens as independent; the exp is taken of mean and bounds."""
    losses: dict[str, list[float]] = {}
    for score in scores:
        losses.setdefault(score.method, []).extend(score.losses)
    rows = []
    for method, own in losses.items():
        parts = [s for s in scores if s.method == method]
        ratio = None if method == DENSE else _exp(bootstrap_difference(own, losses[DENSE], seed=seed))
        rows.append(
            Perplexity(
                method=method,
                windows=len(parts),
                tokens=len(own),
                perplexity=_exp(bootstrap_mean(own, seed=seed)),
                ratio=ratio,
                ms=1e3 * sum(s.seconds for s in parts) / len(own),
                kv_read=sum(s.kv_read for s in parts) / len(parts),
            )
        )
    return rows


def begin_tokens(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before a text."""
    plain: list[int] = tokenizer.encode("a", add_special_tokens=False)
    special: list[int] = tokenizer.encode("a", add_special_tokens=True)
    for n in range(len(special) - len(plain) + 1):
        if special[n : n + len(plain)] == plain:
            return special[:n]
    return []


def _exp(interval: Interval) -> Interval:
    return Interval(math.exp(interval.mean), math.exp(interval.low), math.exp(interval.high))
