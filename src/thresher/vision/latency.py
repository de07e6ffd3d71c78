"""How long a model takes on this machine: medians of runs that take turns."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from thresher.errors import UsageError
from thresher.vision.layers import channels_last


def time_in_turns(runs: Sequence[Callable[[], Any]], seconds: float = 2.0, least: int = 5) -> list[float]:
    """Median seconds of each, in rounds of one run each, so that what disturbs the machine disturbs all alike.

    seconds: about how long all of it takes; least: rounds at any price.
    """
    for run in runs:
        run()
    times: list[list[float]] = [[] for _ in runs]
    begun = time.perf_counter()
    while len(times[0]) < least or time.perf_counter() - begun < seconds:
        for i, run in enumerate(runs):
            start = time.perf_counter()
            run()
            times[i].append(time.perf_counter() - start)
    return [median(t) for t in times]


def torch_runner(model: nn.Module, images: torch.Tensor) -> Callable[[], Any]:
    """Runs the model on images [N, C, H, W] in eval mode, channels last."""
    model = channels_last(model).eval()
    images = images.contiguous(memory_format=torch.channels_last)

    def run() -> Any:
        with torch.inference_mode():
            return model(images)

    return run


def onnx_runner(path: Path, images: torch.Tensor, threads: int | None = None) -> Callable[[], Any]:
    """Runs an ONNX file in onnxruntime on the CPU. Raises UsageError where it is not installed."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UsageError("onnxruntime is not installed: pip install 'thresher[vision]'") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    fed = {session.get_inputs()[0].name: images.contiguous().numpy()}
    return lambda: session.run(None, fed)


def compare_latency(
    models: Mapping[str, nn.Module], images: torch.Tensor, batches: Sequence[int] = (1, 32), seconds: float = 4.0
) -> dict[int, dict[str, float]]:
    """Median seconds of a pass of each model in torch, for each batch size; images [1, C, H, W] are repeated."""
    result = {}
    for batch in batches:
        repeated = images[:1].repeat(batch, 1, 1, 1)
        times = time_in_turns([torch_runner(m, repeated) for m in models.values()], seconds)
        result[batch] = dict(zip(models, times, strict=True))
    return result
