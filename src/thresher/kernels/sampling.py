"""Tokens from logits: a batch in one native call, and the distribution it draws from in float64."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from thresher.kernels import _native
from thresher.kernels.native import kernel_set, threads


@dataclass(frozen=True)
class Edits:
    """Changes to single logits of a row: x becomes `(x * factor if x < 0 else x / factor) + offset`.

    ids: int32 `[edits]`, each once. factors: float32, above 0. offsets: float32, -inf excludes a token.
    """

    ids: npt.NDArray[np.int32]
    factors: npt.NDArray[np.float32]
    offsets: npt.NDArray[np.float32]


NO_EDITS = Edits(np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.float32))


@dataclass(frozen=True)
class Draw:
    """How a row's token is drawn: temperature 0 takes the largest logit, the first among equals. top_k 0, top_p 1 and
    min_p 0 are off; uniform is a number from [0, 1). logsumexp, weights: whether they are wanted."""

    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    uniform: float = 0.0
    edits: Edits = NO_EDITS
    logsumexp: bool = False
    weights: bool = False


@dataclass(frozen=True)
class Drawn:
    """What `sample` draws from each row. tokens: -1 for a row that is not numbers (any NaN, or no finite largest).
    logsumexp: of the logits before edits, 0 for rows that did not want it. weights: float32 `[rows, vocab]` that tokens
    are drawn in proportion to, the largest 1; meaningless in rows that did not want them, None if none did."""

    tokens: list[int]
    logsumexp: list[float]
    weights: torch.Tensor | None


def sample(logits: torch.Tensor, draws: Sequence[Draw]) -> Drawn:
    """Draw a token from each row of float32 logits `[rows, vocab]`."""
    rows, vocab = logits.shape
    if logits.dtype != torch.float32 or logits.stride(1) != 1 or rows != len(draws) or not vocab:
        raise ValueError("logits must be float32 [rows, vocab], each row contiguous, with a draw for each row")
    kernels = kernel_set()
    first = np.cumsum([0, *(len(d.edits.ids) for d in draws)], dtype=np.int64)
    ids = np.concatenate([NO_EDITS.ids, *(d.edits.ids for d in draws)])
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab:
        raise ValueError(f"edits of token ids outside of 0 .. {vocab - 1}")
    factors = np.concatenate([NO_EDITS.factors, *(d.edits.factors for d in draws)])
    offsets = np.concatenate([NO_EDITS.offsets, *(d.edits.offsets for d in draws)])
    temperature = np.array([d.temperature for d in draws], np.float64)
    top_p = np.array([d.top_p for d in draws], np.float64)
    min_p = np.array([d.min_p for d in draws], np.float64)
    uniform = np.array([d.uniform for d in draws], np.float64)
    top_k = np.array([d.top_k for d in draws], np.int64)
    wanted = np.array([d.logsumexp for d in draws], np.uint8)
    weighed = np.array([d.weights for d in draws], np.uint8)
    weights = torch.empty(rows, vocab) if weighed.any() else None
    logsumexp, tokens = np.zeros(rows), np.empty(rows, np.int32)
    count = min(threads(), max(rows, 1))
    scratch = torch.empty(count * _native.sample_scratch_bytes(kernels, vocab) + 64, dtype=torch.uint8)
    _native.sample(
        kernels,
        logits.data_ptr(),
        logits.stride(0),
        rows,
        vocab,
        temperature.ctypes.data,
        top_k.ctypes.data,
        top_p.ctypes.data,
        min_p.ctypes.data,
        uniform.ctypes.data,
        first.ctypes.data,
        ids.ctypes.data,
        factors.ctypes.data,
        offsets.ctypes.data,
        wanted.ctypes.data,
        logsumexp.ctypes.data,
        weighed.ctypes.data,
        weights.data_ptr() if weights is not None else 0,
        tokens.ctypes.data,
        (scratch.data_ptr() + 63) // 64 * 64,
        count,
    )
    return Drawn(tokens.tolist(), logsumexp.tolist(), weights)


def edited(logits: npt.NDArray[np.float32], edits: Edits) -> npt.NDArray[np.float32]:
    """Float32 logits `[vocab]` with the edits, computed as `sample` does."""
    x = logits.copy()
    picked = x[edits.ids]
    x[edits.ids] = np.where(picked < 0, picked * edits.factors, picked / edits.factors) + edits.offsets
    return x


def reference_distribution(logits: npt.NDArray[np.float32], draw: Draw) -> npt.NDArray[np.float64]:
    """The distribution that `sample` draws from, float64 `[vocab]`, summing to 1. For temperature > 0.

    Top-k keeps all equals of the k-th largest. Top-p keeps a token if those before it, from the most likely, have less
    than top_p of what is left; of equals the lower id comes first. Min-p comes last and keeps a token that has at least
    min_p of the probability of the best. The best token is always kept.
    """
    x = edited(logits, draw.edits).astype(np.float64)
    x = (x - x.max()) / draw.temperature
    if 0 < draw.top_k < x.size:
        x[x < np.partition(x, -draw.top_k)[-draw.top_k]] = -np.inf
    p = np.exp(x)
    p /= p.sum()
    if draw.top_p < 1:
        order = np.argsort(-p, kind="stable")
        before = p[order].cumsum() - p[order]
        before[0] = 0
        p[order[before >= draw.top_p]] = 0
    p[p < draw.min_p * p.max()] = 0
    return np.asarray(p / p.sum())


def reference_sample(logits: npt.NDArray[np.float32], draw: Draw) -> int:
    """The token that `sample` takes, in float64."""
    if draw.temperature == 0:
        return int(edited(logits, draw.edits).argmax())
    cumulated = reference_distribution(logits, draw).cumsum()
    return int(np.searchsorted(cumulated, draw.uniform * cumulated[-1], side="right"))
