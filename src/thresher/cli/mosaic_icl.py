from pathlib import Path
from typing import Annotated

import typer

from thresher.cli.options import Json, Threads, listed, numbers
from thresher.cli.terminal import progress_bar, say, write_json


def icl(
    out: Annotated[
        Path, typer.Option(help="A folder for icl.jsonl, which is gone on with, and the curves as icl.png.")
    ],
    automata: Annotated[str, typer.Option(help="Automata in training, separated by commas.")] = "100,500",
    arch: Annotated[
        str, typer.Option(help="What is trained, separated by commas: mosaic, gpt (a transformer).")
    ] = "mosaic,gpt",
    seeds: Annotated[int, typer.Option(help="Trainings of each kind, with seeds 0, 1 and so on.", min=1)] = 1,
    epochs: Annotated[int, typer.Option(help="An epoch has a new instance of every automaton.", min=1)] = 200,
    layers: Annotated[int, typer.Option(help="Of both architectures.", min=1)] = 2,
    width: Annotated[int, typer.Option(help="Of both architectures.", min=1)] = 128,
    heads: Annotated[int, typer.Option(help="Of both architectures.", min=1)] = 8,
    lr: Annotated[float, typer.Option(help="The highest learning rate.")] = 5e-4,
    batch: Annotated[int, typer.Option(help="Instances of a step.", min=1)] = 32,
    held_out: Annotated[
        int, typer.Option(help="Automata that are never trained on: a half for the test, a half for validation.", min=2)
    ] = 500,
    threads: Threads = None,
    json: Json = None,
) -> None:
    """Train small models to learn random automata in context, and measure them on automata they never saw.

    thresher mosaic icl --out icl --automata 100,500 --epochs 60

    Interrupted, the same command goes on behind the last training that was done. More --automata, --arch and --seeds
    add to what is there.
    """
    from dataclasses import asdict
    from functools import partial

    import torch

    from thresher.mosaics.icl import ARCHITECTURES, Settings, of_seeds, plot
    from thresher.mosaics.icl import run as run_experiment

    counts = numbers("automata", automata)
    architectures = listed("arch", [arch.replace(",", ";")], "")
    settings = Settings(epochs=epochs, layers=layers, width=width, heads=heads, lr=lr, batch=batch, held_out=held_out)
    if threads:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    bar = partial(progress_bar, unit="instances")
    report = run_experiment(architectures, counts, range(seeds), settings, out / "icl.jsonl", bar)
    for name, found in report.baselines.items():
        say(f"{name}: accuracy {found.accuracy:.3f}, TVD {found.tvd:.3f}")
    for architecture in architectures:
        accuracy, tvd = (of_seeds(report, architecture, name) for name in ("accuracy", "tvd"))
        for count in counts:
            say(
                f"{ARCHITECTURES[architecture]}, {count} automata: accuracy {_spread(accuracy[count])}, "
                f"TVD {_spread(tvd[count])}"
            )
    plot(report, out / "icl.png")
    say(f"{out / 'icl.png'} written")
    write_json(json, asdict(report))


def _spread(values: list[float]) -> str:
    """The mean, and of several values the lowest and highest."""
    mean = f"{sum(values) / len(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"
