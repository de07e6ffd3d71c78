from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from thresher.attention import DEFAULT_ATTENTION
from thresher.cli import options as o
from thresher.cli.eval import named_text
from thresher.cli.terminal import say, write_json
from thresher.errors import UsageError

bench = typer.Typer(help="Measure speed against what the machine could do at best, and against other engines.")

SYNTHETIC_ABOVE = 6000  # tokens that are really read

Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--attention",
        help="Methods to compare, separated by ; or given several times, e.g. 'dense;auto;lsh:K=10,L=120'. "
        f"Default: {DEFAULT_ATTENTION}.",
    ),
]
Peers = Annotated[
    str,
    typer.Option(
        help="Also run these in turn, at their best: transformers, llama.cpp (the same numbers as F16, BF16 or Q8_0), "
        "llama.cpp-file (the GGUF file as it lies)."
    ),
]
Rounds = Annotated[int, typer.Option(help="Turns each engine gets.", min=1)]


@bench.command()
@o.with_options
def decode(
    contexts: Annotated[str, typer.Option(help="Tokens in the cache, e.g. 512,2048,8192.")] = "512,2048,8192",
    batch: Annotated[str, typer.Option(help="Sequences decoded together, e.g. 1,8.")] = "1",
    peers: Peers = "",
    rounds: Rounds = 10,
    synthetic_cache: Annotated[
        bool,
        typer.Option(
            "--synthetic-cache",
            help=f"Read only {SYNTHETIC_ABOVE} tokens and fill longer contexts with rows drawn like those: times at "
            "32k and 128k without an hour of reading.",
        ),
    ] = False,
    text: Annotated[
        Path | None, typer.Option(help="What the cache is read from. Default: Paradise Lost, fetched once.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw time against context, with floors, into this file.", callback=o.writable)
    ] = None,
    model: o.Model = "smollm2-135m-instruct",
    weights: o.Weights = "bf16",
    attention: Methods = None,
    threads: o.Threads = None,
    json: o.Json = None,
) -> None:
    """Time one token at several context lengths.

    thresher bench decode --contexts 8192 --attention "dense;auto;lsh:K=10,L=120" --peers llama.cpp

    The floor is the time that reading weights, rows and indexes takes at the measured read bandwidth.
    """
    from thresher.attention.dense import Dense
    from thresher.attention.registry import parse_method
    from thresher.evaluation.bench import bench_decode

    lengths, batches = o.numbers("contexts", contexts), o.numbers("batch", batch)
    parts = [part.strip() for listed in attention or [DEFAULT_ATTENTION] for part in listed.split(";")]
    methods = [parse_method(part) for part in parts if part]
    content = named_text(text)[1] if text or any(method != Dense() for method in methods) else None
    above = SYNTHETIC_ABOVE if synthetic_cache else None
    llm, others = _prepare(model, weights, threads, peers)
    rows = _report(bench_decode(llm, lengths, batches, methods, others, rounds, say, content, above), json, "tokens")
    if above and max(lengths) > above:
        say(f"contexts above {above} tokens are synthetic: rows drawn like those of a text, and times only")
    if plot:
        from thresher.evaluation.plots import plot_timings

        plot_timings([timing for timing, _ in rows], plot)


@bench.command()
@o.with_options
def attention(
    contexts: Annotated[str, typer.Option(help="Tokens in the cache, e.g. 32768,131072.")] = "32768",
    heads: Annotated[str, typer.Option(help="Query heads x KV heads x head_dim.")] = "32x8x128",
    attention: Methods = None,
    rounds: Rounds = 10,
    threads: o.Threads = None,
    json: o.Json = None,
) -> None:
    """Time attention alone, one layer, over synthetic keys and values in bf16. Dense is always run too.

    thresher bench attention --heads 32x8x128 --contexts 131072 --attention "auto;lsh:K=10,L=110"
    """
    import torch

    from thresher.errors import UsageError
    from thresher.evaluation.attention_bench import bench_attention
    from thresher.evaluation.methods import parse_methods
    from thresher.kernels.attention import Heads

    lengths = o.numbers("contexts", contexts)
    numbers = o.numbers("heads", heads.replace("x", ","))
    if len(numbers) != 3 or numbers[0] % numbers[1]:
        raise UsageError(f"--heads {heads}: give query heads x KV heads x head_dim, e.g. 32x8x128")
    methods = parse_methods(attention or [DEFAULT_ATTENTION])
    if threads:
        torch.set_num_threads(threads)
    rows = [row for n in lengths for row in bench_attention(Heads(*numbers), n, methods, rounds, say)]
    if str(json) != "-":
        _attention_table(rows)
    write_json(json, [asdict(row) for row in rows])


@bench.command()
@o.with_options
def prefill(
    lengths: Annotated[str, typer.Option(help="Tokens of the prompt, e.g. 2048,6000.")] = "2048,6000",
    peers: Peers = "",
    rounds: Rounds = 3,
    model: o.Model = "smollm2-135m-instruct",
    weights: o.Weights = "bf16",
    threads: o.Threads = None,
    json: o.Json = None,
) -> None:
    """Time reading a whole prompt.

    The floor is the time its arithmetic takes at the measured rate of our own matrix product.
    """
    from thresher.evaluation.bench import bench_prefill

    counts = o.numbers("lengths", lengths)
    llm, others = _prepare(model, weights, threads, peers)
    _report(bench_prefill(llm, counts, others, rounds, say), json, "tokens")


