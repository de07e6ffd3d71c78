from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from thresher.attention.sparse import BudgetMethod, Rank, Shape, Stated
from thresher.errors import UsageError


@dataclass(frozen=True)
class SnapKV(BudgetMethod):
    """The rows that the prompt's last queries attended to most, chosen once, and all that is generated; SnapKV.

    observe: queries that vote. pool: width of the max-pooling of their votes along the text, odd. One choice for a
    KV head. Rows that are not chosen stay in the cache (they are not read): this measures the choice, not the
    memory saved. As a view for drafts it is chosen anew every 64 tokens, by the weights of the passes that verify.
    """

    name: ClassVar[str] = "snapkv"
    paper: ClassVar[str] = "https://arxiv.org/abs/2404.14469"
    rank: ClassVar[Rank] = Rank.FIXED
    shared: ClassVar[bool] = True

    observe: int = 32
    pool: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.observe < 1:
            raise UsageError(f"snapkv, observe={self.observe}: give 1 or more queries")
        if self.pool < 1 or self.pool % 2 == 0:
            raise UsageError(f"snapkv, pool={self.pool}: give an odd number")

    @property
    def grows(self) -> bool:
        return False

    @property
    def segment(self) -> int:
        return 1 << 30

    def index_key(self) -> str:
        return f"snapkv,budget={self.budget},observe={self.observe},pool={self.pool},{super().index_key()}"

    def block_arrays(self, n: int, shape: Shape) -> Stated:
        return super().block_arrays(n, shape) | {"keep": (torch.int64, (n // 64,))}

    def choose(
        self, queries: Callable[[int], torch.Tensor], keys: torch.Tensor, context: int, layers: list[int], shape: Shape
    ) -> torch.Tensor:
        """bool `[planes, n]` of the keys `[planes, n, head_dim]` that are kept; queries(n) gives the last n of the
        prompt as `[layers, n, q_heads, head_dim]`."""
        q = queries(self.observe)[layers].float()
        observed, dim = q.shape[1], shape.heads.head_dim
        planes = keys.shape[0]
        grouped = q.view(-1, observed, shape.heads.kv_heads, shape.group, dim).permute(0, 2, 3, 1, 4)
        scores = torch.bmm(grouped.reshape(planes, -1, dim), keys.float().transpose(1, 2)) * dim**-0.5
        return self.elect(scores.softmax(dim=-1).mean(dim=1), context)

    def elect(self, votes: torch.Tensor, context: int) -> torch.Tensor:
        """bool `[planes, n]` of the keys that are kept, by how much they were attended to: float `[planes, n]`."""
        n = votes.shape[1]
        width = min(self.pool, 2 * n - 1)  # as far as from one end to the other
        pooled = F.max_pool1d(votes[:, None], width, stride=1, padding=width // 2)[:, 0]
        kept = pooled.topk(min(self.budget_tokens(context), n), dim=-1).indices
        return torch.zeros(votes.shape, dtype=torch.bool).scatter_(1, kept, True)


def pack_marks(marks: torch.Tensor) -> torch.Tensor:
    """bool `[planes, n]` -> int64 `[planes, n / 64]`, the first in the lowest bit."""
    bits: torch.Tensor = marks.view(marks.shape[0], -1, 64).long() << torch.arange(64)
    return bits.sum(-1)
