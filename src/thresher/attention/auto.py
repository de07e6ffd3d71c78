from dataclasses import dataclass
from typing import ClassVar

from thresher.attention.sign import Sign
from thresher.errors import UsageError


@dataclass(frozen=True)
class Auto(Sign):
    """The preset that the measurements favour: `sign` ranking by 32 bits, the group's union, a tail of centroids.

    share: the budget is at least this part of the context. With a tail no layer needs to stay dense (docs/results.md).
    """

    name: ClassVar[str] = "auto"

    window: int = 32
    dense_layers: str = "none"
    budget: float = 160
    tail: int = 64
    bits: int = 32
    share: float = 0.005

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.share < 1:
            raise UsageError(f"auto, share={self.share}: give a part of the context from 0 to below 1")

    def budget_tokens(self, context: int) -> int:
        return max(super().budget_tokens(context), round(self.share * context))
