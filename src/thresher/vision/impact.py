"""How much each class needs each filter: the impact score class vectors of HSD-CNN (arXiv 1811.04406),
reconstructed."""

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from thresher.errors import StorageError, UsageError
from thresher.files import replaced
from thresher.vision.data import Images
from thresher.vision.layers import evaluating, unwrap_logits, weights_digest
from thresher.vision.prune import ChannelGroup, Kept, gated

METHODS = ("ablation", "taylor", "activation")
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Impact:
    """scores: by group, [classes, channels] float32, means over each class's images; what they are says the method.

    ablation: how much the margin of the right class, its logit less the mean of all, falls when the channel is 0;
    taylor: the first-order estimate of that; activation: the positive part. Probabilities and losses would not do: a
    trained network's are saturated, and the mean slope of its loss is about 0, so that scores of them are noise
    (docs/results.md).
    """

    method: str
    scores: dict[str, torch.Tensor]

    def vectors(self, group: str) -> torch.Tensor:
        """Iscv [classes, channels]: magnitudes, each class's sum 1 (where all are 0, all channels alike)."""
        size = self.scores[group].double().abs()
        total = size.sum(1, keepdim=True)
        return torch.where(total > 0, size / total.clamp(min=1e-300), 1 / size.shape[1])

    def joined(self, groups: Sequence[str]) -> torch.Tensor:
        """[classes, channels of all these groups]."""
        return torch.cat([self.vectors(name) for name in groups], 1)


def measure_impact(
    model: nn.Module,
    groups: list[ChannelGroup],
    images: Images,
    method: str = "taylor",
    path: Path | None = None,
    batch: int = 256,
    progress: Progress = lambda done, total: None,
) -> Impact:
    """Scores of every group and class over `images`; each class needs some. With a path they are kept there group by
    group, and a run that was stopped goes on. The model stays as it is. Raises UsageError, StorageError."""
    if method not in METHODS:
        raise UsageError(f"unknown method {method}: choose one of {', '.join(METHODS)}")
    counts = torch.bincount(images.labels, minlength=len(images.classes))
    if (counts == 0).any():
        missing = [c for c, n in zip(images.classes, counts.tolist(), strict=True) if n == 0]
        raise UsageError(f"there are no images of {', '.join(missing[:5])} to measure filters by")
    made_from = {"method": method, "model": weights_digest(model), "images": images.digest()}
    scores = _read(path, made_from, groups, len(counts)) if path else {}
    needed = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(False)
    score = {"ablation": _ablation, "taylor": _taylor, "activation": _activation}[method]
    pending = [g for g in groups if g.name not in scores]
    bundles = [[g] for g in pending] if method == "ablation" else [pending] if pending else []
    batches = list(zip(torch.split(images.pixels, batch), torch.split(images.labels, batch), strict=True))
    try:
        for bundle in bundles:
            progress(len(scores), len(groups))
            totals = [torch.zeros(len(counts), g.channels, dtype=torch.float64) for g in bundle]
            for pixels, labels in batches:
                with evaluating(model):
                    found = score(model, bundle, pixels.float() / 255, labels, batch)
                for total, each in zip(totals, found, strict=True):
                    total.index_add_(0, labels, each.double())
            scores |= {g.name: (t / counts[:, None]).float() for g, t in zip(bundle, totals, strict=True)}
            if path:
                _write(path, made_from, scores)
        progress(len(groups), len(groups))
    finally:
        for parameter, before in zip(model.parameters(), needed, strict=True):
            parameter.requires_grad_(before)
    return Impact(method, scores)


