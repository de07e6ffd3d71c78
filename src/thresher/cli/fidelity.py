from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thresher.attention import DEFAULT_ATTENTION
from thresher.cli import options as o
from thresher.cli.eval import JournalFile, Methods, drop_journal, journal_path, named_text, say_resumed
from thresher.cli.terminal import one_line, progress_bar, say, write_json

if TYPE_CHECKING:
    from thresher.evaluation.fidelity import Fidelity, TokenScores


def fidelity(
    texts: Annotated[
        list[Path] | None,
        typer.Argument(help="UTF-8 text files, or paradise_lost, hamlet: fetched once. Default: the first."),
    ] = None,
    *,
    attention: Methods = None,
    contexts: Annotated[str, typer.Option(help="Tokens read densely before those that are scored.")] = "6000",
    tokens: Annotated[int, typer.Option(help="Tokens decoded and scored after each context.", min=1)] = 64,
    plot: Annotated[
        Path | None, typer.Option(help="Draw quality against bytes read into this file.", callback=o.writable)
    ] = None,
    journal: JournalFile = None,
    model: o.Model = "smollm2-135m-instruct",
    weights: o.Weights = "bf16",
    running: o.Running,
    json: o.Json = None,
) -> None:
    """How near each method comes to dense attention, and what it reads for that.

    thresher eval fidelity --attention "auto;lsh;quest:budget=512" --contexts 2000,6000 --plot quality.png

    The start of each text is read densely; the tokens after it are decoded one by one under each method, the right one
    given each time, and every next-token distribution is compared with that of dense attention.
    """
    import hashlib

    from thresher.errors import UsageError
    from thresher.evaluation.fidelity import run_settings, score_text, summarize
    from thresher.evaluation.journal import Journal
    from thresher.evaluation.methods import parse_methods

    methods = parse_methods(attention or [DEFAULT_ATTENTION])
    lengths = o.numbers("contexts", contexts)
    named = [named_text(path) for path in texts] if texts else [named_text(None)]
    llm = running.load(model, weights, "dense")
    settings = run_settings(llm, {name: hashlib.sha256(text.encode()).hexdigest() for name, text in named}, tokens)
    scores: list[TokenScores] = []
    with Journal(journal_path(journal, json), settings) as kept, progress_bar("eval fidelity") as bar:
        say_resumed(kept)
        for name, text in named:
            ids = llm.model.tokenizer.encode(text, verbose=False)
            for length in lengths:
                if len(ids) < length + tokens + 1:
                    raise UsageError(f"{name} has {len(ids)} tokens; {length} + {tokens} + 1 are needed")
                scores += score_text(llm, name, ids, length, tokens, methods, journal=kept, progress=bar)
    rows = summarize(scores)
    if plot:
        from thresher.evaluation.plots import plot_fidelity

        plot_fidelity(rows, plot)
    if str(json) != "-":
        _table(rows)
    write_json(
        json,
        {
            "model": llm.model.name,
            "settings": settings,
            "summaries": [asdict(row) for row in rows],
            "scores": [asdict(score) for score in scores],
        },
    )
    drop_journal(journal, json)


def _table(rows: "list[Fidelity]") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    for text, context in dict.fromkeys((row.text, row.context) for row in rows):
        title = f"{text}, {context} tokens"
        table = Table(
            title=one_line(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
        )
        table.add_column("method", overflow="fold")
        for name in ("KL", "±", "most", "top1", "err %", "tok %", "KV %", "ms"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            if (row.text, row.context) == (text, context):
                table.add_row(
                    row.method,
                    f"{row.kl.mean:.4f}",
                    f"{(row.kl.high - row.kl.low) / 2:.4f}",
                    f"{row.kl_most:.2f}",
                    f"{100 * row.top1:.0f}",
                    f"{100 * row.output_error:.1f}",
                    f"{100 * row.tokens_share:.1f}",
                    f"{100 * row.kv_read:.1f}",
                    f"{row.ms:.1f}",
                )
        Console().print(table)
    for row in rows:
        if row.escalated is not None:
            share = 100 * row.escalated
            say(f"{row.method} at {row.context} tokens: {share:.2f} % of checked outputs were answered densely")
    say(
        "KL: to dense, nats a token; ±: half its 95 % interval; most: the largest; top1: same most likely token, %; "
        "err: of attention outputs; tok: weighed by a query head of a sparse layer; KV: bytes read with indexes, "
        "dense = 100"
    )
