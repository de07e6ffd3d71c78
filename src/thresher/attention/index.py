"""The index of one sequence: what a sparse method knows of the cached keys, in blocks that never change once built."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from thresher.attention.base import AttentionMethod
from thresher.attention.snapkv import SnapKV, pack_marks
from thresher.attention.sparse import GROUP, RECENT_QUERIES, Shape, SparseMethod, Stated
from thresher.cache.sequence import KVSequence
from thresher.errors import ModelError
from thresher.kernels import _native
from thresher.kernels.attention import SparseReading
from thresher.kernels.native import TYPES

_TYPICAL_BLOCK = 2048  # tokens
_PIECE = 1 << 24  # numbers of keys that are looked at together when a block is built

Queries = Callable[[int], torch.Tensor]  # the last n queries of the sequence, [layers, n, q_heads, head_dim]


@dataclass(frozen=True, eq=False)
class Block:
    """Positions [begin, end) and the arrays of the method for them, `[indexed layers * kv_heads, ...]` each."""

    begin: int
    end: int
    arrays: dict[str, torch.Tensor]
    mapped: bool = False  # its arrays lie in a file

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.arrays.values())


@dataclass(frozen=True, eq=False)
class Growth:
    """Blocks up to `target` for an index that has fewer, and what its first block has settled."""

    target: int
    blocks: list[Block]
    frozen: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Readings:
    """What sparse layers have read since the counters were cleared.

    readings: KV heads of layers times steps. rows: read for them. head_rows: weighed, summed over query heads.
    entries: of hash buckets touched. checked, escalated: outputs with an error estimate, and how many of them were
    answered densely.
    """

    readings: int
    rows: int
    head_rows: int
    entries: int
    checked: int
    escalated: int


class Index:
    """Blocks cover positions from the sinks on, in whole groups of 64. What comes after them is read exactly, until
    it is more than the window and enough for a block. Blocks of equal size are merged, so there are few. A fork
    shares them.
    """

    def __init__(self, method: SparseMethod, shape: Shape, layers: int) -> None:
        """Raises UsageError if the method does not run with such heads."""
        method.check(shape)
        self.shape = shape
        dense = method.dense_layer_numbers()
        self.layers = [n for n in range(layers) if n not in dense]
        self._slots = [self.layers.index(n) if n in self.layers else -1 for n in range(layers)]
        self.frozen: dict[str, torch.Tensor] = {}
        self.blocks: list[Block] = []
        self.method = method
        self._make_native()

    def fork(self) -> "Index":
        other = Index(self.method, self.shape, len(self._slots))
        other.frozen = self.frozen
        other.blocks = list(self.blocks)
        other._make_native()
        return other

    def state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """What `restore` needs: JSON values and named arrays."""
        arrays = {f"frozen/{name}": t for name, t in self.frozen.items()}
        for i, block in enumerate(self.blocks):
            arrays |= {f"{i}/{name}": t for name, t in block.arrays.items()}
        return {"method": str(self.method), "blocks": [[b.begin, b.end] for b in self.blocks]}, arrays

    @classmethod
    def restore(
        cls,
        method: SparseMethod,
        shape: Shape,
        layers: int,
        length: int,
        meta: dict[str, Any],
        arrays: dict[str, torch.Tensor],
    ) -> "Index":
        """The index of a sequence of `length` tokens from its `state`. Raises ValueError if anything is not as it would
        have been built, down to the numbers that the kernels use as positions: arrays may come from a stranger."""
        index = cls(method, shape, layers)
        grouped: dict[str, dict[str, torch.Tensor]] = {"frozen": {}}
        for path, array in arrays.items():
            group, _, name = path.partition("/")
            grouped.setdefault(group, {})[name] = array
        index.frozen = grouped.pop("frozen")
        reached = method.sinks
        for i, (begin, end) in enumerate(meta["blocks"]):
            if (
                begin != reached
                or type(end) is not int
                or not begin < end <= length - method.window
                or (end - begin) % GROUP
            ):
                raise ValueError("blocks do not follow each other")
            if end - begin > method.segment:
                raise ValueError("a block larger than the method builds")
            index.blocks.append(Block(reached, end, grouped.pop(str(i), {}), mapped=True))
            reached = end
        if grouped:
            raise ValueError("arrays of blocks that it does not have")
        index._check_arrays()
        index._make_native()
        return index

    def serves(self, method: AttentionMethod | None) -> bool:
        """Whether this index is one that the method can read, with other parameters of choosing perhaps."""
        if not isinstance(method, SparseMethod):
            return False
        same = method.index_key() == self.method.index_key() and method.sinks == self.method.sinks
        return same and method.dense_layer_numbers() == self.method.dense_layer_numbers()

    def use(self, method: SparseMethod, length: int) -> None:
        """Go on with another method that the index serves, on a sequence of `length` tokens."""
        if method != self.method:
            self.method = method
            self._native.set_method(self._parameters())
            self.crop(length)  # its window may be larger

    @property
    def covered(self) -> int:
        """Position after the last block."""
        return self.blocks[-1].end if self.blocks else self.method.sinks

    @property
    def bytes(self) -> int:
        return sum(b.bytes for b in self.blocks) + sum(t.numel() * t.element_size() for t in self.frozen.values())

    def crop(self, length: int) -> None:
        """Forget blocks that reach into the window of `length` tokens: what lies there is read exactly, and the rest of
        their rows until it is built anew."""
        kept = [b for b in self.blocks if b.end <= length - self.method.window]
        if len(kept) < len(self.blocks):
            self.blocks = kept
            if not kept:
                self.frozen = {}  # it was fitted to the text that is gone
            self._hand_over()

    def target(self, length: int) -> int:
        """Where blocks must end before a token reads `length` cached ones.

        The first blocks take all whole groups before the window. Later ones leave out the last of them: it has the
        time of 64 tokens to be built beside the passes, and results do not depend on how long that takes.
        """
        ready = self._ready(length)
        return ready if not self.blocks or ready == self.covered else ready - GROUP

    def ahead(self, length: int) -> int:
        """Where blocks could end by now; more than `target` tells what will be due next."""
        return self._ready(length)

    def _ready(self, length: int) -> int:
        if not self.layers or not self.method.indexed or (self.blocks and not self.method.grows):
            return self.covered
        return self.covered + max(0, (length - self.method.window - self.covered) // GROUP * GROUP)

    def grown(self, sequence: KVSequence, target: int, queries: Queries) -> Growth:
        """What the index will be with blocks up to `target`. Changes nothing, so another thread may do it."""
        blocks, frozen = list(self.blocks), self.frozen
        reached = self.covered
        while reached < target:
            end = reached + min(target - reached, self.method.segment)
            block, frozen = self._build(sequence, reached, end, frozen, queries)
            blocks.append(block)
            while len(blocks) > 1 and self._mergeable(*blocks[-2:]):
                first, second = blocks[-2:]
                blocks[-2:] = [self._build(sequence, first.begin, second.end, frozen, queries)[0]]
            reached = end
            if not self.method.grows:
                break
        return Growth(target, blocks, frozen)

    def adopt(self, growth: Growth) -> None:
        """Go on with what `grown` has made of this index."""
        self.blocks, self.frozen = growth.blocks, growth.frozen
        self._hand_over()

    def extend(self, sequence: KVSequence, queries: Queries) -> None:
        """Build what the next token needs, now."""
        target = self.target(sequence.length)
        if target > self.covered:
            self.adopt(self.grown(sequence, target, queries))

    def renew(self, sequence: KVSequence, votes: torch.Tensor) -> None:
        """Choose anew for a method that chooses once, by what later queries have weighed the rows: float32 `[layers,
        kv_heads, rows]`, summed (see `AttentionPlan.add`). The block then reaches up to the window again; with a tail
        not, as the new rows have no clusters."""
        method = self.method
        if not isinstance(method, SnapKV) or not self.blocks:
            return
        begin, end, arrays = method.sinks, self.covered, self.blocks[0].arrays
        if not method.tail:
            end = begin + (sequence.length - method.window - begin) // GROUP * GROUP
        marks = method.elect(votes[self.layers, :, begin:end].flatten(0, 1), sequence.length)
        self.blocks = [Block(begin, end, arrays | {"keep": pack_marks(marks)})]
        self._hand_over()

    def reading(self, length: int) -> SparseReading | None:
        """How the next token reads `length` cached ones; None if there is nothing to choose from."""
        begin = self.method.sinks
        end = self.covered if self.method.indexed else max(begin, length - self.method.window)
        if end <= begin:
            return None
        return SparseReading(self._native, end, self.method.budget_tokens(length))

    def readings(self) -> Readings:
        return Readings(*self._native.counters())

    def clear_readings(self) -> None:
        self._native.clear_counters()

    def _mergeable(self, first: Block, second: Block) -> bool:
        size = first.end - first.begin
        return second.end - second.begin == size and 2 * size <= self.method.segment

    def _build(
        self, sequence: KVSequence, begin: int, end: int, frozen: dict[str, torch.Tensor], queries: Queries
    ) -> tuple[Block, dict[str, torch.Tensor]]:
        """A block and what is frozen, settled here if it is the first. Some layers at a time, as their keys are
        copied."""
        heads, n = self.shape.heads, end - begin
        step = max(1, _PIECE // (n * heads.kv_heads * heads.head_dim))
        pieces: list[dict[str, torch.Tensor]] = []
        settled: list[dict[str, torch.Tensor]] = []
        for at in range(0, len(self.layers), step):
            chosen = self.layers[at : at + step]
            rows = sequence.rows(begin, end, chosen)
            keys, values = (rows[:, i].flatten(0, 1) for i in (0, 1))
            planes = slice(at * heads.kv_heads, (at + len(chosen)) * heads.kv_heads)
            if frozen:
                of_planes = {name: t[planes] for name, t in frozen.items()}
            else:
                try:
                    of_planes = self.method.freeze(keys, lambda: self._group_queries(queries, chosen), self.shape)  # noqa: B023
                except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                    raise ModelError(
                        f"{self.method.name} finds keys or queries that are not numbers; the model's weights or its KV "
                        "cache are damaged"
                    ) from error
                settled.append(of_planes)
            arrays = self.method.build(keys, values, of_planes, self.shape)
            if isinstance(self.method, SnapKV):
                marks = self.method.choose(queries, keys, sequence.length, chosen, self.shape)
                arrays = arrays | {"keep": pack_marks(marks)}
            pieces.append(arrays)
        return Block(begin, end, _join(pieces)), _join(settled) if settled else frozen

    def _group_queries(self, queries: Queries, layers: list[int]) -> torch.Tensor:
        """Recent queries of each KV head's group, `[planes, m, head_dim]`."""
        heads = self.shape.heads
        q = queries(RECENT_QUERIES)[layers].float()
        return (
            q.view(len(layers), -1, heads.kv_heads, self.shape.group, heads.head_dim)
            .transpose(1, 2)
            .flatten(2, 3)
            .flatten(0, 1)
        )

    def _check_arrays(self) -> None:
        """Raises ValueError unless all arrays are as the method states them, and their numbers as the kernels need."""
        planes = len(self.layers) * self.shape.heads.kv_heads
        _check_stated(self.frozen, self.method.frozen_arrays(self.shape) if self.blocks else {}, planes)
        for block in self.blocks:
            _check_stated(block.arrays, self.method.block_arrays(block.end - block.begin, self.shape), planes)
            check_block(block)

    def _parameters(self) -> dict[str, Any]:
        parameters = self.method.parameters(self.shape, self.frozen)
        return parameters | ({"mean": self.frozen["mean"]} if "mean" in self.frozen else {})

    def _make_native(self) -> None:
        heads = self.shape.heads
        self._native = _native.Index(
            TYPES[self.shape.dtype], heads.q_heads, heads.kv_heads, heads.head_dim, self._slots, self.method.sinks
        )
        self._hand_over()

    def _hand_over(self) -> None:
        self._native.set_blocks([])  # the method is checked against what it reads
        self._native.set_method(self._parameters())
        self._native.set_blocks([(b.begin, b.end, b.arrays) for b in self.blocks])


