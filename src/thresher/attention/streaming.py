from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from thresher.attention.sparse import (
    Planes,
    Shape,
    SparseMethod,
    Stated,
    centroid_bytes,
    tail_arrays,
    tail_frozen,
    tail_rows,
)
from thresher.attention.tail import query_stretch
from thresher.errors import UsageError
from thresher.kernels.attention import Visibility
from thresher.machine.cost import Cost, ModelShape, attention_cost


@dataclass(frozen=True)
class Streaming(SparseMethod):
    """The first tokens (attention sinks) and a window of recent ones; StreamingLLM, sections 3.1 and 3.2.

    Positions stay those of the text: keys are cached after RoPE, and rows outside are not read, not evicted. tail:
    centroids a block that answer for them.
    """

    name: ClassVar[str] = "streaming"
    paper: ClassVar[str] = "https://arxiv.org/abs/2309.17453"

    window: int = 1024
    dense_layers: str = "none"
    tail: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.tail <= 4096:
            raise UsageError(f"streaming, tail={self.tail}: give 0 to 4096 centroids")

    def visibility(self) -> Visibility | None:
        return None if self.tail or self.dense_layers != "none" else Visibility(window=self.window, sinks=self.sinks)

    def index_key(self) -> str:
        return f"streaming,sinks={self.sinks},tail={self.tail}"

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

    def parameters(self, shape: Shape, frozen: dict[str, torch.Tensor]) -> dict[str, Any]:
        return super().parameters(shape, frozen) | {"tail": self.tail > 0}

    def index_bytes(self, candidates: int, shape: Shape) -> float:
        return self.tail * -(-candidates // self.segment) * centroid_bytes(shape)

    def cost(self, shape: ModelShape, context: int) -> Cost:
        if self.visibility():
            return attention_cost(shape, min(context, self.sinks + self.window))
        return super().cost(shape, context)
