"""How near a method's next-token distributions and attention outputs are to dense, and what it reads for that."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from thresher.attention.base import AttentionMethod
from thresher.attention.dense import Dense
from thresher.attention.index import Index
from thresher.attention.sparse import Shape, SparseMethod
from thresher.cache.sequence import KVSequence
from thresher.decoding.runner import Work
from thresher.engine.llm import LLM
from thresher.evaluation.journal import Journal, ResultKey
from thresher.evaluation.statistics import Interval, bootstrap_mean
from thresher.evaluation.teacher import check_length, prefill
from thresher.machine.cost import attention_cost

ERROR_TOKENS = 16  # scored tokens whose layer outputs are compared as well


@dataclass(frozen=True)
class TokenScores:
    """One method on the scored tokens of one text at one context.

    kl: nats of the dense distribution over the method's; top1: the same most likely token; losses: nats of the
    text's own token; all one number a token. rows: K and V rows read for a KV head of a sparse layer; tokens:
    weighed by a query head there. bytes_read: of all layers' caches and indexes in a step, and as kv_read a share
    of the dense KV cache. layer_errors: mean |o - o_dense| / |o_dense| of each layer's heads. escalated: outputs of
    `checked` error estimates that were answered densely.
    """

    text: str
    context: int
    method: str
    kl: tuple[float, ...]
    top1: tuple[bool, ...]
    losses: tuple[float, ...]
    rows: float
    tokens: float
    bytes_read: float
    kv_read: float
    index_bytes: int
    build_seconds: float
    ms: float
    layer_errors: tuple[float, ...]
    checked: int
    escalated: int


@dataclass(frozen=True)
class Fidelity:
    """TokenScores in one line: means with 95 % bootstrap intervals. loss: difference to dense of the same tokens,
    nats."""

    text: str
    context: int
    method: str
    kl: Interval
    kl_most: float
    top1: float
    loss: Interval
    rows: float
    tokens_share: float
    kv_read: float
    output_error: float
    ms: float
    build_seconds: float
    escalated: float | None


def score_text(
    llm: LLM,
    name: str,
    token_ids: Sequence[int],
    context: int,
    scored: int,
    methods: Sequence[AttentionMethod],
    *,
    journal: Journal | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[TokenScores]:
    """Prefill `context` tokens densely, then decode the next `scored` ones under each method, the right one each time.

    Dense comes first. Raises CapacityError if the text's part is too long for the model.
    """
    journal = journal or Journal(None, {})
    check_length(llm, context + scored)
    total = context + scored * len(methods)
    sequence: KVSequence | None = None
    dense: torch.Tensor | None = None
    for i, method in enumerate(methods):
        key = ResultKey(f"fidelity {name}", context, scored, 0, str(method), llm.model.fingerprint)
        known = journal.get(key)
        if known is None:
            if sequence is None or dense is None:
                sequence = prefill(llm, token_ids[:context], lambda done: progress(done, total))
                steps = _steps(sequence, token_ids[context : context + scored])
                dense = torch.stack([llm.runner.run([Work(fork, [token], True)])[0] for fork, token in steps])
                dense = dense.log_softmax(1)
            scores = score_method(llm, name, sequence, token_ids[context : context + scored + 1], method, dense)
            journal.put(key, asdict(scores))
        else:
            fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in known.items()}
            scores = TokenScores(**fields)
        progress(context + scored * (i + 1), total)
        yield scores


def _steps(sequence: KVSequence, token_ids: Sequence[int]) -> Iterator[tuple[KVSequence, int]]:
    fork = sequence.fork()
    return ((fork, token) for token in token_ids)


def score_method(
    llm: LLM, name: str, sequence: KVSequence, token_ids: Sequence[int], method: AttentionMethod, dense: torch.Tensor
) -> TokenScores:
    """token_ids: the scored tokens' inputs and, last, one more target; dense: log-probabilities `[scored, vocab]`."""
    context, scored = sequence.length, len(token_ids) - 1
    fork = sequence.fork()
    fork.index = None
    begin = time.perf_counter()
    index = llm.runner.prepare(fork, method)
    build_seconds = time.perf_counter() - begin
    again = fork.fork()
    rows, seconds = [], []
    for token in token_ids[:scored]:
        begin = time.perf_counter()
        rows.append(llm.runner.run([Work(fork, [token], True, method)])[0].log_softmax(0))
        seconds.append(time.perf_counter() - begin)
    own = torch.stack(rows)
    targets = torch.tensor(token_ids[1:])[:, None]
    shape = llm.runner.shape
    whole = attention_cost(shape, context).bytes
    read = Reading(whole, whole, context, context, 0, 0)
    if index and isinstance(method, SparseMethod) and isinstance(fork.index, Index):
        read = reading(fork.index, method, llm, context)
    elif method.visibility():
        cost = method.cost(shape, context).bytes
        read = Reading(whole, cost, cost / whole * context, 0, 0, 0)
    return TokenScores(
        text=name,
        context=context,
        method=str(method),
        kl=tuple(((dense.exp() * (dense - own)).sum(1)).clamp(min=0).tolist()),
        top1=tuple((own.argmax(1) == dense.argmax(1)).tolist()),
        losses=tuple((-own.gather(1, targets)[:, 0]).tolist()),
        rows=read.rows,
        tokens=read.tokens or read.rows,
        bytes_read=read.bytes,
        kv_read=read.bytes / whole,
        index_bytes=index.bytes if index else 0,
        build_seconds=build_seconds,
        ms=1e3 * statistics.median(seconds),
        layer_errors=tuple(layer_errors(llm, again, token_ids[: min(scored, ERROR_TOKENS)], method)),
        checked=read.checked,
        escalated=read.escalated,
    )


