from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from thresher.attention.sparse import Rank, Shape, SparseMethod, Take, amount_tokens, check_amount
from thresher.errors import UsageError

MOST_DRAWS = 10**6  # a step takes as long as its draws


@dataclass(frozen=True)
class Sample(SparseMethod):
    """Oracle sampling: draws rows by their exact attention weights and averages their values; MagicPIG, section 3.

    draws: independent draws of a query head among the rows between sinks and window (which are weighed exactly, as
    is the total weight of the others), or a share of the context below 1. Unbiased. Reads all keys, so it is no faster
    than dense.
    """

    name: ClassVar[str] = "sample"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.16179"
    rank: ClassVar[Rank] = Rank.KEYS
    own: ClassVar[bool] = True

    dense_below: int = 0  # it never wins: no length to wait for
    draws: float = 256
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_amount(self.name, "draws", self.draws)
        if self.draws > MOST_DRAWS:
            raise UsageError(f"sample, draws={self.draws}: give at most {MOST_DRAWS} draws")

    @property
    def indexed(self) -> bool:
        return False

    def index_key(self) -> str:
        return f"sinks={self.sinks}"

    def budget_tokens(self, context: int) -> int:
        return amount_tokens(self.draws, context)

    def parameters(self, shape: Shape, frozen: dict[str, torch.Tensor]) -> dict[str, Any]:
        return super().parameters(shape, frozen) | {"take": Take.DRAW, "seed": self.seed}

    def index_bytes(self, candidates: int, shape: Shape) -> float:
        return candidates * shape.heads.head_dim * shape.dtype.itemsize
