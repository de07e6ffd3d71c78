import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thresher.cli.options import Json, Threads
from thresher.cli.terminal import progress_bar, say, stderr, write_json
from thresher.errors import StorageError, UsageError

if TYPE_CHECKING:
    from thresher.mosaics.moons import Experiment

PICTURE = "moons.png"


def moons(
    seeds: Annotated[
        str, typer.Option(help="A net of one head and one of three is trained for each, as 0,1,2.")
    ] = "0,1,2",
    steps: Annotated[int | None, typer.Option(help="Of training. Default: 1500.", min=1)] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences a step. Default: 5.", min=1)] = None,
    block: Annotated[int | None, typer.Option(help="Steps of time in a sequence. Default: 400.", min=1)] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Train as the paper did: 500 steps of 64 sequences of 800. Takes long.")
    ] = False,
    threads: Threads = None,
    out: Annotated[Path | None, typer.Option(help="A folder for the picture, moons.png.", show_default=False)] = None,
    json: Json = None,
) -> None:
    """Predict three moons with one head and with three: who knows them after which context, and does each head take a
    moon?

    thresher mosaic moons --out pictures
    """
    from dataclasses import asdict, replace

    import torch

    from thresher.mosaics.moons import PUBLISHED, Settings, run

    given = {name: value for name, value in (("steps", steps), ("batch", batch), ("block", block)) if value is not None}
    settings = replace(PUBLISHED if published else Settings(), **given)
    chosen = _seeds(seeds)
    if out:
        from thresher.evaluation.plots import load_pyplot

        load_pyplot()  # whether it is there, before anything takes long
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{out}: cannot be a folder: {error.strerror}") from error
    if threads:
        torch.set_num_threads(threads)
    with progress_bar("training", "steps") as bar:
        found = run(settings, chosen, progress=bar)
    if str(json) != "-":
        _show(found)
    if out:
        from thresher.mosaics.moons_plot import plot_moons

        plot_moons(found, out / PICTURE)
        say(f"{out / PICTURE} written")
    write_json(json, asdict(found))


def _show(found: "Experiment") -> None:
    from rich import box
    from rich.table import Table

    held_out = found.held_out
    periods = ", ".join(f"{p:.0f}" for p in held_out.periods)
    table = Table(
        title=f"held-out moons of {periods} steps, together {held_out.common:.0f}: mean error of the next step",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for name in ("heads", "seed", "before", "after", "known from", "loss", "dominance"):
        table.add_column(name, justify="right", no_wrap=True)
    for net in sorted(found.nets, key=lambda n: n.heads):
        errors = net.held_out
        known = "never" if errors.settled is None else str(errors.settled)
        cells = [f"{x:.3f}" for x in (errors.before, errors.after)]
        owned = f"{net.dominance:.1f}" if net.heads == 3 else ""
        table.add_row(str(net.heads), str(net.seed), *cells, known, f"{net.loss:.5f}", owned)
    stderr.print(table)
    three = [n.separated for n in found.nets if n.heads == 3]
    say("before, after: the common period; known from: the context from which on no error is large")
    say(f"each head took a moon of its own in {sum(three)} of {len(three)} nets of three heads")


def _seeds(text: str) -> list[int]:
    """`0,1,2` as numbers, each once. Raises UsageError."""
    parts = [p.strip() for p in text.split(",")]
    if not all(re.fullmatch("[0-9]{1,9}", p) for p in parts):
        raise UsageError(f"--seeds {text}: give whole numbers below 10^9, separated by commas")
    return list(dict.fromkeys(map(int, parts)))
