from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from thresher.attention.sparse import GROUP, BudgetMethod, Rank, Shape, Stated
from thresher.errors import UsageError


@dataclass(frozen=True)
class Quest(BudgetMethod):
    """Pages of tokens ranked by an upper bound of their scores, from the least and greatest of each channel; Quest.

    page: tokens of a page, a divisor of 64.
    """

    name: ClassVar[str] = "quest"
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.10774"
    rank: ClassVar[Rank] = Rank.ROWS

    page: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_unit(self.name, "page", self.page)

    def index_key(self) -> str:
        return f"page={self.page},{super().index_key()}"

    def build(
        self, keys: torch.Tensor, values: torch.Tensor, frozen: dict[str, torch.Tensor], shape: Shape
    ) -> dict[str, torch.Tensor]:
        least, greatest = keys.view(keys.shape[0], -1, self.page, keys.shape[2]).aminmax(dim=2)
        return {"rows": torch.cat([least, greatest], dim=-1)} | super().build(keys, values, frozen, shape)

    def block_arrays(self, n: int, shape: Shape) -> Stated:
        rows = (shape.dtype, (n // self.page, 2 * shape.heads.head_dim))
        return {"rows": rows} | super().block_arrays(n, shape)

    def parameters(self, shape: Shape, frozen: dict[str, torch.Tensor]) -> dict[str, Any]:
        return super().parameters(shape, frozen) | {"unit": self.page, "row_dim": 2 * shape.heads.head_dim}

    def index_bytes(self, candidates: int, shape: Shape) -> float:
        bounds = candidates / self.page * 2 * shape.heads.head_dim * shape.dtype.itemsize
        return bounds + super().index_bytes(candidates, shape)


def check_unit(name: str, parameter: str, tokens: int) -> None:
    if tokens < 1 or GROUP % tokens:
        raise UsageError(f"{name}, {parameter}={tokens}: give a divisor of {GROUP}")
