"""From logits to a token: penalties, temperature, top-k, top-p, min-p, in transformers' order and meaning."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from thresher.engine.sampling import SamplingParams
from thresher.errors import ModelError


@dataclass(frozen=True)
class Choice:
    """A token; with `logprobs`, its log-probability before any processing and the most likely (token, logprob)."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def random_stream(seed: int, sample: int) -> np.random.Generator:
    """The stream of sample number `sample` of a request: independent of every other and of the batch."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, sample])))


def next_token(
    logits: torch.Tensor,
    params: SamplingParams,
    seen: Collection[int],
    generated: Collection[int],
    rng: np.random.Generator,
) -> Choice:
    """Choose from float32 logits `[vocab]`. `seen`: prompt and generated tokens; `generated`: only the latter.

    Temperature 0 takes the largest logit (after penalties); otherwise one uniform draw from `rng` decides.
    Raises ModelError if the logits are not numbers.
    """
    best = float(logits.max())  # NaN if any is
    if not np.isfinite(best):
        raise ModelError("the model produced logits that are not numbers; its weights or its KV cache are damaged")
    if params.temperature == 0:
        token = int(_penalized(logits, params, seen, generated).argmax())
    else:
        cumulative = processed_probabilities(logits, params, seen, generated).cumsum()
        token = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
    if params.logprobs is None:
        return Choice(token)
    logprobs = logits.log_softmax(dim=0)
    values, indices = logprobs.topk(min(params.logprobs, logits.shape[0]))
    return Choice(token, float(logprobs[token]), tuple(zip(indices.tolist(), values.tolist(), strict=True)))


def processed_probabilities(
    logits: torch.Tensor, params: SamplingParams, seen: Collection[int], generated: Collection[int]
) -> npt.NDArray[np.float64]:
    """The distribution that is sampled from, float64 `[vocab]`, summing to 1. For temperature > 0."""
    x = _penalized(logits, params, seen, generated).double().numpy() / params.temperature
    if 0 < params.top_k < x.size:
        x = np.where(x < np.partition(x, -params.top_k)[-params.top_k], -np.inf, x)
    p = np.exp(x - x.max())
    p /= p.sum()
    if params.top_p < 1:
        p = _nucleus(p, params.top_p)
    if params.min_p > 0:
        p = np.where(p < params.min_p * p.max(), 0.0, p)
    return np.asarray(p / p.sum())


def _penalized(
    logits: torch.Tensor, params: SamplingParams, seen: Collection[int], generated: Collection[int]
) -> torch.Tensor:
    if params.repetition_penalty != 1 and seen:
        index = torch.tensor(list(set(seen)))
        picked = logits[index]
        penalty = params.repetition_penalty
        logits = logits.index_put((index,), torch.where(picked < 0, picked * penalty, picked / penalty))
    if params.presence_penalty and generated:
        index = torch.tensor(list(set(generated)))
        logits = logits.index_put((index,), logits[index] - params.presence_penalty)
    return logits


def _nucleus(p: npt.NDArray[np.float64], top_p: float) -> npt.NDArray[np.float64]:
    """Drop the least likely tokens whose sum is at most 1 - top_p."""
    # Tokens below (1 - top_p) / vocab fall in any case; what is left is short to sort.
    candidates = np.flatnonzero(p > (1 - top_p) / p.size)
    ascending = candidates[np.argsort(p[candidates], kind="stable")]
    below = max(0.0, 1 - p[ascending].sum())
    dropped = ascending[:-1][(below + p[ascending[:-1]].cumsum()) <= 1 - top_p]
    kept = np.zeros_like(p)
    kept[candidates] = p[candidates]
    kept[dropped] = 0
    return kept
