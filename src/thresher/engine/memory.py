"""One account of the memory that keys, values and indexes take, whoever holds them."""

import weakref
from collections.abc import Iterable

from thresher.attention.index import Index
from thresher.cache.sequence import KVSequence, resident_bytes


def held_bytes(sequences: Iterable[KVSequence]) -> int:
    """Bytes of rows and indexes in memory: what sequences share counts once, what lies in files not at all."""
    listed = list(sequences)
    indexes = [s.index for s in listed if isinstance(s.index, Index)]
    blocks = {id(block): block for index in indexes for block in index.blocks}
    frozen = {id(t): t for index in indexes for t in index.frozen.values()}
    return (
        resident_bytes(listed)
        + sum(block.bytes for block in blocks.values() if not block.mapped)
        + sum(t.numel() * t.element_size() for t in frozen.values())
    )


class MemoryAccount:
    """A budget in bytes: what contexts hold while they live, and what running requests may come to hold."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._held: weakref.WeakSet[KVSequence] = weakref.WeakSet()
        self._promised: dict[int, int] = {}

    def hold(self, sequence: KVSequence) -> None:
        """Count a sequence for as long as somebody has it."""
        self._held.add(sequence)

    def promise(self, key: int, size: int) -> None:
        """Set aside bytes under a key; 0 ends it."""
        if size:
            self._promised[key] = size
        else:
            self._promised.pop(key, None)

    @property
    def held(self) -> int:
        """Bytes of the sequences that are counted."""
        return held_bytes(self._held)

    @property
    def free(self) -> int:
        """Bytes that may still be promised; negative if contexts have outgrown the budget."""
        return self.budget - self.held - sum(self._promised.values())
