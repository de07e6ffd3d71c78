"""How many tokens of a prompt fit into a pass of a given time: the cost model, corrected by the passes there were."""

from collections.abc import Iterable

from thresher.machine.cost import Cost, ModelShape, attention_cost, weights_cost
from thresher.machine.profile import MachineProfile

_NOMINAL = MachineProfile(threads=1, read=20e9, matmul=100e9)  # only the ratio to what is measured matters
_WEIGHT = 0.3  # of a new pass in the running correction
_LEAST = 16  # prompt tokens of a pass: fewer would read the weights for next to nothing
_OUTLIER = 4.0  # a pass that took this much longer than expected was disturbed, and counts only as much longer

Chunk = tuple[int, int]  # new tokens, cached tokens before them


class Pace:
    """Learns how long passes take. A pass is given as the chunks `(new tokens, cached tokens)` of its sequences."""

    def __init__(self, shape: ModelShape) -> None:
        self._shape = shape
        self._correction = 1.0
        self._passes = 0

    def seconds(self, chunks: Iterable[Chunk]) -> float:
        """The expected time of a pass."""
        return self._correction * self._nominal(chunks)

    def observe(self, chunks: Iterable[Chunk], seconds: float) -> None:
        """A pass took so long."""
        measured = seconds / max(self._nominal(chunks), 1e-9)
        if self._passes:
            measured = min(measured, _OUTLIER * self._correction)
            self._correction += _WEIGHT * (measured - self._correction)
        else:
            self._correction = measured
        self._passes += 1

    def room(self, seconds: float, chunks: list[Chunk], past: int, most: int) -> int:
        """Prompt tokens behind `past` cached ones, at least 16 and at most `most`, that a pass of `chunks` can still
        take within the time."""
        low, high = min(_LEAST, most), most
        while low < high:
            middle = (low + high + 1) // 2
            if self.seconds([*chunks, (middle, past)]) <= seconds:
                low = middle
            else:
                high = middle - 1
        return low

    def _nominal(self, chunks: Iterable[Chunk]) -> float:
        tokens, attention = 0, Cost(0, 0)
        for new, past in chunks:
            tokens += new
            attention += attention_cost(self._shape, past + new / 2, new)
        return _NOMINAL.seconds(weights_cost(self._shape, tokens)) + _NOMINAL.seconds(attention)
