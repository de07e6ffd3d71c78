from dataclasses import dataclass
from typing import ClassVar

from thresher.attention.base import AttentionMethod
from thresher.errors import UsageError
from thresher.kernels.attention import Visibility


@dataclass(frozen=True)
class Streaming(AttentionMethod):
    """The first tokens (attention sinks) and a window of recent ones; StreamingLLM, sections 3.1 and 3.2.

    Positions stay those of the text: keys are cached after RoPE, and rows outside are not read, not evicted.
    """

    name: ClassVar[str] = "streaming"
    paper: ClassVar[str] = "https://arxiv.org/abs/2309.17453"
    exact: ClassVar[bool] = False

    sinks: int = 4
    window: int = 1024

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.window < 1:
            raise UsageError(f"{self}: sinks must be 0 or more, window 1 or more")

    def visibility(self) -> Visibility:
        return Visibility(window=self.window, sinks=self.sinks)

    def rows_read(self, context: int) -> int:
        return min(context, self.sinks + self.window)
