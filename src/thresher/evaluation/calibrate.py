"""What a pass of a model of any shape takes on this machine: its kernels timed at that shape, without its weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from thresher.attention.base import AttentionMethod
from thresher.attention.dense import Dense
from thresher.evaluation.attention_bench import bench_attention
from thresher.evaluation.machine import measure_machine
from thresher.kernels.attention import Heads
from thresher.kernels.linear import pack_linear
from thresher.machine.cost import ModelShape, weights_cost
from thresher.machine.profile import MachineProfile, median_seconds

CONTEXTS = (2048, 16384)  # at which attention is timed; between and beyond, time grows with the bytes
_WEIGHTS = 192 * 2**20  # bytes of the matrices that are timed: beyond the caches
_DTYPES = {"bf16": torch.bfloat16, "int8": torch.int8, "float32": torch.float32}


@dataclass(frozen=True)
class Line:
    """Seconds of what reads so many bytes."""

    start: float
    per_byte: float

    def at(self, size: float) -> float:
        return self.start + self.per_byte * size


@dataclass(frozen=True)
class Calibration:
    """weights: bytes a second of the linear layers, by tokens of a pass. attention: of one layer and one sequence, by
    method. profile: memory and product."""

    profile: MachineProfile
    weights: dict[int, float]
    attention: dict[str, Line]

    def linear_seconds(self, shape: ModelShape, tokens: float) -> float:
        """Of a pass of so many tokens; between numbers that were timed the rates are interpolated."""
        known = sorted(self.weights)
        rate = float(np.interp(tokens, known, [self.weights[n] for n in known]))
        beyond = max(1.0, tokens / known[-1])  # of more than the most that was timed arithmetic is taken to be longest
        return weights_cost(shape, tokens).bytes / rate * beyond

    def attention_seconds(self, method: str, layers: int, size: float, sequences: float) -> float:
        """Of `layers` layers that read `size` bytes together for so many sequences. Raises KeyError for a method that
        was not timed."""
        line = self.attention[method]
        return line.start * layers * sequences + line.per_byte * size


def calibrate(
    shape: ModelShape,
    weights: str,
    methods: Sequence[AttentionMethod],
    sequences: Sequence[int],
    progress: Callable[[str], None],
) -> Calibration:
    """Time the linear layers for so many sequences and one layer of attention under every method; a few seconds each.
    weights: bf16, int8 or float32."""
    profile = measure_machine(torch.float32 if weights == "float32" else torch.bfloat16)
    rates = {}
    for rows in sequences:
        progress(f"timing the linear layers of {rows} tokens")
        rates[rows] = _weight_rate(_DTYPES[weights], rows)
    heads = Heads(shape.q_heads, shape.kv_heads, shape.head_dim)
    one_layer = replace(shape, layers=1)
    points: dict[str, list[tuple[float, float]]] = {}
    by_name = {str(m): m for m in (Dense(), *methods)}
    for context in CONTEXTS:
        for timing in bench_attention(heads, context, list(by_name.values()), 6, progress):
            size = by_name[timing.method].cost(one_layer, context).bytes
            points.setdefault(timing.method, []).append((size, timing.median_us * 1e-6))
    return Calibration(profile, rates, {name: _line(found) for name, found in points.items()})


def _line(points: Sequence[tuple[float, float]]) -> Line:
    (x0, y0), (x1, y1) = points
    if x1 <= x0 or y1 <= y0:  # the same is read whatever the context
        return Line(max(y0, y1), 0.0)
    slope = (y1 - y0) / (x1 - x0)
    return Line(max(0.0, y0 - slope * x0), slope)


def _weight_rate(dtype: torch.dtype, rows: int, width: int = 2048) -> float:
    """Bytes a second of products with `rows` rows, over matrices that no cache holds."""
    one = pack_linear([torch.randn(width, width)], dtype)
    count = -(-_WEIGHTS // one.bytes)
    matrices = [replace(one, data=one.data.clone()) for _ in range(count)]
    x = torch.randn(rows, width).to(torch.float32 if dtype == torch.float32 else torch.bfloat16)

    def run() -> None:
        for matrix in matrices:
            matrix(x)

    return count * one.bytes / median_seconds(run, 5)
