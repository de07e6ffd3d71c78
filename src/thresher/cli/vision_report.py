from pathlib import Path
from typing import Annotated

import typer

from thresher.cli.options import Json, writable
from thresher.cli.terminal import say, write_json
from thresher.errors import UsageError


def report(
    folder: Annotated[Path, typer.Argument(help="What `thresher vision tucker` (and `attack`) or `hierarchy` wrote.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The page to write; a PNG and a CSV get its name. Default: report.html in the folder.",
            callback=writable,
            show_default=False,
        ),
    ] = None,
    json: Json = None,
) -> None:
    """One page of a compressed model: accuracy, robust accuracy, parameters, FLOPs, time, and every layer's ranks; of
    one taken apart: its tree, its leaves, and how its groups follow WordNet.

    thresher vision report smaller
    """
    from thresher.vision.report import write_report
    from thresher.vision.tree_report import is_tree, write_tree_report

    page = out or folder / "report.html"
    if page.suffix not in (".html", ".htm"):
        raise UsageError(f"--out {page}: the page is HTML; give a name that ends with .html")
    found = write_tree_report(folder, page) if is_tree(folder) else write_report(folder, page).raw()
    say(f"{page}, {page.with_suffix('.png')} and {page.with_suffix('.csv')} written")
    write_json(json, found)