def _prepare(model: str, weights: str, threads: int | None, peers: str) -> tuple[Any, dict[str, Callable[[], Any]]]:
    from thresher.evaluation.peers import make_peers

    llm = o.Running(threads=threads, allow_extrapolation=True).load(model, weights, "dense")
    import torch

    names = [p for p in peers.split(",") if p]
    return llm, make_peers(names, llm.source, weights, torch.get_num_threads())


def _report(results: Iterator[tuple[Any, Any]], json: Path | None, length: str) -> list[tuple[Any, Any]]:
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
    return rows


def _attention_table(rows: list[Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("method", overflow="fold")
    for name in ("tokens", "us", "x dense", "rows %", "head %", "error %", "index B", "build us", "floor"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.method,
            str(row.context),
            f"{row.median_us:.0f}",
            f"{row.speedup:.1f}",
            f"{100 * row.rows:.1f}",
            f"{100 * row.tokens:.1f}",
            f"{100 * row.error:.1f}",
            f"{row.index_bytes:.1f}",
            f"{row.build_us:.2f}",
            f"{row.floor_ratio:.2f}",
        )
    Console().print(table)
    say(
        "us: of one layer; rows: read for a KV head, head: weighed by a query head, of the context; index, build: of a "
        "token and KV head; floor: us / what its bytes must take. Keys and values are synthetic"
    )


@bench.command()
@o.with_options
def speculation(
    contexts: Annotated[str, typer.Option(help="Tokens in the cache, e.g. 512,8192.")] = "8192",
    batch: Annotated[str, typer.Option(help="Sequences decoded together, e.g. 1,4,8.")] = "1",
    speculate: Annotated[
        list[str] | None,
        typer.Option(
            help="Drafts to compare with none, as for `ask`, separated by ; or given several times.  [default: auto]"
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens generated of each sequence.", min=2)] = 200,
    temperature: Annotated[str, typer.Option(help="0 is greedy, where tokens must be the same; e.g. 0,0.7.")] = "0",
    rounds: Rounds = 3,
    synthetic_cache: Annotated[
        bool,
        typer.Option(
            "--synthetic-cache",
            help=f"Read only {SYNTHETIC_ABOVE} tokens and fill longer contexts with rows drawn like those.",
        ),
    ] = False,
    random_text: Annotated[
        bool, typer.Option("--random-text", help="Read tokens drawn at random: text that drafts badly.")
    ] = False,
    text: Annotated[
        Path | None, typer.Option(help="What the cache is read from. Default: Paradise Lost, fetched once.")
    ] = None,
    model: o.Model = "smollm2-135m-instruct",
    weights: o.Weights = "bf16",
    threads: o.Threads = None,
    json: o.Json = None,
) -> None:
    """Generate with drafts and without, in turns.

    thresher bench speculation --contexts 8192 --batch 1,4 --speculate "auto;self:auto,gamma=4;ngram"

    predicted: the speed-up that the times of single passes give for the passes there were.
    """
    from thresher.evaluation.speculation_bench import bench_speculation
    from thresher.speculation.settings import parse_speculation

    lengths, batches = o.numbers("contexts", contexts), o.numbers("batch", batch)
    parts = [part.strip() for listed in speculate or ["auto"] for part in listed.split(";")]
    settings = [made for part in parts if part and (made := parse_speculation(part))]
    if not settings:
        raise UsageError("--speculate: name drafts to compare with none")
    temperatures = [_temperature(part) for part in temperature.split(",")]
    content = None if random_text else named_text(text)[1]
    loaded = next((s for s in settings if s.model), settings[0])
    llm = o.Running(threads=threads, allow_extrapolation=True).load(model, weights, "dense", str(loaded))
    rows = []
    found = bench_speculation(
        llm,
        lengths,
        batches,
        temperatures,
        settings,
        tokens,
        rounds,
        say,
        content,
        SYNTHETIC_ABOVE if synthetic_cache else None,
    )
    for row in found:
        rows.append(asdict(row))
        acceptance = " ".join(f"{100 * a:.0f}" for a in row.acceptance) or "-"
        used = " ".join(f"{g}:{count}" for g, count in enumerate(row.gammas) if count) or "-"
        print(
            f"{row.setting} | {row.context} x {row.batch} | T {row.temperature:g}"
            f" | {row.tokens_per_second:.1f} tokens/s | {row.speedup:.2f} x plain, predicted {row.predicted:.2f}"
            f" | {row.tokens_per_pass:.2f} tokens a pass | accepted % by position {acceptance}"
            f" | passes by draft length {used}"
            + ("" if row.same is None else f" | same tokens: {'yes' if row.same else 'NO'}"),
            flush=True,
        )
    write_json(json, rows)


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not (value == 0 or 0.01 <= value <= 100):
        raise UsageError(f"--temperature {text}: give 0 or numbers from 0.01 to 100, separated by commas")
    return value
