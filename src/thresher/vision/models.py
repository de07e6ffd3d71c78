"""Classifiers: where they come from, what they are saved as, and how they leave for other runtimes."""

import importlib
import json
import logging
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import fx, nn

from thresher.errors import ModelError, StorageError, UsageError
from thresher.files import replaced, replaced_text
from thresher.vision.decompose import shape_layers
from thresher.vision.layers import contiguous, shape_folded, unwrap_logits
from thresher.vision.nets import NETS, make_net
from thresher.vision.prune import shape_pruned

DESCRIPTION, WEIGHTS, ONNX, EXPORTED = "vision.json", "model.safetensors", "model.onnx", "model.pt2"
_FORMAT = 1
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
fx.wrap("unwrap_logits")  # pieces.py traces models, and this asks for the type of what they give


class Normalized(nn.Module):
    """A classifier with its normalisation inside: images in [0, 1] go in, logits come out."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, body: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return unwrap_logits(self.body((images - self.mean) / self.std))


@dataclass(frozen=True)
class Description:
    """What a folder says of its model, beside the weights.

    source: net:NAME, transformers, timm:NAME or MODULE:FUNCTION; config: of transformers; classes: names in order;
    shape: channels, height, width of an image in [0, 1]; mean, std: applied inside; pruned: channels left in each group
    of a sub-network (prune.py); ranks: of decomposed layers;
    folded: convolutions and the batch norms they took in; history: what was done and measured.
    """

    source: str
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    pruned: dict[str, int] = field(default_factory=dict)
    ranks: dict[str, tuple[int, int]] = field(default_factory=dict)
    folded: tuple[tuple[str, str], ...] = ()
    history: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Classifier:
    """A module that maps images [N, C, H, W] in [0, 1] to logits [N, classes], and what it is."""

    module: nn.Module
    about: Description

    @property
    def example(self) -> torch.Tensor:
        """An image [1, C, H, W] in [0, 1], always the same one."""
        return torch.rand(1, *self.about.shape, generator=torch.Generator().manual_seed(0))


def new_classifier(net: str, classes: tuple[str, ...], shape: tuple[int, int, int], seed: int = 0) -> Classifier:
    """A fresh net of nets.NETS. Raises UsageError."""
    return Classifier(make_net(net, len(classes), shape[0], seed), Description(f"net:{net}", classes, shape))


def load_classifier(
    name: str, weights: Path | None = None, size: int | None = None, trusted: str | None = None
) -> Classifier:
    """A model by a folder of this project or of transformers, by hub id, `timm:NAME`, or the path of Python code,
    `MODULE:FUNCTION`.

    weights: a state dict for the last two (safetensors, or a file that loads with weights_only). size: height and width
    of an image where the model does not say (code says it by an attribute `image_size`, and names by `class_names`).
    trusted: the code path that a folder may name. Raises ModelError, UsageError.
    """
    folder = Path(name)
    if weights is not None and (folder.exists() or ":" not in name):
        raise UsageError("--weights goes with timm:NAME or MODULE:FUNCTION: a folder has its own")
    if (folder / DESCRIPTION).is_file():
        return _load_own(folder, trusted)
    if name.startswith("timm:"):
        return _from_code(name, lambda: _timm(name[5:], pretrained=weights is None), weights, size)
    if ":" in name and not folder.exists():
        return _from_code(name, lambda: _factory(name), weights, size)
    return _from_transformers(name, size)


def _factory(path: str) -> nn.Module:
    module_name, _, attribute = path.partition(":")
    try:
        made: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            made = getattr(made, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ModelError(f"{path}: cannot be imported: {error}") from error
    module = made if isinstance(made, nn.Module) else made() if callable(made) else None
    if not isinstance(module, nn.Module):
        raise ModelError(f"{path}: neither a torch module nor a function without arguments that makes one")
    return module


def _timm(name: str, pretrained: bool) -> nn.Module:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # it asks for a torchvision that fits torch
        raise ModelError(f"timm does not import here: {error}") from error
    try:
        made: nn.Module = timm.create_model(name, pretrained=pretrained)
    except Exception as error:
        raise ModelError(f"timm:{name}: {str(error).splitlines()[0]}") from error
    return made


def _from_code(name: str, make: Callable[[], nn.Module], weights: Path | None, size: int | None) -> Classifier:
    module = make()
    if weights is not None:
        load_weights(module, weights)
    return _described(
        module.eval(),
        name,
        size or int(getattr(module, "image_size", 224)),
        classes=tuple(map(str, getattr(module, "class_names", ()))),
    )


def _described(module: nn.Module, source: str, size: int, **more: Any) -> Classifier:
    first = next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)
    channels = first.in_channels if first is not None else 3
    shape = (channels, size, size)
    module.eval()
    try:
        with torch.no_grad():
            count = unwrap_logits(module(torch.rand(1, *shape))).shape[1]
    except RuntimeError as error:
        raise ModelError(f"{source}: does not take images {shape}: {str(error).splitlines()[0]}") from error
    classes = more.pop("classes", None) or tuple(str(i) for i in range(count))
    if len(classes) != count:
        raise ModelError(f"{source}: {count} logits for {len(classes)} classes")
    return Classifier(module, Description(source, classes, shape, **more))


def _from_transformers(name: str, size: int | None) -> Classifier:
    from transformers import AutoModelForImageClassification
    from transformers.utils import cached_file

    try:
        body = AutoModelForImageClassification.from_pretrained(name, use_safetensors=True, dtype=torch.float32)
    except (OSError, ValueError, SafetensorError) as error:
        nets = ", ".join(NETS)
        raise ModelError(
            f"{name}: neither a folder with {DESCRIPTION}, nor an image classifier of transformers in safetensors, nor "
            f"timm:NAME or MODULE:FUNCTION ({nets} are made by `thresher vision train`): {str(error).splitlines()[0]}"
        ) from error
    file = cached_file(name, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    said = json.loads(Path(file).read_text()) if file else {}
    channels = int(getattr(body.config, "num_channels", 3))
    mean, std = (tuple(said.get(k, v))[:channels] for k, v in zip(("image_mean", "image_std"), _IMAGENET, strict=True))
    labels = body.config.id2label
    return _described(
        Normalized(body, mean, std),
        "transformers",
        size or _said_size(said) or int(getattr(body.config, "image_size", 224)),
        classes=tuple(labels[i] for i in range(len(labels))),
        mean=mean,
        std=std,
        config=body.config.to_dict(),
    )


def _said_size(said: dict[str, Any]) -> int | None:
    for key in ("crop_size", "size"):
        value = said.get(key)
        if isinstance(value, dict):
            value = value.get("height") or value.get("shortest_edge")
        if isinstance(value, int):
            return value
    return None


def load_weights(module: nn.Module, path: Path) -> None:
    """A state dict from a file of safetensors, or of torch without pickled objects. Raises ModelError."""
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ModelError(f"{path}: does not exist") from error
    except Exception as error:  # a pickle with more than tensors is refused by torch in several ways
        raise ModelError(
            f"{path}: neither safetensors nor a plain state dict of torch (pickled objects are refused)"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ModelError(f"{path}: not a state dict of tensors")
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(f"{path}: does not fit the model: {' '.join(str(error).split())[:200]}") from error
    broken = [n for n, t in module.state_dict().items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if broken:
        raise ModelError(f"{path}: {broken[0]} holds numbers that are not finite")


def _load_own(folder: Path, trusted: str | None) -> Classifier:
    about = read_description(folder)
    try:
        module = build(about, folder, trusted)
        if about.pruned:
            shape_pruned(module, Classifier(module, about).example, len(about.classes), about.pruned)
        shape_layers(module, about.ranks)
        shape_folded(module, about.folded)
    except UsageError as error:
        raise ModelError(f"{folder}: {error}") from error
    load_weights(module, folder / WEIGHTS)
    return Classifier(module.eval(), about)


def read_description(folder: Path) -> Description:
    """What `write_description` wrote. Raises ModelError."""
    try:
        said = json.loads((folder / DESCRIPTION).read_text())
        if said.pop("format") != _FORMAT:
            raise ModelError(f"{folder}: written by another version of Thresher")
        return Description(
            source=str(said["source"]),
            classes=tuple(map(str, said["classes"])),
            shape=_three(said["shape"]),
            mean=tuple(map(float, said["mean"])),
            std=tuple(map(float, said["std"])),
            config=dict(said["config"]),
            pruned={str(n): int(c) for n, c in said.get("pruned", {}).items()},
            ranks={str(n): (int(r[0]), int(r[1])) for n, r in said["ranks"].items()},
            folded=tuple((str(c), str(n)) for c, n in said["folded"]),
            history=dict(said["history"]),
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ModelError(f"{folder / DESCRIPTION}: damaged: {error!r}") from error


def write_description(about: Description, folder: Path) -> None:
    """As DESCRIPTION. Raises OSError."""
    said = json.dumps({"format": _FORMAT, **asdict(about)}, indent=1)
    replaced_text(folder / DESCRIPTION, said)


def _three(values: Any) -> tuple[int, int, int]:
    channels, height, width = map(int, values)
    if min(channels, height, width) < 1 or channels * height * width > 1 << 22:
        raise ValueError(f"shape {values}")
    return channels, height, width


def build(about: Description, folder: Path, trusted: str | None) -> nn.Module:
    """The architecture that a folder's description names, with its normalisation, before layers got other shapes.
    Raises ModelError."""
    module = _architecture(about, folder, trusted)
    return Normalized(module, about.mean, about.std) if about.mean else module


def _architecture(about: Description, folder: Path, trusted: str | None) -> nn.Module:
    kind, _, rest = about.source.partition(":")
    if kind == "net":
        return make_net(rest, len(about.classes), about.shape[0])
    if about.source == "transformers":
        from transformers import AutoConfig, AutoModelForImageClassification

        try:
            config = AutoConfig.for_model(**about.config)
            made: nn.Module = AutoModelForImageClassification.from_config(config)
        except (ValueError, TypeError, KeyError) as error:
            raise ModelError(f"{folder}: its configuration makes no model: {error}") from error
        return made
    if kind == "timm":
        return _timm(rest, pretrained=False)
    if about.source != trusted:
        raise ModelError(f"{folder}: runs the code of {about.source}: say --trust {about.source} if you trust it")
    return _factory(about.source)


def save_classifier(classifier: Classifier, folder: Path, export: bool = False) -> dict[str, float]:
    """Write WEIGHTS and DESCRIPTION, and if asked ONNX and EXPORTED, which need nothing of this project to be run.

    Returns the largest difference of each export's logits from torch's, relative to the largest logit. Raises
    StorageError, and ModelError if an export gives something else.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        state = {n: t.detach().cpu().contiguous().clone() for n, t in classifier.module.state_dict().items()}
        replaced(folder / WEIGHTS, lambda part: save_file(state, part))
        write_description(classifier.about, folder)
        if not export:
            return {}
        apart = {}
        for file, write in ((ONNX, export_onnx), (EXPORTED, export_torch)):
            apart[file] = replaced(folder / file, partial(write, classifier))
        return apart
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written: {error.strerror}") from error


