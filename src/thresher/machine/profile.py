"""What this machine can do, measured: bytes read from memory and operations of a matrix product in a second."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from thresher.machine.cost import Cost


@dataclass(frozen=True)
class MachineProfile:
    """Rates measured with the threads that the kernels use. read: bytes / s; matmul: operations / s of 512 rows."""

    threads: int
    read: float
    matmul: float

    def seconds(self, cost: Cost) -> float:
        """The floor: whichever of memory and arithmetic takes longer, each at its measured rate."""
        return max(cost.bytes / self.read, cost.flops / self.matmul)


def median_seconds(run: Callable[[], object], repeats: int = 7) -> float:
    """Median wall-clock time of `run`, after one call that warms up."""
    run()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)
