from pathlib import Path
from typing import Annotated

import typer

from thresher.cli.options import Json, Threads, numbers
from thresher.cli.terminal import say, write_json
from thresher.cli.vision_hierarchy import Fall, Flops, Method, Multiple, Parameters
from thresher.cli.vision_train import Bars, DataOrNot, Lr, Precision, Seed, Source, prepare, read_data
from thresher.errors import UsageError


def extract(
    model: Annotated[
        str, typer.Argument(help="What `thresher vision hierarchy` wrote, or a whole model as for the other commands.")
    ],
    classes: Annotated[str, typer.Option(help="Names of the classes, between commas.")],
    out: Annotated[Path, typer.Option(help="A folder for the sub-network: weights, ONNX, torch.export.")],
    data: DataOrNot = None,
    source: Source = Source(),  # noqa: B008
    flops: Flops = 0.5,
    parameters: Parameters = 0.4,
    fall: Fall = 0.01,
    method: Method = "taylor",
    multiple: Multiple = 8,
    epochs: Annotated[int, typer.Option(help="Of fine-tuning on --data.", min=1)] = 8,
    batch: Annotated[int, typer.Option(help="Images of a step.", min=2)] = 128,
    lr: Lr = 0.05,
    pad: Annotated[int, typer.Option(help="Pixels that images are moved by at random, and mirrored.", min=0)] = 2,
    batches: Annotated[str, typer.Option(help="Batch sizes to measure time at.")] = "1,32",
    seed: Seed = 0,
    precision: Precision = "float32",
    threads: Threads = None,
    json: Json = None,
) -> None:
    """The smallest sub-network that tells a few classes apart.

    thresher vision extract parts --classes "Sneaker,Sandal,Ankle boot" --data fashion-animals --out shoes

    With --data, which need have no other classes, the whole network is pruned for exactly these and fine-tuned from
    itself. Of a hierarchy, the leaf that holds them is taken if it is smaller, or if there is no --data.
    """
    from dataclasses import asdict

    from thresher.vision.dissect import Settings
    from thresher.vision.dissected import PARTS
    from thresher.vision.extraction import extract as run
    from thresher.vision.finetune import Settings as Tuning
    from thresher.vision.layers import count_macs, count_parameters
    from thresher.vision.models import Classifier, read_description

    names = [name.strip() for name in classes.split(",") if name.strip()]
    if not names:
        raise UsageError('--classes names two or more, as "sneaker,sandal"')
    sizes = tuple(numbers("batches", batches))
    settings = Settings(fall, flops, parameters, multiple=multiple, method=method)
    tune = Tuning("soft", epochs, batch, lr, pad=pad, seed=seed, precision=precision)
    prepare(threads, out)
    begin: Path | Classifier = Path(model) if (Path(model) / PARTS).is_file() else source.load(model)
    about = read_description(begin) if isinstance(begin, Path) else begin.about
    images = read_data(data, about.shape[1], about.shape[0]) if data is not None else None
    with Bars() as bars:
        made, leaf = run(begin, names, out, images, settings, tune, sizes, source.trust, bars)
    macs, count = count_macs(made.module, made.example), count_parameters(made.module)
    found = {"classes": list(made.about.classes), "macs": macs, "parameters": count}
    say(f"{', '.join(made.about.classes)}: {macs:,} multiply-adds of an image, {count:,} parameters, in {out}")
    if leaf is not None:
        found["measured"] = asdict(leaf)
        say(f"accuracy {100 * leaf.accuracy.mean:.2f} %, the whole network among these {100 * leaf.whole.mean:.2f} %; "
            f"{100 * leaf.flops:.0f} % of its FLOPs, {100 * leaf.parameters:.0f} % of its parameters")  # fmt: skip
        for size, (before, after) in leaf.seconds.items():
            say(f"time of {size}: {1000 * before:.2f} to {1000 * after:.2f} ms, {100 * after / before:.0f} %")
    write_json(json, found)
