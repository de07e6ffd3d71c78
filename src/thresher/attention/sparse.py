"""What all sparse methods share: rows that are read in any case, layers that stay dense, an index, and a cost."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import IntEnum
from functools import lru_cache
from numbers import Integral
from typing import Any, ClassVar

import torch

from thresher.attention.base import AttentionMethod
from thresher.attention.tail import cluster_count, cluster_rows, query_stretch
from thresher.errors import UsageError
from thresher.kernels.attention import Heads
from thresher.machine.cost import Cost, ModelShape, attention_cost

Planes = Callable[[], torch.Tensor]
Stated = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # dtype and shape of named arrays, for each plane

RECENT_QUERIES = 256  # tokens whose queries show what matters of a key
GROUP = 64  # tokens: blocks of an index begin and end at multiples of this
MOST_GROUP = 32  # query heads of a KV head

# A row that is gathered costs about as much as this many that are swept: random rows of 128 to 512 bytes come at
# half the bandwidth. And a sparse layer has steps that a dense one has not: about 20 us, in which a sweep reads
# this much.
GATHER_PENALTY = 2.0
STEP_BYTES = 600_000


class Rank(IntEnum):
    """What candidates are ranked by; the numbers of csrc/api/kernels.h."""

    NONE = 0
    KEYS = 1
    SIGNS = 2
    ROWS = 3
    CLUSTERS = 4
    TABLES = 5
    FIXED = 6


class Take(IntEnum):
    """What is read of what is ranked; the numbers of csrc/api/kernels.h."""

    TOP = 0
    DRAW = 1
    VERIFY = 2


@dataclass(frozen=True)
class Shape:
    """What an index is built for: attention heads and the dtype of the KV cache."""

    heads: Heads
    dtype: torch.dtype

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.heads.q_heads // self.heads.kv_heads


@dataclass(frozen=True)
class SparseMethod(AttentionMethod):
    """Reads the first `sinks` rows, the last `window` rows and what it chooses between them.

    sinks, window: tokens. dense_layers: layers that stay dense, as in 0+1; `none`. dense_below: contexts up to this
    many tokens stay dense; -1: up to where the method starts to win by its cost.
    """

    exact: ClassVar[bool] = False
    rank: ClassVar[Rank] = Rank.NONE
    own: ClassVar[bool] = False  # a query head weighs only what it chose itself
    shared: ClassVar[bool] = False  # the query heads of a group choose together

    sinks: int = 4
    window: int = 64
    dense_layers: str = "0+1"
    dense_below: int = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sinks < 0 or self.window < 1:
            raise UsageError(f"{self}: sinks must be 0 or more, window 1 or more")
        if getattr(self, "seed", 0) < 0:
            raise UsageError(f"{self}: seed must be 0 or more")
        self.dense_layer_numbers()

    # Blocks of the index -------------------------------------------------------------------------------------------

    @property
    def indexed(self) -> bool:
        """Whether candidates come in blocks that were looked at beforehand."""
        return True

    @property
    def segment(self) -> int:
        """Tokens of the largest block."""
        return 8192

    @property
    def grows(self) -> bool:
        """Whether new blocks follow the first one."""
        return True

    def index_key(self) -> str:
        """Methods with the same key can use each other's index."""
        raise NotImplementedError

    def freeze(self, keys: torch.Tensor, queries: Planes, shape: Shape) -> dict[str, torch.Tensor]:
        """What the first keys `[planes, n, head_dim]` of a sequence settle for all later ones, `[planes, ...]` each.

        A plane is one KV head of one layer. queries: gives the group's recent queries `[planes, m, head_dim]`.
        """
        return {}

    def build(
        self, keys: torch.Tensor, values: torch.Tensor, frozen: dict[str, torch.Tensor], shape: Shape
    ) -> dict[str, torch.Tensor]:
        """The arrays of a block, `[planes, ...]` each, from keys and values `[planes, n, head_dim]`; n a multiple
        of 64."""
        return {}

    def frozen_arrays(self, shape: Shape) -> Stated:
        """What `freeze` gives, without doing it."""
        return {}

    def block_arrays(self, n: int, shape: Shape) -> Stated:
        """What a block of n tokens has, without building it."""
        return {}

    def parameters(self, shape: Shape, frozen: dict[str, torch.Tensor]) -> dict[str, Any]:
        """What the kernels need to know: `Method` of csrc/api/kernels.h. Tensors stand for their addresses."""
        return {"rank": self.rank, "own": self.own, "shared": self.shared, "row_dim": shape.heads.head_dim}

    def budget_tokens(self, context: int) -> int:
        """Tokens that each query head (or group, if it chooses together) takes of the candidates."""
        return 0

    def check(self, shape: Shape) -> None:
        """Raises UsageError if the method cannot run with such heads."""
        if shape.group > MOST_GROUP:
            raise UsageError(
                f"{self.name}: {shape.group} query heads to a KV head; at most {MOST_GROUP} can share a reading"
            )

    # Cost ------------------------------------------------------------------------------------------------------------

    def index_bytes(self, candidates: int, shape: Shape) -> float:
        """Bytes of the index that one KV head of one layer reads in a step."""
        return 0.0

    def rows_read(self, candidates: int, shape: Shape) -> float:
        """Expected candidates that are read for one KV head (the union over its query heads)."""
        chosen = min(candidates, self.budget_tokens(candidates))
        return min(float(candidates), chosen * (1 if self.shared else union_factor(shape.group)))

    def cost(self, shape: ModelShape, context: int) -> Cost:
        index_shape = shape_of(shape)
        dense = len([n for n in self.dense_layer_numbers() if n < shape.layers])
        share = (shape.layers - dense) / shape.layers
        candidates = max(0, context - self.sinks - self.window)
        if context <= self.least_context(shape) or not candidates:
            return attention_cost(shape, context)
        rows = context - candidates + self.rows_read(candidates, index_shape)
        index = (shape.layers - dense) * shape.kv_heads * self.index_bytes(candidates, index_shape)
        return (
            attention_cost(shape, context).times(1 - share)
            + attention_cost(shape, rows).times(share)
            + Cost(2 * index, index)
        )

    @lru_cache  # noqa: B019 (frozen and small)
    def least_context(self, shape: ModelShape) -> int:
        """Contexts up to this many tokens are read densely: there the method would read as much, or take as long."""
        if self.dense_below >= 0:
            return self.dense_below
        index_shape = shape_of(shape)
        row = 2 * shape.head_dim * shape.value_bytes
        context = 256
        while context < 1 << 24:
            candidates = max(0, context - self.sinks - self.window)
            index = self.index_bytes(candidates, index_shape)
            rows = context - candidates + GATHER_PENALTY * self.rows_read(candidates, index_shape)
            if shape.kv_heads * (index + rows * row) + STEP_BYTES < shape.kv_heads * context * row:
                return context
            context *= 2
        return context

    # Parameters ------------------------------------------------------------------------------------------------------

    def dense_layer_numbers(self) -> tuple[int, ...]:
        if self.dense_layers == "none":
            return ()
        try:
            numbers = tuple(int(part) for part in str(self.dense_layers).split("+"))
        except ValueError:
            numbers = (-1,)
        if min(numbers) < 0:
            raise UsageError(
                f"{self.name}, dense_layers={self.dense_layers}: give numbers of layers as in 0+1, or none"
            )
        return numbers


