"""How long a model takes on this machine: medians of runs that take turns."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from thresher.errors import UsageError
from thresher.vision.layers import channels_last

RUNTIMES = ("torch", "onnxruntime")


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


def onnx_runner(model: Path | bytes, images: torch.Tensor, threads: int | None = None) -> Callable[[], Any]:
    """Runs an ONNX file in onnxruntime on the CPU. Its threads wait by spinning within a run, as by default, but not
    after it: other models that take turns would be disturbed. Raises UsageError where it is not installed."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UsageError("onnxruntime is not installed: pip install 'thresher[vision]'") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    source = model if isinstance(model, bytes) else str(model)
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    fed = {session.get_inputs()[0].name: images.contiguous().numpy()}
    return lambda: session.run(None, fed)


def onnx_layers(layers: Sequence[nn.Conv2d], images: torch.Tensor) -> bytes:
    """An ONNX model of convolutions one after another, for images of this size; padding is with zeros whatever the
    mode. Raises UsageError where onnx is not installed."""
    try:
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as error:
        raise UsageError("onnx is not installed: pip install 'thresher[vision]'") from error
    nodes, weights = [], []
    for i, conv in enumerate(layers):
        named = [(f"w{i}", conv.weight), *([(f"b{i}", conv.bias)] if conv.bias is not None else [])]
        weights += [numpy_helper.from_array(p.detach().contiguous().numpy(), name) for name, p in named]
        left, right, top, bottom = conv._reversed_padding_repeated_twice
        nodes.append(
            helper.make_node(
                "Conv",
                [f"x{i}", *(name for name, _ in named)],
                [f"x{i + 1}"],
                kernel_shape=list(conv.kernel_size),
                strides=list(conv.stride),
                dilations=list(conv.dilation),
                pads=[top, left, bottom, right],
                group=conv.groups,
            )
        )
    given = helper.make_tensor_value_info("x0", TensorProto.FLOAT, list(images.shape))
    made = helper.make_tensor_value_info(f"x{len(layers)}", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "layers", [given], [made], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())