def _exported(classifier: Classifier) -> Any:
    """The program that torch.export makes, for any batch size, or for single images where the model's code allows no
    other."""
    module, image = contiguous(classifier.module).eval(), classifier.example
    try:
        return torch.export.export(
            module, (image.repeat(2, 1, 1, 1),), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
    except Exception:  # torch has no one class for what its tracers cannot do
        try:
            return torch.export.export(module, (image,))
        except Exception as error:
            raise ModelError(f"the model cannot be exported: {str(error).strip().splitlines()[0]}") from error


def export_torch(classifier: Classifier, path: Path) -> float:
    """Write an archive of torch.export; returns how far its logits are from the model's. Raises ModelError."""
    program = _exported(classifier)
    with open(path, "wb") as file:
        torch.export.save(program, file)
    with open(path, "rb") as file:
        again = torch.export.load(file).module()
    return _difference(classifier, program, lambda x: unwrap_logits(again(x)), path)


def export_onnx(classifier: Classifier, path: Path) -> float:
    """Write ONNX and run it in onnxruntime; returns how far its logits are from the model's. Raises ModelError, and
    UsageError where what that needs is not installed."""
    from thresher.vision.latency import onnx_runner

    program = _exported(classifier)
    talk = logging.getLogger("torch.onnx")
    level = talk.level
    talk.setLevel(logging.ERROR)  # that torchvision is missing, which nothing here needs
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of torch about itself
            converted = torch.onnx.export(program, dynamo=True, verbose=False, external_data=False)
    except ImportError as error:
        raise UsageError("onnx and onnxscript are not installed: pip install 'thresher[vision]'") from error
    finally:
        talk.setLevel(level)
    assert converted is not None
    converted.save(path, external_data=False)
    return _difference(classifier, program, lambda x: torch.from_numpy(onnx_runner(path, x)()[0]), path)


@torch.no_grad()
def _difference(classifier: Classifier, program: Any, run: Callable[[torch.Tensor], torch.Tensor], path: Path) -> float:
    apart = 0.0
    for batch in (1, 3) if program.range_constraints else (1,):
        images = torch.rand(batch, *classifier.about.shape, generator=torch.Generator().manual_seed(batch))
        expected = unwrap_logits(classifier.module(images))
        apart = max(apart, float((run(images) - expected).abs().max() / expected.abs().max().clamp(min=1e-6)))
    if not apart < 1e-3:
        raise ModelError(f"{path}: the exported model gives other logits, by {apart:.1e} of the largest")
    return apart
