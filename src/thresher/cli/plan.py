from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thresher.cli import options as o
from thresher.cli.plan_cost import cost
from thresher.cli.plan_speculation import speculation
from thresher.cli.planned import Device, lengths_in, planned_decoder, planned_shape
from thresher.cli.terminal import say, stderr, write_json
from thresher.errors import UsageError

if TYPE_CHECKING:
    from thresher.evaluation.calibrate import Calibration
    from thresher.kinetics.check import Check
    from thresher.kinetics.law import Reading
    from thresher.kinetics.planner import How, Machine, Model, Plan
    from thresher.kinetics.traces import Trace

_LONGEST_TIMED = 32768  # tokens: beyond, time grows with the bytes

plan = typer.Typer(help="Know what it will cost before you run it.", invoke_without_command=True)


@plan.callback()
@o.with_options
def plans(
    context: typer.Context,
    model: Annotated[
        str, typer.Option(help="Models to choose from, separated by commas: published shapes, or models as everywhere.")
    ] = "smollm2-135m-instruct",
    device: Device = "this",
    devices: Annotated[int, typer.Option(help="Devices that share a model (tensor parallel).", min=1)] = 1,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.", min=0)] = 1024,
    generate: Annotated[str, typer.Option(help="Most tokens of an answer, e.g. 2048,8192: each is a plan.")] = "1024",
    lengths: Annotated[
        Path | None,
        typer.Option(help="A file of lengths of answers, one a line. Default: those of the traces, else --generate."),
    ] = None,
    samples: Annotated[str, typer.Option(help="Answers to a question, e.g. 1,4,16: each is a plan.")] = "1",
    attention: Annotated[
        list[str] | None,
        typer.Option(
            help="How the cache is read, separated by ; or given several times: dense, topk256 and block16x64 (as the "
            "paper counts them), or a method of `thresher methods`. Default: dense;auto."
        ),
    ] = None,
    weights: Annotated[str, typer.Option(help="Number formats of the weights, e.g. bf16,int8.")] = "bf16",
    kv: Annotated[str | None, typer.Option(help="Number format of the KV cache, where it is another.")] = None,
    batch: Annotated[int, typer.Option(help="Questions answered at once.", min=1)] = 1,
    acceptance: Annotated[
        float | None,
        typer.Option(help="Also plan drafts by each sparse method, of which such a share stands.", min=0, max=1),
    ] = None,
    traces: Annotated[
        list[Path] | None, typer.Option(help="Traces that say how often answers are right; several times.")
    ] = None,
    judge: Annotated[
        str, typer.Option(help="Which of the samples counts: best (by a perfect verifier), or majority.")
    ] = "best",
    target: Annotated[float | None, typer.Option(help="Accuracy to reach, by the traces.", min=0, max=1)] = None,
    latency: Annotated[float | None, typer.Option(help="Most seconds until the answers are there.", min=0)] = None,
    budget: Annotated[float | None, typer.Option(help="Most Tera-eFLOPs of a question.", min=0)] = None,
    memory: Annotated[
        float | None, typer.Option(help="Most GB of weights and caches. Default: what the device has.", min=0)
    ] = None,
    efficiency: Annotated[float, typer.Option(help="Share of its peaks that a device reaches.")] = 1.0,
    overlapped: Annotated[
        bool, typer.Option("--overlapped", help="Arithmetic and memory at once (roofline), not one after the other.")
    ] = False,
    price: Annotated[float | None, typer.Option(help="Money an hour of all devices.", min=0)] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Also run the plans' models here, and hold predicted ms a token to it.")
    ] = False,
    rows: Annotated[int, typer.Option(help="Plans that are shown.", min=1)] = 15,
    json: o.Json = None,
) -> None:
    """Rank what could be run: model, attention, samples x most tokens; TeFLOPs are Tera-eFLOPs of a question.

    thresher plan --model qwen3-4b,qwen3-8b --device h100 --generate 16384 --samples 1,8 --attention "dense;topk512"

    Without traces plans are ranked by time; with them by how often answers are right, or by the time to --target.
    """
    if context.invoked_subcommand:
        return
    from thresher.kinetics.law import Reading, parse_reading
    from thresher.kinetics.planner import Limits, Model, Work, plan_of, rank, with_accuracy
    from thresher.kinetics.published import read_trace

    if judge not in ("best", "majority"):
        raise UsageError(f"--judge {judge}: choose best or majority")
    if check and device != "this":
        raise UsageError("--check runs the model here: use it with --device this")
    if not 0 < efficiency <= 1:
        raise UsageError(f"--efficiency {efficiency}: give a share above 0, up to 1")
    if target is not None and not traces:
        raise UsageError(
            "--target needs --traces that say how often answers are right; `thresher scale run` makes some"
        )
    counts, caps = o.numbers("samples", samples), o.numbers("generate", generate)
    readings = list(dict.fromkeys(map(parse_reading, o.listed("attention", attention, "dense;auto"))))
    known = [read_trace(path) for path in traces or []]
    models = [
        Model(name, form, planned_shape(name, form, kv))
        for name in o.listed("model", [model.replace(",", ";")], "")
        for form in o.listed("weights", [weights.replace(",", ";")], "")
    ]
    machine = _machine(device, devices, efficiency, not overlapped, price)
    if device == "this":
        at_once = sorted({1, *(n * batch for n in counts)})
        machine = _calibrated(machine, models, readings, at_once, prompt + max(caps))
    given = lengths_in(lengths) if lengths else None
    made: list[Plan] = []
    for one in models:
        for reading in readings:
            lasting = given or _lengths_of(known, one.name, str(reading))
            for cap in caps:
                work = Work(prompt, lasting or [float(cap)], batch)
                for n in counts:
                    made.append(with_accuracy(plan_of(one, reading, n, cap, work, machine), known, judge))
                    if acceptance is not None and reading != Reading():
                        drafted = plan_of(one, reading, n, cap, work, machine, acceptance)
                        if drafted.gamma:
                            made.append(with_accuracy(drafted, known, judge))
    unlimited = float("inf")
    limits = Limits(
        memory=machine.device.memory * devices if memory is None else memory * 1e9,
        seconds=unlimited if latency is None else latency,
        eflops=unlimited if budget is None else budget,
        accuracy=target,
    )
    ranking = rank(made, limits)
    if str(json) != "-":
        _show(ranking.plans[:rows], f"{device}, prompt {prompt:,}, {batch} question{'s' if batch > 1 else ''} at once")
        say(ranking.why, style="bold")
    checks = _checks(models, readings, prompt, caps, counts, batch, machine) if check else []
    settings = {"device": device, "devices": devices, "prompt": prompt, "batch": batch}
    checked = {"check": [asdict(c) | {"error": c.error} for c in checks]} if check else {}
    write_json(json, settings | {"why": ranking.why, "plans": [asdict(p) for p in ranking.plans]} | checked)