@dataclass(frozen=True)
class BudgetMethod(SparseMethod):
    """A sparse method that reads the best of what it ranks.

    budget: tokens a query head chooses, or a share of the context below 1; 1 is one token, and 1.0 is refused as it
    could be either. union: 1, every query head weighs all that its group reads, which costs no memory traffic; 0,
    only what it chose itself. tail: centroids a block that answer for what is not read (0: it is dropped): the mean
    key and mean value of a whole cluster, as often as rows of it are not read.
    """

    budget: float = 256
    union: int = 1
    tail: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_amount(self.name, "budget", self.budget)
        if self.union not in (0, 1):
            raise UsageError(f"{self.name}, union={self.union}: give 0 or 1")
        if not 0 <= self.tail <= 4096:
            raise UsageError(f"{self.name}, tail={self.tail}: give 0 to 4096 centroids")
        if self.tail and not self.union and not self.shared:
            raise UsageError(f"{self.name}: a tail needs union=1, as its centroids are made for a whole group")

    def budget_tokens(self, context: int) -> int:
        return amount_tokens(self.budget, context)

    def index_key(self) -> str:
        return f"{self.name},sinks={self.sinks},tail={self.tail}"

    def parameters(self, shape: Shape, frozen: dict[str, torch.Tensor]) -> dict[str, Any]:
        own = not self.union and not self.shared
        return super().parameters(shape, frozen) | {"own": own, "tail": self.tail > 0}

    def freeze(self, keys: torch.Tensor, queries: Planes, shape: Shape) -> dict[str, torch.Tensor]:
        return {"stretch": query_stretch(queries(), 0.5)} if self.tail else {}

    def build(
        self, keys: torch.Tensor, values: torch.Tensor, frozen: dict[str, torch.Tensor], shape: Shape
    ) -> dict[str, torch.Tensor]:
        return tail_rows(self.tail, keys, values, frozen)

    def frozen_arrays(self, shape: Shape) -> Stated:
        return tail_frozen(self.tail, shape)

    def block_arrays(self, n: int, shape: Shape) -> Stated:
        return tail_arrays(self.tail, n, shape)

    def index_bytes(self, candidates: int, shape: Shape) -> float:
        blocks = -(-candidates // self.segment)
        return min(self.tail * blocks, candidates / GROUP) * centroid_bytes(shape) if self.tail else 0.0


def check_amount(name: str, parameter: str, amount: float) -> None:
    """An amount is a whole number of tokens, or a share of the context above 0 and below 1. Raises UsageError if it is
    neither, as 2.5 and 1.0 are: next to 0.99, which is nearly all, the latter would not look like one token."""
    if not (0 < amount < 1 or (isinstance(amount, Integral) and amount >= 1)):
        raise UsageError(f"{name}, {parameter}={amount}: give whole tokens (1, 256), or a share of the context below 1")


def amount_tokens(amount: float, context: int) -> int:
    """The tokens that an amount (see `check_amount`) is in a context of so many."""
    return int(amount) if amount >= 1 else max(1, round(amount * context))


def union_factor(group: int) -> float:
    """Rows that a group reads for each that one of its query heads chooses: 2.0 for three heads (docs/results.md)."""
    return 1 + 0.5 * (group - 1)


def centroid_bytes(shape: Shape) -> int:
    return 2 * shape.heads.head_dim * shape.dtype.itemsize + 4


def tail_rows(
    wanted: int, keys: torch.Tensor, values: torch.Tensor, frozen: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The arrays of a tail of `wanted` centroids a block, none if 0."""
    return cluster_rows(keys, values, cluster_count(wanted, keys.shape[1]), frozen["stretch"]) if wanted else {}


def tail_frozen(wanted: int, shape: Shape) -> Stated:
    dim = shape.heads.head_dim
    return {"stretch": (torch.float32, (dim, dim))} if wanted else {}


def tail_arrays(wanted: int, n: int, shape: Shape) -> Stated:
    """What `tail_rows` gives."""
    return cluster_arrays(cluster_count(wanted, n), n, shape) if wanted else {}


def cluster_arrays(clusters: int, n: int, shape: Shape) -> Stated:
    """What `cluster_rows` gives."""
    return {
        "means": (shape.dtype, (clusters, 2, shape.heads.head_dim)),
        "counts": (torch.int32, (clusters,)),
        "assigned": (torch.uint16, (n,)),
    }


def shape_of(shape: ModelShape) -> Shape:
    dtype = torch.float32 if shape.value_bytes == 4 else torch.bfloat16
    return Shape(Heads(shape.q_heads, shape.kv_heads, shape.head_dim), dtype)


def describe_parameters(method: type[AttentionMethod]) -> dict[str, Any]:
    """Names and defaults of a method's parameters."""
    return {f.name: f.default for f in fields(method)}