@lru_cache
def index_bytes_per_token(method: AttentionMethod | None, shape: Shape, layers: int) -> float:
    """About how many bytes the method keeps of a token in all layers; 0 if it has no index."""
    if not isinstance(method, SparseMethod) or method.visibility() or not method.indexed:
        return 0.0
    planes = shape.heads.kv_heads * (layers - len([n for n in method.dense_layer_numbers() if n < layers]))
    stated = method.block_arrays(_TYPICAL_BLOCK, shape).values()
    return planes * sum(math.prod(lengths) * dtype.itemsize for dtype, lengths in stated) / _TYPICAL_BLOCK


def check_block(block: Block) -> None:
    """Raises ValueError if a number that the kernels use as a position leads out of the block's arrays."""
    n = block.end - block.begin
    arrays = {name: t.numpy() for name, t in block.arrays.items() if not t.is_floating_point()}
    if "ids" in arrays and arrays["ids"].max() >= n:
        raise ValueError("ids beyond the block")
    if "assigned" in arrays and arrays["assigned"].max() >= arrays["counts"].shape[1]:
        raise ValueError("clusters that do not exist")
    if "counts" in arrays and not 0 <= arrays["counts"].min() <= arrays["counts"].max() <= n:
        raise ValueError("clusters of more tokens than there are")
    if "heads" in arrays:
        heads = arrays["heads"]
        if (heads[..., 0] != 0).any() or (heads[..., -1] != n).any() or (heads[..., 1:] < heads[..., :-1]).any():
            raise ValueError("buckets out of order")


def _check_stated(got: dict[str, torch.Tensor], stated: Stated, planes: int) -> None:
    """Raises ValueError if arrays are not as stated or hold a number that is not finite."""
    if got.keys() != (stated.keys() if planes else set()):
        raise ValueError("other arrays than the method builds")
    for name, array in got.items():
        dtype, lengths = stated[name]
        if array.dtype != dtype or array.shape != (planes, *lengths):
            raise ValueError(f"{name} of another shape")
        if array.is_floating_point() and not all(bool(plane.isfinite().all()) for plane in array):
            raise ValueError(f"{name} holds what is not a finite number")


def _join(pieces: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([p[name] for p in pieces]).contiguous() for name in pieces[0]} if pieces else {}
