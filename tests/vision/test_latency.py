import time

import pytest
import torch
from torch import nn

from thresher.vision.latency import onnx_layers, onnx_runner


def test_a_session_is_idle_after_its_run():
    """Its threads spin for tens of milliseconds by default, on the cores of the model that runs next."""
    pytest.importorskip("onnxruntime")
    images = torch.rand(4, 16, 64, 64)
    run = onnx_runner(onnx_layers([nn.Conv2d(16, 16, 3, padding=1) for _ in range(8)], images), images, threads=2)
    idle = []
    for _ in range(3):
        run()
        before = time.process_time()
        time.sleep(0.1)
        idle.append(time.process_time() - before)
    assert min(idle) < 0.01
