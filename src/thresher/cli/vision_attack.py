from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thresher.cli.options import Json, Threads
from thresher.cli.terminal import say, stderr, write_json
from thresher.cli.vision_train import Bars, Data, Model, Seed, Source, prepare, read_data
from thresher.errors import UsageError

if TYPE_CHECKING:
    from thresher.vision.robustness import Report


def attack(
    model: Model,
    data: Data,
    source: Source = Source(),  # noqa: B008
    attacks: Annotated[
        str,
        typer.Option(help="noise, fgsm, pgd20, pgd100, mifgsm, autoattack (standard), deepfool, cw; by commas."),
    ] = "fgsm,pgd20,mifgsm,deepfool",
    epsilons: Annotated[
        str | None,
        typer.Option(
            help="Largest change of a pixel, in [0, 1] or as 4/255. Default: 0.02,0.05,0.1 of grey images, "
            "2/255,4/255,8/255 of coloured ones.",
            show_default=False,
        ),
    ] = None,
    images: Annotated[int, typer.Option(help="Test images, evenly from all of them.", min=1)] = 1000,
    against: Annotated[
        str | None,
        typer.Option(
            help="Another model, as the teacher: attacked on the same images, and each with what was made for "
            "the other.",
            show_default=False,
        ),
    ] = None,
    check: Annotated[bool, typer.Option(help="Look for masked gradients, which make attacks fail.")] = True,
    batch: Annotated[int, typer.Option(help="Images attacked together.", min=1)] = 250,
    seed: Seed = 0,
    threads: Threads = None,
    json: Json = None,
) -> None:
    """Attack a classifier: which share of the test images it still classifies correctly.

    thresher vision attack smaller --data fashion-mnist --against teacher

    Of a folder of this project, what is found is also kept in it, for `thresher vision report`.
    """
    from thresher.vision.robustness import attack as run
    from thresher.vision.robustness import keep

    prepare(threads, None)
    classifier = source.load(model)
    rival = source.load(against, other=True) if against else None
    test = read_data(data, classifier.about.shape[1], classifier.about.shape[0], classifier.about.classes).test
    if len(test.classes) != len(classifier.about.classes):
        raise UsageError(f"the model has {len(classifier.about.classes)} classes, and the data {len(test.classes)}")
    values = _epsilons(epsilons or ("0.02,0.05,0.1" if classifier.about.shape[0] == 1 else "2/255,4/255,8/255"))
    with Bars() as bars:
        found = run(classifier, test, attacks, values, images, rival, check, batch, seed, bars)
    _show(found, against)
    if kept := keep(found, Path(model)):
        say(f"{kept} written")
    write_json(json, found.summary())


def _epsilons(text: str) -> list[float]:
    """`0.1,4/255` as numbers, each once. Raises UsageError."""
    found = []
    for part in text.split(","):
        above, _, below = part.partition("/")
        try:
            found.append(float(above) / float(below or 1))
        except (ValueError, ZeroDivisionError) as error:
            raise UsageError(f"--epsilons {text}: give numbers in [0, 1], as 0.1 or 4/255, by commas") from error
    return list(dict.fromkeys(found))


def _show(found: "Report", against: str | None) -> None:
    from rich import box
    from rich.table import Table

    table = Table(
        title=f"robust accuracy of {found.images} images, %, 95 % interval", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    columns = ["attack", "epsilon", "model"] + (["the other", "difference", "p"] if against else [])
    for name in columns:
        table.add_column(name, justify="left" if name == "attack" else "right", no_wrap=True)
    for row in found.rows:
        cells = [row.attack, f"{row.epsilon:.3g}", _percent(row.accuracy)]
        if row.rival is not None and row.difference is not None:
            cells += [_percent(row.rival), _percent(row.difference, "+"), f"{row.p:.2g}"]
        table.add_row(*cells)
    stderr.print(table)
    for d in found.distances:
        median = "median L2 distance " + ("none" if d["median"] is None else f"{d['median']:.3f}")
        say(f"{d['model']}, {d['attack']}: {median}, {d['failed']} of {d['attacked']} failed")
    for c in found.checks:
        say(f"{'passed' if c['passed'] else 'FAILED'}: {c['name']} ({_numbers(c['numbers'])})")


def _percent(interval: Any, sign: str = "") -> str:
    return f"{100 * interval.mean:{sign}.1f} ({100 * interval.low:{sign}.0f} to {100 * interval.high:{sign}.0f})"


def _numbers(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())