@dataclass(frozen=True)
class Reading:
    """What one step reads: bytes of all layers; rows of a KV head and tokens of a query head in a sparse layer."""

    whole: float
    bytes: float
    rows: float
    tokens: float
    checked: int
    escalated: int


def reading(index: Index, method: SparseMethod, llm: LLM, context: int) -> Reading:
    """From the counters of an index that has been used for some steps."""
    shape, counted = llm.runner.shape, index.readings()
    whole = attention_cost(shape, context).bytes
    if not counted.readings:
        return Reading(whole, whole, context, context, 0, 0)
    group = shape.q_heads // shape.kv_heads
    rows, tokens = counted.rows / counted.readings, counted.head_rows / counted.readings / group
    row_bytes = 2 * shape.head_dim * shape.value_bytes
    candidates = max(0, context - method.sinks - method.window)
    own = method.index_bytes(candidates, Shape(llm.model.heads, llm.model.dtype))
    sparse_layers = len(index.layers)
    dense = attention_cost(shape, context).bytes * (shape.layers - sparse_layers) / shape.layers
    read = dense + sparse_layers * shape.kv_heads * (rows * row_bytes + own)
    return Reading(whole, read, rows, tokens, counted.checked, counted.escalated)


def layer_errors(llm: LLM, sequence: KVSequence, token_ids: Sequence[int], method: AttentionMethod) -> list[float]:
    """Mean relative error of each layer's attention outputs against dense attention of the same queries."""
    errors = []
    for token in token_ids:
        _, captured = llm.runner.run_captured([Work(sequence, [token], False, method)])
        exact = captured.dense.float()
        difference = (captured.outputs.float() - exact).norm(dim=-1) / exact.norm(dim=-1).clamp(min=1e-20)
        errors.append(difference.mean(dim=(1, 2)))
    mean: list[float] = torch.stack(errors).mean(0).tolist()
    return mean


def summarize(scores: Sequence[TokenScores], seed: int = 0) -> list[Fidelity]:
    """One line for each text, context and method."""
    dense = {(s.text, s.context): s.losses for s in scores if s.method == Dense.name}
    lines = []
    for s in scores:
        base = dense.get((s.text, s.context), s.losses)
        lines.append(
            Fidelity(
                text=s.text,
                context=s.context,
                method=s.method,
                kl=bootstrap_mean(s.kl, seed=seed),
                kl_most=max(s.kl),
                top1=statistics.mean(s.top1),
                loss=bootstrap_mean([a - b for a, b in zip(s.losses, base, strict=True)], seed=seed),
                rows=s.rows,
                tokens_share=s.tokens / s.context,
                kv_read=s.kv_read,
                output_error=statistics.mean(s.layer_errors),
                ms=s.ms,
                build_seconds=s.build_seconds,
                escalated=s.escalated / s.checked if s.checked else None,
            )
        )
    return lines


def run_settings(llm: LLM, texts: dict[str, str], scored: int) -> dict[str, Any]:
    """What results depend on beside their key; texts: name -> SHA-256."""
    return {
        "command": "fidelity",
        "texts": texts,
        "scored": scored,
        "weights": llm.model.weights,
        "tokenizer": llm.model.tokenizer_fingerprint,
    }
