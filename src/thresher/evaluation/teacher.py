"""The two passes every evaluation is made of: read a prompt densely, then decode given tokens under a method."""

from collections.abc import Callable, Sequence

import torch

from thresher.attention.base import AttentionMethod
from thresher.cache.sequence import KVSequence
from thresher.decoding.runner import Runner, Work
from thresher.engine.llm import LLM
from thresher.errors import CapacityError
from thresher.machine.cost import attention_cost


def check_length(llm: LLM, length: int) -> None:
    """Raises CapacityError if a sequence of `length` tokens is longer than the model or the KV budget permits."""
    if length > llm.positions:
        raise CapacityError(
            f"{length} tokens are more than the {llm.positions} positions the model was trained for; "
            "choose fewer, or allow RoPE extrapolation with --allow-extrapolation"
        )
    needed = length * llm.runner.layout.bytes_per_token
    if needed > llm.kv_budget:
        raise CapacityError(
            f"{length} tokens need {needed / 2**20:.0f} MiB of KV cache, the budget is "
            f"{llm.kv_budget / 2**20:.0f} MiB; choose fewer or raise --kv-budget"
        )


def prefill(llm: LLM, token_ids: Sequence[int], progress: Callable[[int], None] = lambda tokens: None) -> KVSequence:
    """Read tokens densely into a new sequence, in chunks. progress: called with the tokens read so far."""
    sequence = KVSequence(llm.runner.layout)
    if token_ids:
        sequence.reserve(len(token_ids), exact=True)
    while sequence.length < len(token_ids):
        chunk = token_ids[sequence.length : sequence.length + llm.chunk_size]
        llm.runner.run([Work(sequence, chunk, logits=False)])
        progress(sequence.length)
    return sequence


def decode_logits(runner: Runner, sequence: KVSequence, token: int, method: AttentionMethod) -> torch.Tensor:
    """Append one token to the sequence as a decode step of `method`. Returns float32 logits `[vocab]` after it."""
    return runner.run([Work(sequence, [token], True, method)])[0]


def kv_read(runner: Runner, method: AttentionMethod, context: int) -> float:
    """Bytes that attention to `context` tokens reads under `method`, as a share of what dense attention reads."""
    return method.cost(runner.shape, context).bytes / attention_cost(runner.shape, context).bytes


def score_tokens(
    runner: Runner, sequence: KVSequence, last: int, token_ids: Sequence[int], method: AttentionMethod
) -> tuple[list[float], bool]:
    """Log-probabilities (nats) of given tokens, each decoded under `method` on a fork of `sequence`.

    `last` is the context's last token: it is not in the sequence yet and is decoded under the method too, so that the
    first score already depends on the method. Also returns whether greedy decoding would have chosen these tokens.
    """
    fork = sequence.fork()
    logprobs, greedy = [], True
    token = last
    for wanted in token_ids:
        logits = decode_logits(runner, fork, token, method).double()
        logprobs.append(float(logits[wanted] - logits.logsumexp(0)))
        greedy = greedy and int(logits.argmax()) == wanted
        token = wanted
    return logprobs, greedy
