from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thresher.cli import options as o
from thresher.cli.planned import Device
from thresher.cli.scale_frontier import COUNTS, Files, OracleSearch, Tokenizer, grid_by, intensity_of, load
from thresher.cli.terminal import say, write_json, write_text
from thresher.errors import UsageError

if TYPE_CHECKING:
    from thresher.kinetics.published import Table
    from thresher.kinetics.traces import Trace


def report(
    files: Files,
    out: Annotated[Path, typer.Option(help="The page to write; a PNG and a CSV get its name.", callback=o.writable)],
    device: Device = "b200-fp8",
    tokenizer: Tokenizer = None,
    oracle_search: OracleSearch = False,
    resamples: Annotated[int, typer.Option(help="Of intervals.", min=10, max=100_000)] = 300,
    stop: Annotated[
        str, typer.Option(help="Also tell what stopping early would have saved: verifier or majority.")
    ] = "none",
    json: o.Json = None,
) -> None:
    """Draw traces, or published tables: one page with sliders that needs no network, a PNG and a CSV.

    thresher scale report traces --out report.html
    """
    from dataclasses import asdict

    from thresher.kinetics.adaptive import Stopping, saving
    from thresher.kinetics.analysis import accuracies
    from thresher.kinetics.report import Curve, caps_of, page, picture, table

    if out.suffix not in (".html", ".htm"):
        raise UsageError(f"--out {out}: the page is HTML; give a name that ends with .html")
    stopping = Stopping(stop)
    tables, traces = load(files, tokenizer, False)
    intensity = intensity_of(device)
    grid = grid_by(tables, [part for trace in traces for part in caps_of(trace)], intensity, oracle_search)
    curves = [
        Curve(f"{t.model} {t.method}", accuracies(t, [k for k in COUNTS if k <= t.samples], resamples))
        for t in (*traces, *_samples_of(tables))
    ]
    prompts = [q.prompt for t in traces for q in t.questions if q.prompt is not None]
    sources = f"{len(tables) + len(traces)} {'traces' if traces else 'tables'}, {len(grid.questions)} questions"
    text = page(grid, curves, intensity, sum(prompts) / len(prompts) if prompts else 128.0, f"{sources}, on {device}.")
    write_text(out, text)
    write_text(out.with_suffix(".csv"), table(grid))
    picture(grid, curves, out.with_suffix(".png"))
    say(f"{out}, {out.with_suffix('.png')} and {out.with_suffix('.csv')} written")
    savings = [asdict(saving(t, stopping)) | {"model": t.model, "method": t.method} for t in traces if stop != "none"]
    for s in savings:
        say(
            f"{s['model']} {s['method']}: stopping by {stop} takes {100 * s['samples']:.0f} % of the samples, "
            f"{100 * s['tokens']:.0f} % of the tokens, accuracy {s['accuracy']:.3f} for {s['accuracy_of_all']:.3f}"
        )
    write_json(json, {"page": str(out), "savings": savings})


def _samples_of(tables: "list[Table]") -> "list[Trace]":
    """Tables state how many samples are right, and no answers that could vote."""
    from thresher.kinetics.published import trace_of_table

    return [trace_of_table(table, lambda row: None) for table in tables]
