from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thresher.cli import options as o
from thresher.cli.planned import Device, planned_shape, rates_of
from thresher.cli.terminal import say, stderr, write_json
from thresher.errors import UsageError

if TYPE_CHECKING:
    from thresher.kinetics.analysis import Floats
    from thresher.kinetics.grid import Cell, Grid
    from thresher.kinetics.published import Table
    from thresher.kinetics.traces import Trace

PUBLISHED = 562.5  # operations a byte in the published tables: a B200 in fp8
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

Files = Annotated[
    list[Path],
    typer.Argument(help="Result tables (.csv) or traces (.jsonl), or folders of them.", show_default=False),
]
OracleSearch = Annotated[
    bool, typer.Option("--oracle-search", help="Finding the best keys costs our topk nothing, as the paper counts.")
]
Tokenizer = Annotated[
    str | None, typer.Option(help="A model whose tokenizer counts the tokens of traces without lengths.")
]


def frontier(
    files: Files,
    device: Device = "b200-fp8",
    costs: Annotated[
        str | None,
        typer.Option(help="Tera-eFLOPs at which frontiers are read, as 562,1000. Default: 100 from --from to --to."),
    ] = None,
    least: Annotated[
        float | None, typer.Option("--from", help="Least Tera-eFLOPs. Default: those of the cheapest configuration.")
    ] = None,
    most: Annotated[
        float | None, typer.Option("--to", help="Most Tera-eFLOPs. Default: those of the dearest configuration.")
    ] = None,
    all_tables: Annotated[
        bool, typer.Option("--all", help="Also tables whose costs are doubted, and second ones of the same settings.")
    ] = False,
    tokenizer: Tokenizer = None,
    oracle_search: OracleSearch = False,
    resamples: Annotated[int, typer.Option(help="Of intervals.", min=10, max=100_000)] = 300,
    json: o.Json = None,
) -> None:
    """The most accuracy for a cost, of every model and method and of the best of them: pass@k, the paper's frontier (an
    oracle chooses for every question), and two honest ones.

    thresher scale frontier tables/*.csv --json -
    """
    import numpy as np
    from rich import box
    from rich.table import Column
    from rich.table import Table as Shown

    from thresher.kinetics.frontier import best_models, costs_between, growth, oracle_interval

    tables, traces = load(files, tokenizer, all_tables)
    intensity = intensity_of(device)
    grid = grid_by(tables, traces, intensity, oracle_search)
    if costs:
        at = np.array(sorted(_amounts(costs)))
    else:
        price = grid.cost("eflops")
        low = float(price.min()) if least is None else least
        at = costs_between(low, float(price.max()) * 1.001 if most is None else most)
    priced = (intensity, oracle_search, resamples)
    rows = [_row(grid, model, method, at, traces, *priced) for model, method in _pairs(grid)]
    found: dict[str, Any] = {"device": device, "costs": at.tolist(), "questions": len(grid.questions), "models": rows}
    for name, dense in (("dense", True), ("sparse", False)):
        part = grid.where(lambda c, dense=dense: (c.method == "dense") == dense)  # type: ignore[misc]
        if not part.configs:
            continue
        for axis in ("eflops", "flops"):
            best = best_models(part, at, axis)
            found.setdefault(name, {})[axis] = {"accuracy": best.accuracy.tolist(), "model": list(best.model)}
        intervals = oracle_interval(part, at, resamples=resamples)
        found[name]["interval"] = [[i.low, i.high] for i in intervals]
    try:
        grown = growth(grid, at, resamples=resamples)
        found["growth"] = {"budget": vars(grown.budget), "tokens": vars(grown.tokens), "points": grown.points}
    except UsageError as error:
        found["growth"] = {"none": str(error)}
    if str(json) != "-":
        ks = sorted({k for row in rows for k in row["pass_at_k"]})
        table = Shown(
            Column("", overflow="fold", ratio=1),
            title="a right one among k samples; tokens and Tera-eFLOPs of one",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        for name in (*(f"k={k}" for k in ks), "tokens", "cost"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            cells = [f"{row['pass_at_k'][k]:.3f}" if k in row["pass_at_k"] else "" for k in ks]
            label = f"{row['model']} {row['method']}"
            table.add_row(label, *cells, f"{row['tokens']:,.0f}", f"{row['cost_of_one']:,.4g}")
        stderr.print(table)
        heads = ("Tera-eFLOPs", "dense", "best model", "sparse", "best model")
        shown = Shown(*heads, title="frontier (oracle by question)", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for i in _few(len(at)):
            cells = [f"{at[i]:,.4g}"]
            for name in ("dense", "sparse"):
                part_of = found.get(name, {}).get("eflops")
                cells += [f"{part_of['accuracy'][i]:.3f}", part_of["model"][i] or "none"] if part_of else ["", ""]
            shown.add_row(*cells)
        stderr.print(shown)
        if "budget" in found["growth"]:
            b, t = found["growth"]["budget"], found["growth"]["tokens"]
            say(
                f"a cost twice as high: budget x {2 ** b['mean']:.2f} ({2 ** b['low']:.2f} to {2 ** b['high']:.2f}), "
                f"tokens x {2 ** t['mean']:.2f} ({2 ** t['low']:.2f} to {2 ** t['high']:.2f})"
            )
    write_json(json, found)


def load(files: list[Path], tokenizer: str | None, every: bool) -> "tuple[list[Table], list[Trace]]":
    """Tables and traces of files and folders; tables that are doubted, or there twice, are said and left out.

    Raises UsageError.
    """
    from thresher.kinetics.published import read_table, read_trace

    paths = [p for f in files for p in (sorted(f.iterdir()) if f.is_dir() else [f])]
    tables = [read_table(p) for p in paths if p.suffix == ".csv"]
    count = _counter(tokenizer) if tokenizer else None
    traces = [read_trace(p, count) for p in paths if p.suffix == ".jsonl"]
    if not tables and not traces:
        raise UsageError(f"{', '.join(map(str, files))}: no tables (.csv) and no traces (.jsonl)")
    kept: dict[tuple[str, str, str], Table] = {}
    for table in sorted(tables, key=lambda t: (t.copy != "", t.source)):
        key = (table.model, table.method, table.task)
        if every or not (table.doubt or key in kept):
            kept[(*key[:2], table.source) if key in kept else key] = table
        else:
            say(f"left out: {table.source}: {table.doubt or 'another table is of the same settings'}")
    return _by_size(list(kept.values())), traces


def _by_size(tables: "list[Table]") -> "list[Table]":
    """Models in the order in which they are listed, then by name."""
    from thresher.machine.shapes import DECODERS

    order = list(DECODERS)
    return sorted(tables, key=lambda t: (order.index(t.model) if t.model in order else len(order), t.model, t.source))


def _counter(tokenizer: str) -> Any:
    from transformers import AutoTokenizer

    from thresher.models.resolve import resolve

    known = AutoTokenizer.from_pretrained(resolve(tokenizer, say).folder)
    return lambda text: len(known.encode(text, add_special_tokens=False))


def grid_by(tables: "list[Table]", traces: "list[Trace]", intensity: float, oracle_search: bool) -> "Grid":
    """Everything on one device of so many operations a byte: costs of tables are those of a B200 in fp8, and their
    memory is made that of the device; those of traces follow from the law. Raises UsageError."""
    from dataclasses import replace

    from thresher.kinetics.grid import grid_of, table_cells, trace_cells

    cells: list[Cell] = []
    for table in tables:
        cells += [replace(c, memory=c.memory * intensity / PUBLISHED) for c in table_cells(table)]
    for trace in traces:
        shape = trace.shape or planned_shape(trace.model, "bf16")
        counts = [k for k in COUNTS if k <= trace.samples]
        cells += list(trace_cells(trace, shape, intensity, counts, oracle_search=oracle_search))
    return grid_of(cells)


def intensity_of(device: str) -> float:
    """Operations a byte."""
    flops, bandwidth = rates_of(device)
    return flops / bandwidth


def _pairs(grid: "Grid") -> list[tuple[str, str]]:
    return list(dict.fromkeys((c.model, c.method) for c in grid.configs))


def _row(
    grid: "Grid",
    model: str,
    method: str,
    costs: "Floats",
    traces: "list[Trace]",
    intensity: float,
    oracle_search: bool,
    resamples: int,
) -> dict[str, Any]:
    import numpy as np

    from thresher.kinetics.analysis import accuracies, lengths
    from thresher.kinetics.frontier import held_out, oracle, single
    from thresher.kinetics.grid import sample_costs

    part = grid.where(lambda c: (c.model, c.method) == (model, method))
    one = next(i for i, c in enumerate(part.configs) if c.samples == min(c.samples for c in part.configs))
    frontiers: dict[str, Any] = {}
    for axis in ("eflops", "flops"):
        fixed, chosen = single(part, costs, axis)
        frontiers[axis] = {
            "oracle": oracle(part, costs, axis).tolist(),
            "single": fixed.tolist(),
            "single_samples": [c.samples if c else None for c in chosen],
            "held_out": held_out(part, costs, axis, splits=50).tolist(),
        }
    row = {
        "model": model,
        "method": method,
        "pass_at_k": {c.samples: float(part.accuracy[i].mean()) for i, c in enumerate(part.configs)},
        "cost": {c.samples: float(part.cost("eflops")[i].mean()) for i, c in enumerate(part.configs)},
        "tokens": float(part.length[one].mean()),
        "cost_of_one": float(part.cost("eflops")[one].mean()),
        "compute_of_one": float(part.compute[one].mean()),
        "frontier": frontiers,
    }
    for trace in traces:
        if (trace.model, trace.method) == (model, method):
            found = accuracies(trace, [c.samples for c in part.configs], resamples)
            lasting = lengths(trace)
            row |= {"unended": lasting.unended, "lengths": vars(lasting)}
            spread = sample_costs(trace, trace.shape or planned_shape(trace.model, "bf16"), intensity, oracle_search)
            row["cost_quantiles"] = {q: float(np.quantile(spread, q)) for q in (0.05, 0.25, 0.5, 0.75, 0.95)}
            row["interval"] = {a.samples: [a.coverage.low, a.coverage.high] for a in found}
            row["majority"] = {a.samples: vars(a.majority) for a in found if a.majority}
    return row


def _amounts(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < x < float("inf") for x in found):
        raise UsageError(f"--costs {text}: give Tera-eFLOPs above 0, separated by commas")
    return found


def _few(count: int, most: int = 12) -> list[int]:
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})
