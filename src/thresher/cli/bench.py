from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from thresher.cli import options as o
from thresher.cli.terminal import clear_errors, say, write_json

bench = typer.Typer(help="Measure speed against what the machine could do at best, and against other engines.")

Peers = Annotated[str, typer.Option(help="Also run these in turn, at their best: transformers, llama.cpp.")]
Rounds = Annotated[int, typer.Option(help="Turns each engine gets.", min=1)]


@bench.command()
def decode(
    contexts: Annotated[str, typer.Option(help="Tokens in the cache, e.g. 512,2048,8192.")] = "512,2048,8192",
    batch: Annotated[str, typer.Option(help="Sequences decoded together, e.g. 1,8.")] = "1",
    peers: Peers = "",
    rounds: Rounds = 10,
    model: o.Model = "smollm2-135m-instruct",
    weights: o.Weights = "bf16",
    attention: o.Attention = "dense",
    threads: o.Threads = None,
    json: o.Json = None,
    debug: o.Debug = False,
) -> None:
    """Time one token at several context lengths.

    The floor is the time that reading weights and cached keys and values takes at the measured read bandwidth.
    """
    with clear_errors(debug):
        from thresher.evaluation.bench import bench_decode

        lengths, batches = o.numbers("contexts", contexts), o.numbers("batch", batch)
        llm, others = _prepare(model, weights, attention, threads, peers)
        _report(bench_decode(llm, lengths, batches, others, rounds, say), json, "tokens")


@bench.command()
def prefill(
    lengths: Annotated[str, typer.Option(help="Tokens of the prompt, e.g. 2048,6000.")] = "2048,6000",
    peers: Peers = "",
    rounds: Rounds = 3,
    model: o.Model = "smollm2-135m-instruct",
    weights: o.Weights = "bf16",
    threads: o.Threads = None,
    json: o.Json = None,
    debug: o.Debug = False,
) -> None:
    """Time reading a whole prompt.

    The floor is the time its arithmetic takes at the measured rate of our own matrix product.
    """
    with clear_errors(debug):
        from thresher.evaluation.bench import bench_prefill

        counts = o.numbers("lengths", lengths)
        llm, others = _prepare(model, weights, "dense", threads, peers)
        _report(bench_prefill(llm, counts, others, rounds, say), json, "tokens")


def _prepare(
    model: str, weights: str, attention: str, threads: int | None, peers: str
) -> tuple[Any, dict[str, Callable[[], Any]]]:
    from thresher.evaluation.peers import make_peers

    llm = o.ModelOptions(model, weights, attention, None, threads, True, False).load()
    import torch

    names = [p for p in peers.split(",") if p]
    return llm, make_peers(names, llm.source, weights, torch.get_num_threads())


def _report(results: Iterator[tuple[Any, Any]], json: Path | None, length: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    rows = list(results)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("engine", no_wrap=True)
    for name in (length, "batch", "ms", "min", "tok/s", "MB", "GB/s", "floor"):
        table.add_column(name, justify="right", no_wrap=True)
    for timing, machine in rows:
        digits = 2 if timing.median_ms < 1000 else 0
        table.add_row(
            timing.engine,
            str(timing.context),
            str(timing.batch),
            f"{timing.median_ms:.{digits}f}",
            f"{timing.min_ms:.{digits}f}",
            f"{timing.tokens_per_second:.0f}",
            f"{timing.bytes / 1e6:.0f}",
            f"{machine.read / 1e9:.1f}",
            f"{timing.floor_ratio:.2f}",
        )
    if str(json) != "-":
        Console().print(table)
        say("ms: median of one pass; MB: read by it; GB/s: measured read bandwidth; floor: ms / what it must take")
    write_json(json, [asdict(timing) | {"machine": asdict(machine)} for timing, machine in rows])
