from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from thresher.cli import options as o
from thresher.cli.planned import Device, PlannedModel, planned_shape, rates_of
from thresher.cli.terminal import say, stderr, write_json
from thresher.errors import UsageError


def speculation(
    model: PlannedModel = "smollm2-135m",
    draft: Annotated[
        str,
        typer.Option(
            help="Who drafts: self:METHOD, the model with sparse attention, as self:auto; or model:NAME, a smaller one."
        ),
    ] = "self:auto",
    draft_budget: Annotated[
        int | None,
        typer.Option(
            help="Tokens of the cache that a draft reads, in place of what the method costs by itself.", min=1
        ),
    ] = None,
    acceptance: Annotated[
        str, typer.Option(help="Share of drafted tokens that stand: one rate, or one for each position, as 0.9,0.85.")
    ] = "0.8",
    batch: Annotated[str, typer.Option(help="Sequences decoded together.")] = "1,4,8,32,128",
    context: Annotated[str, typer.Option(help="Tokens in the cache of each.")] = "2048,8192,32768,131072",
    device: Device = "this",
    devices: Annotated[int, typer.Option(help="Devices that share the model (tensor parallel).", min=1)] = 1,
    efficiency: Annotated[
        float, typer.Option(help="Share of its peak that a device reaches; of this machine rates are measured.")
    ] = 1.0,
    overhead_ms: Annotated[
        float, typer.Option(help="Time of a pass that is neither memory nor arithmetic.", min=0)
    ] = 0.0,
    weights: Annotated[str, typer.Option(help="Number format of the weights: bf16, int8 or float32.")] = "bf16",
    plot: Annotated[
        Path | None, typer.Option(help="Draw speed-up over batch and context into this file.", callback=o.writable)
    ] = None,
    json: o.Json = None,
) -> None:
    """What drafts would gain, by the cost model of MagicDec: speed-up, best draft length, critical context.

    thresher plan speculation --model llama-3.1-8b --device a100 --devices 8 --draft self:streaming --draft-budget 512

    A pass reads the weights once and every cache once, whatever the number of new tokens; drafts pay where that is what
    takes the time.
    """
    from rich.table import Table

    from thresher.speculation.theory import Drafter, Gain, Hardware, best_gain, critical_length

    lengths, batches = o.numbers("context", context), o.numbers("batch", batch)
    rates = [_rate(part) for part in acceptance.split(",")]
    if not 0 < efficiency <= 1:
        raise UsageError(f"--efficiency {efficiency}: give a share above 0, up to 1")
    shape = planned_shape(model, weights)
    kind, _, subject = draft.partition(":")
    if kind == "self":
        from thresher.attention.registry import parse_method

        name, _, parameters = subject.partition(",")
        drafter = Drafter(shape, rates, parse_method(f"{name}:{parameters}" if parameters else name), draft_budget)
    elif kind == "model" and subject:
        drafter = Drafter(planned_shape(subject, weights), rates, None, draft_budget)
    else:
        raise UsageError(f"--draft {draft}: give self:METHOD or model:NAME")
    flops, bandwidth = rates_of(device)
    factor = 1.0 if device == "this" else devices * efficiency
    hardware = Hardware(flops * factor, bandwidth * factor, 1e-3 * overhead_ms)
    gains: dict[tuple[int, int], Gain] = {
        (b, n): best_gain(shape, drafter, hardware, b, n) for n in lengths for b in batches
    }
    critical = {str(n): critical_length(shape, hardware, n) for n in (1, 4)}
    if str(json) != "-":
        table = Table(
            "tokens", *(f"batch {b}" for b in batches), title=f"speed-up of {model} on {device} (draft length)"
        )
        for n in lengths:
            table.add_row(f"{n:,}", *(_cell(gains[b, n]) for b in batches))
        stderr.print(table)
        for tokens, length in critical.items():
            where = "at no context: arithmetic is always longer" if length is None else f"beyond {length:,.0f} tokens"
            say(f"{tokens} new to a sequence: passes of any batch wait for memory {where}")
    if plot:
        from thresher.evaluation.plots import plot_speedups

        plot_speedups({key: g.speedup for key, g in gains.items()}, f"{model}, {draft}, {device}", plot)
        say(f"{plot} written")
    settings: dict[str, Any] = {
        "model": model,
        "draft": draft,
        "acceptance": rates,
        "device": device,
        "machine": asdict(hardware),
    }
    rows = [{"batch": b, "context": n} | asdict(g) for (b, n), g in gains.items()]
    write_json(json, settings | {"critical_length": critical, "rows": rows})


def _cell(gain: Any) -> str:
    return f"{gain.speedup:.2f} ({gain.gamma})" if gain.gamma else "1 (none)"


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = -1.0
    if not 0 <= rate <= 1:
        raise UsageError(f"--acceptance {text}: give rates from 0 to 1")
    return rate
