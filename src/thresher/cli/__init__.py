"""The command line: one file a command, no logic of its own."""

import typer

from thresher.cli.ask import ask
from thresher.cli.bench import bench
from thresher.cli.doctor import doctor
from thresher.cli.eval import evaluate
from thresher.cli.fidelity import fidelity
from thresher.cli.generate import generate
from thresher.cli.methods import methods
from thresher.cli.read import read

app = typer.Typer(
    name="thresher",
    help="Read a long document once, keep its KV cache as a file, ask it anything, fast, on a CPU.\n\n"
    "Start with: thresher read BOOK.txt -o book.kv, then: thresher ask book.kv 'What happens?'",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(read)
app.command()(ask)
app.command()(generate)
app.command()(methods)
app.command()(doctor)
evaluate.command()(fidelity)
app.add_typer(bench, name="bench")
app.add_typer(evaluate, name="eval")


def main() -> None:
    app()
