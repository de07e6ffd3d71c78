from dataclasses import dataclass
from typing import ClassVar

from thresher.attention.sparse import BudgetMethod, Rank, Shape


@dataclass(frozen=True)
class TopK(BudgetMethod):
    """Exact scores of all keys, then the best: the oracle of methods that rank; Kinetics.

    Reads all keys, so it is no faster than dense; others are held against its choice.
    """

    name: ClassVar[str] = "topk"
    paper: ClassVar[str] = "https://arxiv.org/abs/2506.05333"
    rank: ClassVar[Rank] = Rank.KEYS

    dense_below: int = 0  # it never wins: no length to wait for

    @property
    def indexed(self) -> bool:
        return self.tail > 0

    def index_bytes(self, candidates: int, shape: Shape) -> float:
        keys = candidates * shape.heads.head_dim * shape.dtype.itemsize
        return keys + super().index_bytes(candidates, shape)
