from dataclasses import dataclass
from typing import ClassVar

from thresher.attention.sign import Sign


@dataclass(frozen=True)
class Auto(Sign):
    """The preset that the measurements favour: `sign` ranking, the group's union, a tail of centroids
    (docs/results.md)."""

    name: ClassVar[str] = "auto"

    window: int = 32
    dense_layers: str = "none"
    budget: float = 160
    bits: int = 32
    tail: int = 64
