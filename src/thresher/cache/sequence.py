"""The KV cache of one sequence: shared read-only segments, then a private tail that grows without being copied.

Of models with recurrent layers a sequence also carries their state, which cannot be taken apart by position as rows
can: snapshots of it are kept, for every one of the last tokens and at checkpoints, so that going back to any length
costs no more than to compute again what came after the snapshot before it (`decoding/runner.py`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch

from thresher.cache.mapping import MappedFile
from thresher.errors import CapacityError

MIN_TAIL = 64  # tokens
RECENT_STATES = 32  # last positions whose state is kept
STATE_EVERY = 2048  # positions whose state is kept for good


@dataclass(frozen=True)
class KVLayout:
    """Shape of one token's keys and values: `[layers, 2, kv_heads, head_dim]` of `dtype`; keys after RoPE.

    state: (layers, float32 numbers of a layer) of a sequence's recurrent state; (0, 0): the model has none.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    state: tuple[int, int] = (0, 0)

    @property
    def bytes_per_token(self) -> int:
        return self.layers * 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def state_bytes(self) -> int:
        """Of one snapshot."""
        return 4 * self.state[0] * self.state[1]

    def states_of(self, begin: int, end: int) -> list[int]:
        """Positions in (begin, end] whose state is worth keeping when tokens [begin, end) have come."""
        if not self.state_bytes:
            return []
        first = max(begin, end - RECENT_STATES) if end - begin <= RECENT_STATES else end - 1
        checkpoints = range((begin // STATE_EVERY + 1) * STATE_EVERY, first + 1, STATE_EVERY)
        return [*checkpoints, *range(first + 1, end + 1)]

    def states_bytes(self, tokens: int) -> int:
        """Of all snapshots that a sequence of so many tokens may hold."""
        return self.state_bytes * (RECENT_STATES + tokens // STATE_EVERY + 1)

    def empty(self, capacity: int) -> torch.Tensor:
        """Uninitialised storage `[layers, 2, kv_heads, capacity, head_dim]`; pages cost nothing until written.

        Raises CapacityError if the machine has no memory for it.
        """
        try:
            return torch.empty(self.layers, 2, self.kv_heads, capacity, self.head_dim, dtype=self.dtype)
        except RuntimeError:
            size = capacity * self.bytes_per_token
            raise CapacityError(f"no memory for {capacity} tokens of KV cache ({size / 2**20:.0f} MiB)") from None


@dataclass(eq=False)
class Segment:
    """Storage `[layers, 2, kv_heads, capacity, head_dim]`, in memory or in a mapped file."""

    data: torch.Tensor
    file: MappedFile | None = None


@dataclass
class _Part:
    segment: Segment
    used: int


class SequenceIndex(Protocol):
    """What attention methods keep beside a sequence; it follows the sequence."""

    def crop(self, length: int) -> None: ...

    def fork(self) -> "SequenceIndex": ...


class KVSequence:
    """Cached tokens of one sequence. `index` belongs to the attention method that reads it; `states` are snapshots of
    the recurrent state, float32 `[layers, size]` by the number of tokens that they follow. Snapshots are never written.

    Rows are never moved: a full tail stays where it is and the next rows go to a new one, as large as all before. A
    segment that another sequence may see (after `fork`) or that lies in a file is never written again.
    """

    def __init__(self, layout: KVLayout, segment: Segment | None = None, token_ids: Sequence[int] = ()) -> None:
        """An empty sequence, or one whose rows 0 .. len(token_ids) are given by a read-only segment."""
        self.layout = layout
        self.token_ids = list(token_ids)
        self._parts = [_Part(segment, len(self.token_ids))] if segment and self.token_ids else []
        self._writable = False  # whether the last part may take more rows
        self.index: SequenceIndex | None = None
        self.states: dict[int, torch.Tensor] = {}

    @property
    def length(self) -> int:
        """Cached tokens."""
        return len(self.token_ids)

    def segments(self) -> list[tuple[torch.Tensor, int]]:
        """`(data, used rows)` in order of position."""
        return [(p.segment.data, p.used) for p in self._parts if p.used]

    def reserve(self, n: int, exact: bool = False) -> None:
        """Make room for n more rows in one piece behind the used rows of the tail.

        A new tail holds as many rows as the whole sequence (at least n), or exactly n.
        """
        if self._writable:
            tail = self._parts[-1]
            if tail.segment.data.shape[3] - tail.used >= n:
                return
            if tail.used == 0:
                self._parts.pop()
        capacity = n if exact else max(n, MIN_TAIL, self.length)
        self._parts.append(_Part(Segment(self.layout.empty(capacity)), 0))
        self._writable = True

    def incoming(self, n: int) -> list[tuple[torch.Tensor, int]]:
        """`segments()` as they will be after n reserved rows are written: the last one takes them."""
        if not self._writable:
            raise ValueError("reserve first")
        tail = self._parts[-1]
        before = [(p.segment.data, p.used) for p in self._parts[:-1] if p.used]
        return [*before, (tail.segment.data, tail.used + n)]

    @property
    def state_length(self) -> int:
        """Tokens up to the last snapshot; from there on the recurrent state is not known. Without one: all."""
        return max(self.states, default=0) if self.layout.state_bytes else self.length

    def state(self) -> torch.Tensor:
        """The last snapshot; zeros before the first token."""
        return self.states.get(self.state_length, torch.zeros(self.layout.state, dtype=torch.float32))

    def advance(self, token_ids: Sequence[int], states: Mapping[int, torch.Tensor] = MappingProxyType({})) -> None:
        """The reserved rows now hold the keys and values of these tokens. states: snapshots at positions among them."""
        tail = self._parts[-1] if self._writable else None
        if tail is None or tail.used + len(token_ids) > tail.segment.data.shape[3]:
            raise ValueError("advance past the reserved rows")
        tail.used += len(token_ids)
        self.token_ids.extend(token_ids)
        if states:
            old = self.length - RECENT_STATES
            kept = {p: s for p, s in self.states.items() if p > old or p % STATE_EVERY == 0}
            self.states = kept | dict(states)

    def append(self, token_ids: Sequence[int], kv: torch.Tensor) -> None:
        """Copy in rows `[layers, 2, kv_heads, n, head_dim]`."""
        n = len(token_ids)
        if kv.shape[3] != n:
            raise ValueError(f"{n} tokens but {kv.shape[3]} rows")
        self.reserve(n)
        tail = self._parts[-1]
        tail.segment.data[:, :, :, tail.used : tail.used + n] = kv
        self.advance(token_ids)

    def crop(self, length: int) -> None:
        """Forget all tokens from position `length` on. Shared rows stay for the others."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot crop {self.length} tokens to {length}")
        surplus = self.length - length
        del self.token_ids[length:]
        if self.index and surplus:
            self.index.crop(length)
        self.states = {p: s for p, s in self.states.items() if p <= length}
        while surplus:
            last = self._parts[-1]
            cut = min(surplus, last.used)
            last.used -= cut
            surplus -= cut
            if surplus:
                self._parts.pop()
                self._writable = False

    def fork(self) -> "KVSequence":
        """A second sequence with the same tokens, sharing all rows; both go on in tails of their own."""
        self._parts = [p for p in self._parts if p.used]
        self._writable = False
        other = KVSequence(self.layout)
        other.token_ids = list(self.token_ids)
        other._parts = [_Part(p.segment, p.used) for p in self._parts]
        other.index = self.index.fork() if self.index else None
        other.states = dict(self.states)
        return other

    def check(self) -> None:
        """Raises KVFileDamagedError if rows that were read since may not have been those of the file they lie in."""
        for part in self._parts:
            if part.segment.file:
                part.segment.file.check()

    def view(self, length: int) -> "KVSequence":
        """The first `length` tokens as a sequence to read along in for a moment: it shares rows without freezing the
        tail as `fork` does, so it holds only until this sequence is cropped."""
        other = KVSequence(self.layout)
        for part in self._parts:
            if used := min(part.used, length - other.length):
                other._parts.append(_Part(part.segment, used))
                other.token_ids += self.token_ids[other.length : other.length + used]
        other.states = {p: s for p, s in self.states.items() if p <= length}
        return other

    def rows(self, begin: int, end: int, layers: Sequence[int] | None = None) -> torch.Tensor:
        """A copy of positions [begin, end) of all or some layers: `[layers, 2, kv_heads, end - begin, head_dim]`."""
        pieces, start = [], 0
        for data, used in self.segments():
            low, high = max(begin - start, 0), min(end - start, used)
            if low < high:
                rows = data[:, :, :, low:high]
                pieces.append(rows if layers is None else rows[list(layers)])
            start += used
        return torch.cat(pieces, dim=3) if pieces else self.layout.empty(0)


def resident_bytes(sequences: Iterable[KVSequence]) -> int:
    """Bytes of memory allocated for these sequences: what they share counts once, what lies in files not at all."""
    listed = list(sequences)
    segments = {id(p.segment): p.segment for s in listed for p in s._parts}
    states = {id(t): t for s in listed for t in s.states.values()}
    return sum(s.data.numel() * s.data.element_size() for s in segments.values() if s.file is None) + sum(
        t.numel() * t.element_size() for t in states.values()
    )
