from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from thresher.attention.quest import check_unit
from thresher.attention.sparse import BudgetMethod, Rank, Shape, Stated


@dataclass(frozen=True)
class BlockTopK(BudgetMethod):
    """Blocks of tokens ranked by their mean key, one choice for all query heads of a KV head; Kinetics.

    block: tokens of a block, a divisor of 64.
    """

    name: ClassVar[str] = "block_topk"
    paper: ClassVar[str] = "https://arxiv.org/abs/2506.05333"
    rank: ClassVar[Rank] = Rank.ROWS
    shared: ClassVar[bool] = True

    block: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_unit(self.name, "block", self.block)

    def index_key(self) -> str:
        return f"block={self.block},{super().index_key()}"

    def build(
        self, keys: torch.Tensor, values: torch.Tensor, frozen: dict[str, torch.Tensor], shape: Shape
    ) -> dict[str, torch.Tensor]:
        mean = keys.view(keys.shape[0], -1, self.block, keys.shape[2]).float().mean(dim=2)
        return {"rows": mean.to(shape.dtype)} | super().build(keys, values, frozen, shape)

    def block_arrays(self, n: int, shape: Shape) -> Stated:
        return {"rows": (shape.dtype, (n // self.block, shape.heads.head_dim))} | super().block_arrays(n, shape)

    def parameters(self, shape: Shape, frozen: dict[str, torch.Tensor]) -> dict[str, Any]:
        return super().parameters(shape, frozen) | {"unit": self.block}

    def index_bytes(self, candidates: int, shape: Shape) -> float:
        means = candidates / self.block * shape.heads.head_dim * shape.dtype.itemsize
        return means + super().index_bytes(candidates, shape)
