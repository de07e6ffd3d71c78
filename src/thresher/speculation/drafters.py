"""Who proposes the next tokens: a model (the target with a sparse view of its cache, or a smaller one), or the text."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from thresher.attention.base import AttentionMethod
from thresher.cache.sequence import KVSequence
from thresher.decoding.runner import Runner, Work
from thresher.decoding.sampler import SampleState, Stream
from thresher.kernels.sampling import sample
from thresher.speculation.policy import Chunk
from thresher.speculation.verify import Draft

KEPT = 4  # sequences of a draft model that are kept when their samples have ended
CATCH_UP = 512  # tokens that a draft model reads of a prompt in a step


@dataclass(frozen=True)
class Wanted:
    """A draft that is asked for: `gamma` tokens behind `sequence` and the tokens `behind` it that are not in the cache.

    method: how the drafting model reads the cache. matching: tokens will be compared with what the target draws, so
    they are drawn with the same random numbers. ends: tokens that end an answer, and a draft.
    """

    sequence: KVSequence
    behind: Sequence[int]
    gamma: int
    state: SampleState
    method: AttentionMethod | None
    matching: bool
    ends: frozenset[int]


def draft(
    runner: Runner,
    wanted: Sequence[Wanted],
    vocab_size: int,
    observe: Callable[[list[Chunk], float], None] = lambda chunks, seconds: None,
) -> list[Draft]:
    """Drafts of a model for several samples in common passes, shorter ones dropping out. The sequences then hold the
    tokens `behind` them and the drafts but for their last tokens; states do not change. vocab_size: of the target,
    whose token ids end there. observe: is told of each pass how long it took.
    """
    drafts = [Draft() for _ in wanted]
    try:
        for i in range(max(w.gamma for w in wanted)):
            active = [
                (w, d)
                for w, d in zip(wanted, drafts, strict=True)
                if len(d.token_ids) == i < w.gamma and not (i and d.token_ids[-1] in w.ends)
            ]
            if not active:
                break
            begin = time.perf_counter()
            works = [Work(w.sequence, d.token_ids[-1:] if i else w.behind, 1, w.method, draft=True) for w, d in active]
            chunks = [Chunk(len(work.token_ids), work.sequence.length, work.method) for work in works]
            logits = runner.run(works)[:, :vocab_size]
            draws = [w.state.draw(Stream.TOKEN if w.matching else Stream.DRAFT, weights=_weighed(w)) for w, _ in active]
            drawn = sample(logits, draws)
            for row, (w, d) in enumerate(active):
                token = drawn.tokens[row]
                if token < 0:  # not numbers: if it is the target's fault, verification says so
                    continue
                d.token_ids.append(token)
                d.weights.append(drawn.weights[row].numpy() if drawn.weights is not None and _weighed(w) else None)
                w.state.push(token)
            observe(chunks, time.perf_counter() - begin)
    finally:
        for w, d in zip(wanted, drafts, strict=True):
            w.state.pop(len(d.token_ids))
    return drafts


def _weighed(w: Wanted) -> bool:
    return not w.matching and w.state.params.temperature > 0


class Lookup:
    """Prompt lookup: what followed the last tokens where they came before (n-grams of the text itself)."""

    def __init__(self, most: int) -> None:
        """most: tokens that are looked for, fewer if they are not found."""
        self._most = most
        self._ids = np.empty(0, np.int32)
        self._used = 0

    def draft(self, token_ids: Sequence[int], pending: int, gamma: int) -> Draft:
        """What may follow `token_ids` and `pending`: the continuation of the latest place with the longest match."""
        ids = self._follow(token_ids, pending)
        n = ids.size
        found = np.flatnonzero(ids[: n - 1] == pending)  # where a match would end
        best = 0
        for length in range(1, self._most + 1):
            found = found[found >= length - 1]
            if length > 1:
                found = found[ids[found - length + 1] == ids[n - length]]
            if not found.size:
                break
            best = int(found[-1]) + 1
        following = ids[best : best + gamma].tolist() if best else []
        return Draft(following, [None] * len(following))

    def _follow(self, token_ids: Sequence[int], pending: int) -> npt.NDArray[np.int32]:
        """The tokens as an array: those from before are kept, as answers only grow."""
        n = len(token_ids)
        if n + 1 > self._ids.size:
            grown = np.empty(2 * n + 64, np.int32)
            grown[: self._used] = self._ids[: self._used]
            self._ids = grown
        self._ids[self._used : n] = token_ids[self._used :]
        self._used = n
        self._ids[n] = pending
        return self._ids[: n + 1]


class DraftModel:
    """Another, smaller model of the same vocabulary, with a cache of its own for each sample."""

    def __init__(self, runner: Runner, method: AttentionMethod | None) -> None:
        self.runner = runner
        self.method = method
        self._sequences: dict[object, tuple[KVSequence, int]] = {}  # and how many tokens are the target's
        self._ended: list[KVSequence] = []  # the latest last: a next question goes on from the same document

    def behind(self, key: object, token_ids: Sequence[int], pending: int) -> list[int]:
        """What the sample's sequence here has not read of the target's tokens; drafts that fell are forgotten."""
        known = self._sequences.get(key)
        if known is None:
            others = [*self._ended, *(s for s, _ in self._sequences.values())]
            best = max(others, key=lambda s: _common(s.token_ids, token_ids, 0), default=None)
            known = (best.fork() if best is not None else KVSequence(self.runner.layout)), 0
        sequence, agreed = known
        agreed = _common(sequence.token_ids, token_ids, agreed)
        sequence.crop(agreed)
        self._sequences[key] = sequence, agreed
        return [*token_ids[agreed:], pending]

    def sequence(self, key: object) -> KVSequence:
        return self._sequences[key][0]

    def catch_up(self, key: object, behind: Sequence[int]) -> bool:
        """Read a part of what is behind, if it is much. Whether drafts can begin."""
        if len(behind) <= CATCH_UP // 8:
            return True
        self.runner.run([Work(self.sequence(key), behind[:CATCH_UP], 0)])
        return False

    @property
    def kept(self) -> list[KVSequence]:
        """Of samples that have ended."""
        return list(self._ended)

    def let_go(self) -> None:
        """Forget what is kept."""
        self._ended = []

    def sequences(self) -> list[KVSequence]:
        return [*(s for s, _ in self._sequences.values()), *self._ended]

    def end(self, key: object) -> None:
        """A sample has ended."""
        known = self._sequences.pop(key, None)
        if known is not None:
            self._ended = [*self._ended, known[0]][-KEPT:]


def _common(a: Sequence[int], b: Sequence[int], known: int) -> int:
    """Tokens at the beginning that are the same; the first `known` are."""
    low, high = known, min(len(a), len(b)) + 1  # the first low are the same, the first high are not
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low