plan.command()(o.with_options(cost))
plan.command()(o.with_options(speculation))


def _machine(name: str, devices: int, efficiency: float, additive: bool, price: float | None) -> "Machine":
    from thresher.kinetics.planner import Machine
    from thresher.machine.devices import Device as Known
    from thresher.machine.devices import device as known_device
    from thresher.machine.memory import available_memory

    if name != "this":
        return Machine(known_device(name), devices, efficiency, additive, price=price)
    if devices != 1 or efficiency != 1:
        raise UsageError("--device this is one device, and its rates are measured")
    # Rates follow when layers are timed.
    here = Known("this", 1.0, 1.0, float(available_memory()), float("nan"), "")
    return Machine(here, price=price)


def _calibrated(
    machine: "Machine", models: "list[Model]", readings: "list[How]", sequences: list[int], longest: int
) -> "Machine":
    """With layers timed that have the shapes of the models, up to so many tokens of context."""
    from dataclasses import replace

    from thresher.attention.base import AttentionMethod
    from thresher.evaluation.calibrate import calibrate
    from thresher.kinetics.check import measured_seconds
    from thresher.kinetics.law import Reading

    for reading in readings:
        if isinstance(reading, Reading) and reading != Reading():
            raise UsageError(f"attention {reading}: an oracle does not run here; use a method of `thresher methods`")
    methods = [r for r in readings if isinstance(r, AttentionMethod)]
    top = max(64, min(longest, _LONGEST_TIMED))
    contexts = sorted({min(512, top), max(64, top // 4), top})
    found: dict[Model, Calibration] = {}
    for model in models:
        with stderr.status(f"{model.name}: timing layers of its shape") as status:

            def tell(message: str, name: str = model.name, status: Any = status) -> None:
                status.update(f"{name}: {message}")

            decoder = planned_decoder(model.name)
            found[model] = calibrate(decoder, model.weights, methods, sequences, contexts, tell)
    profile = next(iter(found.values())).profile
    device = replace(machine.device, flops=profile.matmul, bandwidth=profile.read)
    return replace(machine, device=device, measured=measured_seconds(found))


def _lengths_of(traces: "list[Trace]", model: str, method: str) -> list[float] | None:
    """How long the answers of a model and method are, where traces tell: those of sparse methods are longer."""
    for trace in traces:
        if (trace.model, trace.method) == (model, method):
            return [s.length for q in trace.questions for s in q.samples]
    return None


def _checks(
    models: "list[Model]",
    readings: "list[How | Reading]",
    prompt: int,
    caps: list[int],
    counts: list[int],
    batch: int,
    machine: "Machine",
) -> "list[Check]":
    from rich import box
    from rich.table import Table

    from thresher.kinetics.check import check_passes, median_error

    contexts = sorted({max(1, prompt), *(prompt + cap for cap in caps)})
    sequences = sorted({n * batch for n in counts})
    found = [c for m in models for c in check_passes(m, readings, contexts, sequences, machine, say)]
    table = Table(title="one pass", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", overflow="fold", ratio=1)
    for name in ("tokens", "batch", "predicted ms", "measured ms", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    for c in found:
        numbers = (
            f"{c.context:,}",
            str(c.batch),
            f"{c.predicted_ms:.1f}",
            f"{c.measured_ms:.1f}",
            f"{100 * c.error:+.0f} %",
        )
        table.add_row(f"{c.model} {c.method}", *numbers)
    stderr.print(table)
    say(f"median error {100 * median_error(found):.0f} % of {len(found)} passes", style="bold")
    return found


def _show(plans: "list[Plan]", title: str) -> None:
    from rich import box
    from rich.table import Table

    extra = [
        *(["kJ"] if any(p.joules is not None for p in plans) else []),
        *(["money"] if any(p.money is not None for p in plans) else []),
        *(["right"] if any(p.accuracy for p in plans) else []),
    ]
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("plan", overflow="fold", ratio=1)
    several = len({p.weights for p in plans}) > 1
    for name in ("TeFLOPs", "s", "ms/tok", "tok/s", "GB", *extra):
        table.add_column(name, justify="right", no_wrap=True)
    for p in plans:
        numbers = (p.eflops, p.seconds, p.ms_per_token, p.tokens_per_second, p.memory / 1e9)
        drafts = f" + {p.gamma} drafted" if p.gamma else ""
        label = f"{p.model}{f' {p.weights}' if several else ''} {p.method}{drafts}, {p.samples} x {p.cap:,}"
        values: list[Any] = [label, *(_digits(x) for x in numbers)]
        if "kJ" in extra:
            values.append("" if p.joules is None else _digits(p.joules / 1e3))
        if "money" in extra:
            values.append("" if p.money is None else _digits(p.money))
        if "right" in extra:
            a = p.accuracy
            values.append(f"{a.mean:.3f} ({a.low:.2f} to {a.high:.2f})" if a else "")
        table.add_row(*values)
    stderr.print(table)


def _digits(x: float) -> str:
    """All before the point, and some behind it of small numbers."""
    return f"{x:.2e}" if x >= 1e6 else f"{x:.0f}" if x >= 10 else f"{x:.3g}"
