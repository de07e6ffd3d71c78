"""Two small CNNs of known families, for small pictures: what is trained here and decomposed in tests and tables."""

import torch
from torch import nn

from thresher.errors import UsageError


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution and batch norm, the size kept but for the stride."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs))


class VGG(nn.Module):
    """VGG-style: plain 3x3 convolutions with pooling between (Simonyan & Zisserman 2015). 240,000 parameters."""

    def __init__(self, classes: int, channels: int = 1, widths: tuple[int, ...] = (32, 64, 128)) -> None:
        super().__init__()
        a, b, c = widths
        self.features = nn.Sequential(
            *(conv_bn(channels, a), nn.ReLU(), nn.MaxPool2d(2)),
            *(conv_bn(a, b), nn.ReLU(), nn.MaxPool2d(2)),
            *(conv_bn(b, c), nn.ReLU(), conv_bn(c, c), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        )
        self.head = nn.Linear(c, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.features(images))
        return out


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2016, the basic block)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = conv_bn(inputs, outputs, 3, stride)
        self.second = conv_bn(outputs, outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else conv_bn(inputs, outputs, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.second(torch.relu(self.first(x))) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet-style: a stem of stride `stem_stride`, then blocks (He et al. 2016).

    The default has 308,000 parameters and serves pictures of about 28 pixels; `resnet18` is the published one.
    """

    def __init__(
        self,
        classes: int,
        channels: int = 1,
        widths: tuple[int, ...] = (32, 64, 128),
        blocks: int = 1,
        stem: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.stem = stem or nn.Sequential(conv_bn(channels, widths[0], 3, 2), nn.ReLU())
        layers: list[nn.Module] = []
        before = widths[0]
        for i, width in enumerate(widths):
            for j in range(blocks):
                layers.append(Block(before, width, 2 if i and j == 0 else 1))
                before = width
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.blocks(self.stem(images)))
        return out


def resnet18(classes: int = 1000, channels: int = 3) -> ResNet:
    """ResNet-18 for pictures of 224 pixels: 11.7 M parameters, 1.8 G multiply-adds."""
    stem = nn.Sequential(conv_bn(channels, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    return ResNet(classes, channels, (64, 128, 256, 512), blocks=2, stem=stem)


NETS = {"vgg": VGG, "resnet": ResNet, "resnet18": resnet18}


def make_net(name: str, classes: int, channels: int, seed: int = 0) -> nn.Module:
    """A fresh net by name; the seed decides its weights. Raises UsageError."""
    if name not in NETS:
        raise UsageError(f"unknown net {name}: choose one of {', '.join(NETS)}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return NETS[name](classes, channels)  # type: ignore[operator,no-any-return]
