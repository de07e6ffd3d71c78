from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from thresher.attention.sparse import (
    GROUP,
    Rank,
    Shape,
    SparseMethod,
    Stated,
    amount_tokens,
    check_amount,
    cluster_arrays,
)
from thresher.attention.tail import cluster_rows
from thresher.errors import UsageError


@dataclass(frozen=True)
class Clusters(SparseMethod):
    """Clusters of keys ranked by their centroids; the best are read, the others answered by centroid; RetroInfer.

    budget: tokens that a query head's clusters may hold, or a share of the context below 1. tokens: of a cluster,
    on average.
    """

    name: ClassVar[str] = "clusters"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.02922"
    rank: ClassVar[Rank] = Rank.CLUSTERS

    budget: float = 256
    tokens: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_amount(self.name, "budget", self.budget)
        if not 1 <= self.tokens <= GROUP:
            raise UsageError(f"clusters, tokens={self.tokens}: give 1 to {GROUP} tokens a cluster")

    def index_key(self) -> str:
        return f"clusters,tokens={self.tokens},sinks={self.sinks}"

    def budget_tokens(self, context: int) -> int:
        return amount_tokens(self.budget, context)

    def build(
        self, keys: torch.Tensor, values: torch.Tensor, frozen: dict[str, torch.Tensor], shape: Shape
    ) -> dict[str, torch.Tensor]:
        arrays = cluster_rows(keys, values, max(1, keys.shape[1] // self.tokens))
        return arrays | {"rows": arrays["means"][:, :, 0].contiguous()}

    def block_arrays(self, n: int, shape: Shape) -> Stated:
        clusters = max(1, n // self.tokens)
        return cluster_arrays(clusters, n, shape) | {"rows": (shape.dtype, (clusters, shape.heads.head_dim))}

    def parameters(self, shape: Shape, frozen: dict[str, torch.Tensor]) -> dict[str, Any]:
        return super().parameters(shape, frozen) | {"tail": True}

    def index_bytes(self, candidates: int, shape: Shape) -> float:
        dim = shape.heads.head_dim
        clusters = candidates / self.tokens
        return clusters * (3 * dim * shape.dtype.itemsize + 4) + 2 * candidates  # and which cluster is whose
