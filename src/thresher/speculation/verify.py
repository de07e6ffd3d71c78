"""Which tokens of a draft stand: those that the target model would have produced itself, in distribution.

Two ways lead there. `matched`: the target's own token is drawn at each position with the random number that plain
decoding draws it with, and the draft stands as far as it is the same; greedily, or with a seed, the answer is then that
of plain decoding, token for token. `rejected`: speculative sampling (Leviathan et al., arXiv 2211.17192; Chen et al.,
arXiv 2302.01318), which accepts more: a token drawn from q stands with probability min(1, p / q), and the first that
falls is replaced by one from what p has more than q. For a token that was not drawn at random (q is all on it) the two
are one: it stands with probability p, and otherwise the target's own draw is from p without it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from thresher.decoding.sampler import Choice, SampleState, Stream, choice_of
from thresher.errors import ModelError
from thresher.kernels.sampling import sample

Weights = npt.NDArray[np.float32]


@dataclass
class Draft:
    """Tokens that may come next. weights: what each was drawn in proportion to, `[vocab]`; None, of all of them, if
    they were not drawn at random but are the only ones that could have been."""

    token_ids: list[int] = field(default_factory=list)
    weights: list[Weights | None] = field(default_factory=list)


@dataclass(frozen=True)
class Verdict:
    """The tokens that come next, at least one; an error in place of the last if its logits are not numbers.

    accepted: of the draft's. chances: for each of the draft's tokens up to the first that fell, how likely it was
    to stand: sum min(p, q), or 0 or 1 where tokens were compared.
    """

    choices: list[Choice | ModelError]
    accepted: int
    chances: list[float]


def verify(logits: torch.Tensor, cases: Sequence[tuple[SampleState, Draft, bool]]) -> list[Verdict]:
    """Judge the drafts of a pass. Float32 logits `[rows, vocab]`: for each case as many rows as its draft has tokens,
    and one: what the target says before each of them, and after the last. A case's bool: whether tokens are only
    compared (`matched`). States do not change."""
    draws = []
    for state, draft, matching in cases:
        weights = any(w is not None for w in draft.weights) and not matching and state.params.temperature > 0
        draws += state.draws_along(draft.token_ids, weights)
    drawn = sample(logits, draws)
    verdicts, row = [], 0
    for state, draft, _ in cases:
        n = len(draft.token_ids)
        rows = range(row, row + n + 1)
        tokens = drawn.tokens[row : row + n + 1]
        if draws[row].weights and min(tokens) >= 0:
            assert drawn.weights is not None
            tokens, chances = rejected(state, draft, drawn.weights[row : row + n].numpy(), tokens[-1])
        else:
            tokens, chances = matched(draft, tokens)
        choices = [
            choice_of(logits[r], t, state.params.logprobs, drawn.logsumexp[r])
            for r, t in zip(rows, tokens, strict=False)
        ]
        verdicts.append(Verdict(choices, len(tokens) - 1, chances))
        row += n + 1
    return verdicts


def matched(draft: Draft, tokens: Sequence[int]) -> tuple[list[int], list[float]]:
    """The target's tokens up to the first that is not the draft's, and whether each of the draft's was right."""
    taken: list[int] = []
    chances: list[float] = []
    for i, token in enumerate(tokens):
        taken.append(token)
        if i == len(draft.token_ids):
            break
        chances.append(float(token == draft.token_ids[i]))
        if not chances[-1]:
            break
    return taken, chances


def rejected(state: SampleState, draft: Draft, target: Weights, last: int) -> tuple[list[int], list[float]]:
    """Speculative sampling: `target` `[tokens of the draft, vocab]` is what the target draws in proportion to, `last`
    its own draw behind the draft."""
    taken: list[int] = []
    chances: list[float] = []
    for i, token in enumerate(draft.token_ids):
        weights = draft.weights[i]
        assert weights is not None
        p, q = _scaled(target[i]), _scaled(weights)
        chances.append(float(np.minimum(p, q).sum()))
        if state.uniform(i, Stream.ACCEPT) * q[token] >= p[token]:
            left = np.maximum(p - q, 0)
            left[token] = 0
            # Nothing is left where p and q are equal but for rounding.
            return [*taken, _drawn(left if left.any() else p, state.uniform(i))], chances
        taken.append(token)
    return [*taken, last], chances


def _scaled(weights: Weights) -> Weights:
    """With sum 1."""
    return np.asarray(weights * np.float32(1 / weights.sum(dtype=np.float64)))


def _drawn(weights: Weights, uniform: float) -> int:
    """A token in proportion to weights."""
    cumulated = weights.cumsum(dtype=np.float64)
    token = int(np.searchsorted(cumulated, uniform * cumulated[-1], side="right"))
    return min(token, int(np.flatnonzero(weights)[-1]))
