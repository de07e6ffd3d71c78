"""Train a classifier, or fine-tune a decomposed one from its teacher: one loop, resumable, on accelerate's devices."""

import csv
import io
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from thresher.errors import StorageError, UsageError
from thresher.files import replaced, replaced_text
from thresher.vision.data import Images, augment
from thresher.vision.layers import channels_last, evaluating, unwrap_logits, weights_digest
from thresher.vision.losses import attack_for_training, find_objective, objective_loss
from thresher.vision.taxonomy import Taxonomy

CHECKPOINT, CURVE = "checkpoint.pt", "finetune.csv"

PRECISIONS = ("float32", "bf16")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Settings:
    """What decides the result, beside the nets and the data.

    objective: a name of losses.OBJECTIVES; lr: the highest, reached after a twentieth of the steps and left on a cosine
    to 0; pad: pixels that images are moved by, with mirroring; epsilon, attack_steps: of adversarial objectives;
    precision: of PRECISIONS, of the nets' arithmetic in training steps (weights, updates, losses, attacks and what is
    measured are float32 in both). Raises UsageError.
    """

    objective: str = "soft"
    epochs: int = 3
    batch: int = 128
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    pad: int = 2
    epsilon: float = 0.1
    attack_steps: int = 7
    seed: int = 0
    precision: str = "float32"

    def __post_init__(self) -> None:
        find_objective(self.objective)
        if self.precision not in PRECISIONS:
            raise UsageError(f"unknown precision {self.precision}: choose one of {', '.join(PRECISIONS)}")
        if min(self.epochs, self.batch - 1, self.attack_steps) < 1 or self.pad < 0:
            raise UsageError("epochs and attack steps begin at 1, a batch at 2, and a padding at 0")
        if not 0 < self.lr < math.inf or not 0 <= self.momentum < 1 or not 0 <= self.weight_decay < math.inf:
            raise UsageError("learning rate, momentum or weight decay makes no sense")
        if not 0 <= self.epsilon <= 1:
            raise UsageError(f"an epsilon of {self.epsilon} is not between 0 and 1")


@dataclass(frozen=True)
class Epoch:
    """loss: mean over the epoch; accuracy: on the validation images after it; seconds: of all so far, without that."""

    epoch: int
    loss: float
    accuracy: float
    seconds: float


@torch.no_grad()
def predict(model: nn.Module, images: Images, batch: int = 256) -> torch.Tensor:
    """Logits [N, classes] in eval mode; the model's own mode is as before."""
    device = next(model.parameters()).device
    with evaluating(model):
        pieces = [
            unwrap_logits(model(piece.to(device).float().div(255).contiguous(memory_format=torch.channels_last))).cpu()
            for piece in torch.split(images.pixels, batch)
        ]
    return torch.cat(pieces)


def accuracy(model: nn.Module, images: Images) -> float:
    """Share of the images whose best class is right."""
    return float((predict(model, images).argmax(1) == images.labels).double().mean())


@contextmanager
def captured(model: nn.Module, layers: list[str]) -> Iterator[list[torch.Tensor]]:
    """The outputs of these layers in float32, in this order, of the last forward within. Raises UsageError for an
    unknown layer."""
    outputs: list[torch.Tensor] = [torch.empty(0)] * len(layers)
    modules = dict(model.named_modules())
    unknown = [name for name in layers if name not in modules]
    if unknown:
        raise UsageError(f"the teacher has no layer {unknown[0]} to compare with: use a loss of logits, as soft")

    def keep(i: int) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            outputs[i] = output.float()

        return hook

    handles = [modules[name].register_forward_hook(keep(i)) for i, name in enumerate(layers)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def training_layout(model: nn.Module) -> torch.memory_format:
    """How images and weights lie while a model trains: channels last, which CPUs like, but for models with a strided
    1x1 convolution of fewer than 8 inputs, whose gradient corrupts memory there (oneDNN issue 6035)."""
    points = (m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1))
    unsafe = any(max(m.stride) > 1 and m.in_channels < 8 for m in points)
    return torch.contiguous_format if unsafe else torch.channels_last


@contextmanager
def read_by(model: nn.Module, layer: str | None) -> Iterator[list[torch.Tensor]]:
    """What a layer reads, in float32, at each forward within; nothing without a layer."""
    read: list[torch.Tensor] = []
    if layer is None:
        yield read
        return
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].float()))
    try:
        yield read
    finally:
        handle.remove()


def processes() -> Any:
    """accelerate's view of the processes that a launcher started; without one there is one. Of CPUs it must be told, or
    each would train alone."""
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())


