"""A trained CNN in, a smaller one out: decomposed, fine-tuned from its teacher, folded, exported and measured."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from thresher.errors import ModelError, UsageError
from thresher.vision import compress as compression
from thresher.vision import finetune as tuning
from thresher.vision.compress import compress, fold, latencies
from thresher.vision.data import Splits
from thresher.vision.decompose import LayerReport
from thresher.vision.layers import count_macs, count_parameters, weights_digest
from thresher.vision.models import DESCRIPTION, Classifier, load_classifier, save_classifier

DECOMPOSED, FINETUNED = "decomposed", "finetune"  # folders within the result's

Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class Outcome:
    """What `tucker` made. settings: of the decomposition; accuracy: of the test images, of `whole`, `decomposed`,
    `finetuned`, as far as there are; costs, seconds: {what or batch: [before, after]}; exports: file and how far its
    logits are off, relative to the largest."""

    classifier: Classifier
    layers: list[LayerReport]
    settings: dict[str, Any]
    reached: float | None
    costs: dict[str, tuple[int, int]]
    accuracy: dict[str, float]
    curve: list[tuning.Epoch]
    seconds: dict[int, tuple[float, float]]
    exports: dict[str, float]

    def summary(self) -> dict[str, Any]:
        """All of it but the model, for JSON."""
        said = {k: v for k, v in vars(self).items() if k not in ("classifier", "layers", "curve")}
        return said | {
            "layers": [asdict(r) for r in self.layers],
            "curve": [asdict(e) for e in self.curve],
            "device": f"{torch.get_num_threads()} threads",
        }


def check_data(classifier: Classifier, data: Splits) -> None:
    """Whether images and classes are those of the model. Raises UsageError."""
    shape = tuple(data.train.pixels.shape[1:])
    if shape != classifier.about.shape:
        raise UsageError(f"the model takes images of {classifier.about.shape}, and the data has {shape}")
    if len(data.train.classes) != len(classifier.about.classes):
        raise UsageError(
            f"the model has {len(classifier.about.classes)} classes, and the data {len(data.train.classes)}: "
            "its head must be trained on them first"
        )


def train(
    classifier: Classifier,
    data: Splits,
    settings: tuning.Settings,
    folder: Path,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Train a net from scratch, keep it in `folder`, and return what came of it (of several processes only the first
    has something to say). Raises UsageError, StorageError."""
    check_data(classifier, data)
    curve = tuning.finetune(
        classifier.module,
        data.train,
        data.validation,
        settings,
        folder=folder / FINETUNED,
        progress=lambda done, total: progress("training", done, total),
    )
    if not tuning.processes().is_main_process:
        return {}
    history = {
        "training": asdict(settings),
        "curve": [asdict(e) for e in curve],
        "accuracy": {"test": tuning.accuracy(classifier.module, data.test)},
    }
    save_classifier(Classifier(classifier.module, replace(classifier.about, history=history)), folder)
    return history


def tucker(
    whole: Classifier,
    settings: compression.Settings,
    folder: Path,
    data: Splits | None = None,
    tune: tuning.Settings | None = None,
    teacher: Classifier | None = None,
    folded: bool = True,
    batches: tuple[int, ...] = (1, 32),
    progress: Progress = silent,
) -> Outcome:
    """Decompose `whole`, fine-tune the result from it, or from another `teacher`, if told how (`tune`), and write it to
    `folder`.

    The decomposed model is kept in a folder of its own before it is tuned; a run that was stopped goes on. folded:
    batch norms become part of the convolutions at the end. Of several processes the first one measures and writes.
    Raises UsageError, ModelError, StorageError.
    """
    if data is not None:
        check_data(whole, data)
    elif tune is not None:
        raise UsageError("to fine-tune, data is needed")
    if teacher is not None and (teacher.about.shape, len(teacher.about.classes)) != (
        whole.about.shape,
        len(whole.about.classes),
    ):
        raise UsageError("a teacher takes the same images and has the same classes as the model")
    images = data.train.digest() if data else ""
    asked = json.loads(
        json.dumps({"settings": asdict(settings), "weights": weights_digest(whole.module), "images": images})
    )
    processes = tuning.processes()
    with processes.main_process_first():  # the others load what the first has written
        student, layers, reached = _decomposed(whole, settings, folder / DECOMPOSED, data, asked, progress)
    accuracy = {}
    if data is not None:
        accuracy["whole"] = tuning.accuracy(whole.module, data.test)
        accuracy["decomposed"] = tuning.accuracy(student.module, data.test)
    curve: list[tuning.Epoch] = []
    if tune is not None and data is not None:
        curve = tuning.finetune(
            student.module,
            data.train,
            data.validation,
            tune,
            (teacher or whole).module,
            [r.name for r in layers if r.kind != "kept"],
            folder / FINETUNED,
            lambda done, total: progress("fine-tuning", done, total),
        )
        accuracy["finetuned"] = tuning.accuracy(student.module, data.test)
    costs = {
        "macs": (count_macs(whole.module, whole.example), count_macs(student.module, student.example)),
        "parameters": (count_parameters(whole.module), count_parameters(student.module)),
    }
    if not processes.is_main_process:
        return Outcome(student, layers, asked["settings"], reached, costs, accuracy, curve, {}, {})
    timed = latencies(whole, student, batches)
    seconds = {batch: (times["before"], times["after"]) for batch, times in timed.items()}
    result = fold(student) if folded else student
    outcome = Outcome(result, layers, asked["settings"], reached, costs, accuracy, curve, seconds, {})
    history = {"tucker": outcome.summary(), "finetune": asdict(tune) if tune else None}
    exports = save_classifier(Classifier(result.module, replace(result.about, history=history)), folder, export=True)
    return replace(outcome, exports=exports)


def _decomposed(
    whole: Classifier,
    settings: compression.Settings,
    folder: Path,
    data: Splits | None,
    asked: dict[str, Any],
    progress: Progress,
) -> tuple[Classifier, list[LayerReport], float | None]:
    """The decomposed model of an earlier run that asked for the same, or a new one."""
    if (folder / DESCRIPTION).is_file():
        try:
            kept = load_classifier(str(folder), trusted=whole.about.source)
            said = kept.about.history
            if said["asked"] == asked:
                layers = [LayerReport(**{k: _pair(v) for k, v in r.items()}) for r in said["layers"]]
                return kept, layers, said["reached"]
        except (ModelError, KeyError, TypeError):
            pass  # what is there is of no use
    made = compress(
        whole,
        settings,
        data.train if data else None,
        lambda done, total: progress("trying ranks", done, total),
    )
    history = {"asked": asked, "layers": [asdict(r) for r in made.layers], "reached": made.reached}
    save_classifier(Classifier(made.classifier.module, replace(made.classifier.about, history=history)), folder)
    return made.classifier, made.layers, made.reached


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
