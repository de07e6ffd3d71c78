from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thresher.cli.options import Json, Threads, shell_word
from thresher.cli.terminal import progress_bar, say, stderr, write_json
from thresher.errors import StorageError

if TYPE_CHECKING:
    from thresher.vision.data import Splits
    from thresher.vision.models import Classifier

Data = Annotated[
    str,
    typer.Option(
        help="fashion-mnist, animals, fashion-animals (both), or a folder: train/CLASS/*.png and test/CLASS/*.png, or "
        "CLASS/*.png alone."
    ),
]
DataOrNot = Annotated[str | None, typer.Option(help=Data.__metadata__[0].help, show_default=False)]
Lr = Annotated[float, typer.Option(help="Highest learning rate; it falls to 0.", min=0)]
Seed = Annotated[int, typer.Option(help="Of what is drawn.", min=0)]
Precision = Annotated[
    str,
    typer.Option(
        help="Of training: float32, or bf16, which is faster on processors with AMX and slower on those without bf16."
    ),
]


@dataclass(frozen=True)
class Source:
    """Where a classifier comes from."""

    weights: Annotated[
        Path | None,
        typer.Option(
            help="A state dict for timm:NAME or MODULE:FUNCTION: safetensors, or torch's without pickled objects."
        ),
    ] = None
    size: Annotated[
        int | None, typer.Option(help="Pixels of an image's side, where the model does not say.", min=1)
    ] = None
    trust: Annotated[str | None, typer.Option(help="A MODULE:FUNCTION that a folder of this project may run.")] = None

    def load(self, model: str, other: bool = False) -> "Classifier":
        """The model, or an `other` one beside it, which --weights does not belong to. Raises ModelError."""
        from thresher.vision.models import load_classifier

        with stderr.status("loading the model"):
            return load_classifier(model, None if other else self.weights, self.size, self.trust)


Model = Annotated[
    str,
    typer.Argument(
        help="A folder of this project or of transformers, a hub id, timm:NAME, or MODULE:FUNCTION (Python code that "
        "makes one)."
    ),
]


def read_data(name: str, size: int | None, channels: int = 3, classes: tuple[str, ...] = ()) -> "Splits":
    """The data, pictures of a folder in this size; of a model's `classes` alone, where there are others too."""
    from thresher.vision.data import for_classes, load_splits

    with stderr.status("reading the images"):
        return for_classes(load_splits(name, size, channels=channels), classes)


def prepare(threads: int | None, out: Path | None) -> None:
    """Threads, the folder, and no messages but ours."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if threads:
        torch.set_num_threads(threads)
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{out}: cannot be a folder: {error.strerror}") from error


class Bars:
    """One bar after another, by name."""

    def __init__(self) -> None:
        self.shown: tuple[str, Any, Any] | None = None

    def __call__(self, what: str, done: int, total: int) -> None:
        if self.shown is None or self.shown[0] != what:
            self.close()
            context = progress_bar(what, "steps")
            self.shown = what, context, context.__enter__()
        self.shown[2](done, total)

    def close(self) -> None:
        if self.shown is not None:
            self.shown[1].__exit__(None, None, None)
            self.shown = None

    def __enter__(self) -> "Bars":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def train(
    net: Annotated[str, typer.Argument(help="vgg or resnet (for pictures of about 28 pixels), or resnet18.")],
    data: Data,
    out: Annotated[Path, typer.Option(help="A folder for the model.")],
    epochs: Annotated[int, typer.Option(help="Passes over the training images.", min=1)] = 8,
    batch: Annotated[int, typer.Option(help="Images of a step.", min=2)] = 128,
    lr: Lr = 0.1,
    pad: Annotated[
        int, typer.Option(help="Pixels that images are moved by at random, and mirrored; 0 for neither.", min=0)
    ] = 2,
    size: Annotated[
        int | None,
        typer.Option(help="Pixels of a picture's side, of a folder. Default: 224.", min=1, show_default=False),
    ] = None,
    seed: Seed = 0,
    precision: Precision = "float32",
    threads: Threads = None,
    json: Json = None,
) -> None:
    """Train a CNN to have something to compress. Interrupted, the same command goes on.

    thresher vision train resnet --data fashion-mnist --out teacher
    """
    from thresher.vision.finetune import Settings
    from thresher.vision.models import new_classifier
    from thresher.vision.pipeline import train as run

    settings = Settings(
        objective="cross-entropy", epochs=epochs, batch=batch, lr=lr, pad=pad, seed=seed, precision=precision
    )
    prepare(threads, out)
    images = read_data(data, size)
    shape = images.train.pixels.shape
    classifier = new_classifier(net, images.train.classes, (shape[1], shape[2], shape[3]), seed)
    with Bars() as bars:
        history = run(classifier, images, settings, out, bars)
    if not history:  # one of several processes, and not the first
        return
    say(f"accuracy {100 * history['accuracy']['test']:.2f} % of {len(images.test):,} test images: {out}")
    word = shell_word(out)
    stderr.print(f"next: thresher vision tucker {word} --data {quote(data)} --distill --out smaller", style="dim")
    write_json(json, history)