def finetune(
    student: nn.Module,
    data: Images,
    validation: Images,
    settings: Settings,
    teacher: nn.Module | None = None,
    layers: list[str] | None = None,
    folder: Path | None = None,
    progress: Progress = lambda done, total: None,
    taxonomy: Taxonomy | None = None,
) -> list[Epoch]:
    """Train `student` in place and return its curve.

    layers: names of modules of both nets whose outputs are compared by the objectives that compare features. taxonomy:
    adds to the objective how classes are related. With a
    folder it is kept after each epoch (CHECKPOINT, CURVE), and a run that was stopped goes on there: on CPU with the
    bits of one that was not. Raises UsageError, StorageError; a loss that is no number stops it after the last good
    epoch.
    """
    from accelerate import Accelerator

    objective = find_objective(settings.objective)
    if objective.needs_teacher and teacher is None:
        raise UsageError(f"the loss {settings.objective} needs a teacher")
    if objective.needs_features and not layers:
        raise UsageError(f"the loss {settings.objective} compares layers, and none was decomposed")
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    layout = training_layout(student)
    student.to(memory_format=layout)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        student.parameters(), settings.lr, settings.momentum, weight_decay=settings.weight_decay, nesterov=True
    )
    steps = -(-len(data) // (settings.batch * accelerator.num_processes)) * settings.epochs
    made_from = {
        "settings": asdict(settings),
        "data": data.digest(),
        "start": weights_digest(student),
        "teacher": weights_digest(teacher) if teacher is not None and objective.needs_teacher else "",
        "taxonomy": taxonomy.name if taxonomy else "",
    }
    curve = _resume(folder, student, optimizer, made_from)
    model, optimizer = accelerator.prepare(student, optimizer)
    if teacher is not None:
        teacher = channels_last(teacher).to(accelerator.device).eval()
    compared = (layers or []) if objective.needs_features else []
    before = curve[-1].seconds if curve else 0.0
    step = len(curve) * (steps // settings.epochs)
    for epoch in range(len(curve), settings.epochs):
        begun = time.perf_counter()
        generator = torch.Generator().manual_seed(_mixed(settings.seed, epoch, accelerator.process_index + 1))
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(_mixed(settings.seed, epoch, 0)))
        loader = accelerator.prepare(DataLoader(data, settings.batch, sampler=order.tolist()))
        student.train()
        losses: list[float] = []
        for images, labels in loader:
            if len(images) < 2:
                continue  # batch norm has nothing to learn of one image
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * _schedule(step, steps)
            images = augment(images.cpu(), settings.pad, generator).to(accelerator.device)
            images = images.contiguous(memory_format=layout)
            loss = _loss(settings, model, student, teacher, compared, images, labels, generator, taxonomy)
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                kept = f"; epoch {epoch} is in {folder}" if folder and epoch else ""
                raise UsageError(f"the loss is {losses[-1]} in epoch {epoch + 1}: a lower learning rate may help{kept}")
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            step += 1
            progress(min(step, steps), steps)
        before += time.perf_counter() - begun
        curve.append(Epoch(epoch + 1, sum(losses) / max(1, len(losses)), accuracy(student, validation), before))
        if folder and accelerator.is_main_process:
            _keep(folder, student, optimizer, made_from, curve)
    student.eval()
    return curve


def _loss(
    settings: Settings,
    model: nn.Module,
    student: nn.Module,
    teacher: nn.Module | None,
    compared: list[str],
    images: torch.Tensor,
    labels: torch.Tensor,
    generator: torch.Generator,
    taxonomy: Taxonomy | None,
) -> torch.Tensor:
    """Of one batch. model: the student as accelerate has wrapped it."""
    objective = find_objective(settings.objective)
    taught, attacked, theirs = None, None, list[torch.Tensor]()

    def logits_of(net: nn.Module, given: torch.Tensor) -> torch.Tensor:
        with torch.autocast(given.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            return unwrap_logits(net(given)).float()

    if teacher is not None and objective.needs_teacher:
        with torch.no_grad(), captured(teacher, compared) as theirs:
            taught = logits_of(teacher, images)
    if objective.soft_adversarial and taught is not None:
        student.eval()  # an attack does not move the means of batch norm
        moved = attack_for_training(
            objective, model, images, labels, taught, settings.epsilon, settings.attack_steps, generator
        )
        student.train()
        attacked = logits_of(model, moved)
    with captured(student, compared) as ours, read_by(student, taxonomy.head if taxonomy else None) as read:
        logits = logits_of(model, images)
    loss = objective_loss(objective, logits, labels, taught, (ours, theirs) if compared else None, attacked)
    return loss + taxonomy.loss(logits, labels, read[-1]) if taxonomy else loss


def _mixed(*parts: int) -> int:
    """One seed of several numbers; other numbers give others."""
    import numpy as np

    return int(np.random.SeedSequence(parts).generate_state(1, np.uint32)[0])


def _schedule(step: int, steps: int) -> float:
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _keep(folder: Path, student: nn.Module, optimizer: Any, made_from: dict[str, Any], curve: list[Epoch]) -> None:
    saved = {
        "made_from": made_from,
        "curve": [astuple(e) for e in curve],
        "student": student.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(("epoch", "loss", "accuracy", "seconds"))
    writer.writerows(astuple(e) for e in curve)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replaced(folder / CHECKPOINT, partial(torch.save, saved))
        replaced_text(folder / CURVE, table.getvalue())
    except OSError as error:
        raise StorageError(f"{folder}: the checkpoint cannot be written: {error.strerror}") from error


def _resume(folder: Path | None, student: nn.Module, optimizer: Any, made_from: dict[str, Any]) -> list[Epoch]:
    if folder is None or not (folder / CHECKPOINT).is_file():
        return []
    try:
        saved = torch.load(folder / CHECKPOINT, weights_only=True)
        if saved["made_from"] != made_from:
            raise UsageError(
                f"{folder}: holds a run with other settings, data or models: choose another folder or remove it"
            )
        student.load_state_dict(saved["student"])
        optimizer.load_state_dict(saved["optimizer"])
        return [Epoch(*row) for row in saved["curve"]]
    except UsageError:
        raise
    except Exception as error:  # a pickle that was refused, a file that was cut, other shapes
        raise StorageError(f"{folder / CHECKPOINT}: cannot be resumed: {str(error).splitlines()[0]}") from error
