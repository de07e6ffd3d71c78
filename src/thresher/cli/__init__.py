"""The command line: one file a command, no logic of its own."""

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from thresher.cli import start
from thresher.cli.ask import ask
from thresher.cli.bench import bench
from thresher.cli.doctor import doctor
from thresher.cli.eval import evaluate
from thresher.cli.fidelity import fidelity
from thresher.cli.generate import generate
from thresher.cli.info import info
from thresher.cli.methods import methods
from thresher.cli.mosaic import mosaic
from thresher.cli.options import with_options
from thresher.cli.plan import plan
from thresher.cli.read import read
from thresher.cli.scale import scale
from thresher.cli.streams import prepare_streams
from thresher.cli.vision import vision

app = typer.Typer(
    name="thresher",
    help="Read a long document once, keep its KV cache as a file, ask it anything, fast, on a CPU.\n\n"
    "Start with: thresher read BOOK.txt -o book.kv, then: thresher ask book.kv 'What happens?'",
    no_args_is_help=True,
    add_completion=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"thresher {version('thresher')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


for command in (read, ask, generate, info, methods, doctor):
    app.command()(with_options(command))
evaluate.command()(with_options(fidelity))
app.add_typer(bench, name="bench")
app.add_typer(plan, name="plan")
app.add_typer(scale, name="scale")
app.add_typer(mosaic, name="mosaic")
app.add_typer(vision, name="vision")
app.add_typer(evaluate, name="eval")


def main() -> None:
    """The process `thresher`."""
    prepare_streams()
    sys.exit(start.run(app, sys.argv[1:]))
