from dataclasses import dataclass
from typing import ClassVar

from thresher.attention.base import AttentionMethod


@dataclass(frozen=True)
class Dense(AttentionMethod):
    """Exact softmax attention: every cached row is read."""

    name: ClassVar[str] = "dense"
    paper: ClassVar[str] = "https://arxiv.org/abs/1706.03762"
    exact: ClassVar[bool] = True