def _margin(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """[images]: the logit of the right class less the mean of all."""
    logits = unwrap_logits(model(x))
    return logits.gather(1, y[:, None])[:, 0] - logits.mean(1)


@torch.no_grad()
def _ablation(
    model: nn.Module, groups: list[ChannelGroup], x: torch.Tensor, y: torch.Tensor, batch: int
) -> list[torch.Tensor]:
    """[images, channels] of each group: the margin less what it is without the channel; several channels in one
    pass."""
    whole = _margin(model, x, y)
    together = max(1, 2 * batch // len(x))
    scores = []
    for group in groups:
        lost = torch.empty(len(x), group.channels)
        for out in torch.split(torch.arange(group.channels), together):
            gates = torch.ones(len(out), len(x), group.channels)
            gates[torch.arange(len(out)), :, out] = 0
            with gated(model, group, gates.flatten(0, 1)):
                without = _margin(model, x.repeat(len(out), 1, 1, 1), y.repeat(len(out)))
            lost[:, out] = whole[:, None] - without.view(len(out), len(x)).T
        scores.append(lost)
    return scores


def _taylor(
    model: nn.Module, groups: list[ChannelGroup], x: torch.Tensor, y: torch.Tensor, batch: int
) -> list[torch.Tensor]:
    """[images, channels] of each group: sum over positions of -a dL/da. It is the slope of the loss along a gate, so
    one backward pass serves all filters."""
    gates = [torch.ones(len(x), g.channels, requires_grad=True) for g in groups]
    with torch.enable_grad(), ExitStack() as stack:
        for group, gate in zip(groups, gates, strict=True):
            stack.enter_context(gated(model, group, gate))
        return list(torch.autograd.grad(_margin(model, x, y).sum(), gates))


@torch.no_grad()
def _activation(
    model: nn.Module, groups: list[ChannelGroup], x: torch.Tensor, y: torch.Tensor, batch: int
) -> list[torch.Tensor]:
    """[images, channels] of each group: mean over positions of the positive part, as its first reader sees it."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            read = inputs[0].clamp(min=0)
            seen[name] = read.mean((2, 3)) if read.dim() == 4 else read

        return hook

    readers = {g.readers[0][0] for g in groups}
    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in readers]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    scores = []
    for group in groups:
        name, of = group.readers[0]
        here = of >= 0
        means = torch.zeros(len(x), group.channels).index_add_(1, of[here], seen[name][:, here])
        scores.append(means / torch.bincount(of[here], minlength=group.channels).clamp(min=1))
    return scores


def needed_channels(
    impact: Impact, groups: list[ChannelGroup], classes: Sequence[int], share: float, multiple: int = 1
) -> Kept:
    """The channels that hold `share` of these classes' summed impact in each group, as indices in order.

    A channel's impact is the mean of the classes'. Counts are rounded up to the multiple; one channel always stays.
    """
    kept = {}
    for group in groups:
        scores = impact.vectors(group.name)[list(classes)].mean(0)
        ordered, index = scores.sort(descending=True, stable=True)
        reached = ordered.cumsum(0) >= share * ordered.sum() * (1 - 1e-12)
        count = int(reached.int().argmax()) + 1 if share < 1 else group.channels
        count = min(group.channels, -(-count // multiple) * multiple)
        kept[group.name] = index[:count].sort().values
    return kept


def _write(path: Path, made_from: dict[str, str], scores: dict[str, torch.Tensor]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replaced(path, lambda part: save_file(scores, part, {"made_from": json.dumps(made_from)}))
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror}") from error


def _read(path: Path, made_from: dict[str, str], groups: list[ChannelGroup], classes: int) -> dict[str, torch.Tensor]:
    """What an earlier run has kept there of the same; nothing if it was made from something else."""
    if not path.is_file():
        return {}
    try:
        with safe_open(path, "pt") as file:
            if json.loads(file.metadata()["made_from"]) != made_from:
                return {}
            kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{path}: no impact scores that can be read: remove it ({error})") from error
    shapes = {g.name: (classes, g.channels) for g in groups}
    return {n: t for n, t in kept.items() if shapes.get(n) == tuple(t.shape) and torch.isfinite(t).all()}
