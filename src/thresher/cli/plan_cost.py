from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from thresher.cli import options as o
from thresher.cli.planned import Device, PlannedModel, lengths_in, planned_decoder, planned_shape, rates_of
from thresher.cli.terminal import stderr, write_json
from thresher.errors import UsageError


def cost(
    model: PlannedModel = "qwen3-8b",
    device: Device = "b200-fp8",
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.", min=0)] = 128,
    lengths: Annotated[
        Path | None, typer.Option(help="A file of lengths of answers in tokens, one a line: costs are means over them.")
    ] = None,
    generate: Annotated[str, typer.Option(help="Lengths of answers where there is no file, as 4096,8192.")] = "4096",
    samples: Annotated[str, typer.Option(help="Answers to a question, as 1,8,32.")] = "1",
    attention: Annotated[
        list[str] | None,
        typer.Option(
            help="How the cache is read, separated by ; or given several times: dense, topk256 (by an oracle), "
            "block16x64 (64 blocks of 16), or a method of `thresher methods`. Default: dense."
        ),
    ] = None,
    weights: Annotated[
        str, typer.Option(help="Number format of the weights: bf16, fp8, int8, q4 or float32.")
    ] = "bf16",
    kv: Annotated[str | None, typer.Option(help="Of the KV cache, where it is another: bf16, fp8, int8.")] = None,
    batch: Annotated[
        float | None,
        typer.Option(help="Sequences at once, which share reading the weights. Default: so many that it is nothing."),
    ] = None,
    until_last: Annotated[
        bool, typer.Option("--until-last", help="Read a shared prompt until the longest of the samples ends.")
    ] = False,
    prefill: Annotated[bool, typer.Option("--prefill", help="Count reading the prompt.")] = False,
    json: o.Json = None,
) -> None:
    """What answers cost when memory counts: the eFLOPs of Kinetics.

    thresher plan cost --model qwen3-8b --device b200-fp8 --prompt 177 --samples 1,32 --attention "dense;topk256"

    compute and memory are in Tera-eFLOPs: operations, and bytes times the operations that the device does meanwhile.
    """
    from dataclasses import replace

    from rich.table import Table

    from thresher.kinetics.law import Terms, parse_reading, run_cost

    counts = o.numbers("samples", samples)
    listed = lengths_in(lengths) if lengths else [float(n) for n in o.numbers("generate", generate)]
    readings = [parse_reading(part) for part in o.listed("attention", attention, "dense")]
    if batch is not None and not batch > 0:
        raise UsageError(f"--batch {batch}: give a number above 0")
    shape, decoder = planned_shape(model, weights, kv), planned_decoder(model)
    if decoder.parameters and not shape.experts:
        shape = replace(shape, weight_count=round(decoder.parameters))
    elif decoder.parameters and shape.experts:
        always = decoder.parameters - shape.experts.used * shape.experts.weight_count
        shape = replace(shape, weight_count=round(always))
    flops, bandwidth = rates_of(device)
    intensity = flops / bandwidth
    terms = Terms(batch, until_last, prefill)
    rows: list[dict[str, Any]] = []
    for reading in readings:
        for n in counts:
            found = run_cost(shape, reading, prompt, listed, n, terms)
            total = found.total
            rows.append(
                {
                    "attention": str(reading),
                    "samples": n,
                    "compute": total.flops * 1e-12,
                    "memory": intensity * total.bytes * 1e-12,
                    "total": found.eflops(intensity) * 1e-12,
                    "seconds": found.seconds(flops, bandwidth),
                    "seconds_overlapped": found.seconds(flops, bandwidth, additive=False),
                }
            )
    if str(json) != "-":
        table = Table(
            "attention",
            *("samples", "compute", "memory", "together", "of it memory", "seconds"),
            title=f"{model} on {device}: Tera-eFLOPs of a question ({intensity:.1f} operations a byte)",
        )
        for row in rows:
            table.add_row(
                row["attention"],
                str(row["samples"]),
                *(f"{row[name]:,.4g}" for name in ("compute", "memory", "total")),
                f"{100 * row['memory'] / row['total']:.0f} %",
                f"{row['seconds']:,.3g}",
            )
        stderr.print(table)
    settings = {"model": model, "device": device, "intensity": intensity, "prompt": prompt, "lengths": len(listed)}
    write_json(json, settings | {"terms": asdict(terms), "rows": rows} | _of_one(rows))


def _of_one(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A single answer is also at the top: `compute` and `memory`."""
    return {name: rows[0][name] for name in ("compute", "memory", "total")} if len(rows) == 1 else {}
