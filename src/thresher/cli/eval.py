from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thresher.attention import DEFAULT_ATTENTION
from thresher.cli import options as o
from thresher.cli.read import MOST_BYTES
from thresher.cli.terminal import one_line, progress_bar, read_text, say, write_json

if TYPE_CHECKING:
    from thresher.evaluation.journal import Journal
    from thresher.evaluation.perplexity import Perplexity
    from thresher.evaluation.ruler.summary import Summary
    from thresher.evaluation.statistics import Interval

evaluate = typer.Typer(help="Measure what attention methods lose against dense attention, on the same samples.")

Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--attention",
        help="Methods to compare, separated by ; or given several times, e.g. "
        f"'streaming:window=512;streaming:window=2048'. Default: {DEFAULT_ATTENTION}. Dense is always run too.",
    ),
]
JournalFile = Annotated[
    Path | None,
    typer.Option(
        help="Where results are kept as they come: the same command goes on from it when it was interrupted. "
        "Default: beside --json FILE until that is written.",
        callback=o.writable,
    ),
]


@evaluate.command()
@o.with_options
def ruler(
    *,
    attention: Methods = None,
    lengths: Annotated[str, typer.Option(help="Tokens of prompt and answer together, e.g. 4096,8192.")] = "4096",
    samples: Annotated[int, typer.Option(help="Prompts of each task and length.", min=1)] = 10,
    tasks: Annotated[
        str, typer.Option(help="Tasks or families, e.g. niah,vt,cwe,fwe,qa or niah_single_1. Default: all 13.")
    ] = "all",
    haystack: Annotated[
        Path | None, typer.Option(help="A text file to hide needles in. Default: Paradise Lost, fetched once.")
    ] = None,
    qa: Annotated[
        list[Path] | None,
        typer.Option(
            help="A JSON file in SQuAD format (for qa_1) or HotpotQA format (for qa_2); may be given twice. "
            "Without one, the questions are about invented persons, which is easier."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same prompts.", min=0)] = 0,
    plain: Annotated[bool, typer.Option("--plain", help="Do not use the model's chat template.")] = False,
    journal: JournalFile = None,
    model: o.Model = "smollm2-135m-instruct",
    weights: o.Weights = "bf16",
    running: o.Running,
    json: o.Json = None,
) -> None:
    """Score methods on the 13 tasks of RULER: needles, variable tracking, common and frequent words, questions.

    thresher eval ruler --attention "streaming:window=1024" --lengths 4096 --json scores.json

    Every prompt is read densely once; each method then answers from it. Scores are per cent of the references found,
    with 95 % bootstrap intervals; differences are to dense on the same prompts.
    """
    from thresher.engine.framing import default_framing
    from thresher.evaluation.journal import Journal
    from thresher.evaluation.methods import parse_methods
    from thresher.evaluation.ruler.run import run_settings, run_tasks
    from thresher.evaluation.ruler.sources import Sources, read_questions
    from thresher.evaluation.ruler.summary import notes, summarize
    from thresher.evaluation.ruler.tasks import choose_tasks

    methods = parse_methods(attention or [DEFAULT_ATTENTION])
    counts = o.numbers("lengths", lengths)
    chosen = choose_tasks([t.strip() for t in tasks.split(",") if t.strip()])
    sources = Sources(*named_text(haystack), questions=read_questions(qa or []))
    llm = running.load(model, weights, "dense")
    framing = "plain" if plain else default_framing(llm.model.tokenizer)
    settings = run_settings(llm, sources, framing)
    outcomes = []
    with Journal(journal_path(journal, json), settings) as kept, progress_bar("eval ruler") as bar:
        say_resumed(kept)
        for outcome in run_tasks(
            llm,
            chosen,
            counts,
            samples,
            methods,
            sources,
            framing=framing,
            seed=seed,
            journal=kept,
            progress=bar,
        ):
            outcomes.append(outcome)
    rows = summarize(outcomes, seed)
    remarks = notes(rows, chosen, sources)
    if str(json) != "-":
        _ruler_table(rows)
    for remark in remarks:
        say(remark)
    write_json(
        json,
        {
            "model": llm.model.name,
            "haystack": sources.name,
            "seed": seed,
            "notes": remarks,
            "settings": settings,
            "summaries": [asdict(row) for row in rows],
            "outcomes": [asdict(outcome) for outcome in outcomes],
        },
    )
    drop_journal(journal, json)


@evaluate.command()
@o.with_options
def perplexity(
    text: Annotated[
        Path | None, typer.Argument(help="A UTF-8 text file. Default: Paradise Lost, fetched once.")
    ] = None,
    *,
    attention: Methods = None,
    context: Annotated[int, typer.Option(help="Tokens read densely before those that are scored.", min=1)] = 4096,
    tokens: Annotated[int, typer.Option(help="Tokens decoded and scored in each window.", min=1)] = 256,
    windows: Annotated[int, typer.Option(help="Stretches of the text, spread evenly.", min=1)] = 4,
    journal: JournalFile = None,
    model: o.Model = "smollm2-135m-instruct",
    weights: o.Weights = "bf16",
    running: o.Running,
    json: o.Json = None,
) -> None:
    """Perplexity of a text under several methods.

    thresher eval perplexity BOOK.txt --attention "streaming:window=1024" --context 4096

    A context is read densely; the tokens after it are decoded one by one under each method, the right one given each
    time. The ratio to dense comes with a 95 % bootstrap interval over the same tokens.
    """
    import hashlib

    from thresher.evaluation.journal import Journal
    from thresher.evaluation.methods import parse_methods
    from thresher.evaluation.perplexity import run_settings, score_windows, summarize, text_windows

    methods = parse_methods(attention or [DEFAULT_ATTENTION])
    name, content = named_text(text)
    llm = running.load(model, weights, "dense")
    ids = llm.model.tokenizer.encode(content, add_special_tokens=False, verbose=False)
    parts = text_windows(ids, context, tokens, windows)
    digest = hashlib.sha256(content.encode()).hexdigest()
    settings = run_settings(llm, digest, context, tokens, windows)
    with Journal(journal_path(journal, json), settings) as kept, progress_bar("eval perplexity") as bar:
        say_resumed(kept)
        scores = list(score_windows(llm, parts, context, methods, journal=kept, progress=bar))
    rows = summarize(scores)
    if str(json) != "-":
        _perplexity_table(rows)
    write_json(
        json,
        {
            "model": llm.model.name,
            "text": name,
            "settings": settings,
            "summaries": [asdict(row) for row in rows],
            "windows": [asdict(score) for score in scores],
        },
    )
    drop_journal(journal, json)


def named_text(path: Path | None) -> tuple[str, str]:
    """Name and content of a file, or of one of the texts that are fetched: Paradise Lost if none is given."""
    from thresher.evaluation.texts import TITLES, public_text

    name = "paradise_lost" if path is None else str(path)
    if name in TITLES and not (path and path.exists()):
        return TITLES[name], public_text(name)
    return Path(name).name, read_text(Path(name), MOST_BYTES)


def say_resumed(journal: "Journal") -> None:
    if journal.count:
        say(f"{journal.path} holds {journal.count} results; those that fit are not computed again")


def drop_journal(journal: Path | None, json: Path | None) -> None:
    """A journal nobody asked for has done its work: left behind, it would answer for a changed program."""
    path = journal_path(journal, json)
    if journal is None and path is not None:
        path.unlink(missing_ok=True)


def journal_path(journal: Path | None, json: Path | None) -> Path | None:
    if journal is not None or json is None or str(json) == "-":
        return journal
    return json.with_name(f"{json.name}.journal")


def show_interval(value: "Interval | None", digits: int, several: bool = True) -> str:
    if value is None:
        return ""
    bounds = f" [{value.low:.{digits}f}, {value.high:.{digits}f}]" if several else ""
    return f"{value.mean:.{digits}f}{bounds}"


def _ruler_table(rows: "list[Summary]") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    for length, method in dict.fromkeys((row.length, row.method) for row in rows):
        title = f"{method}, {length} tokens"
        table = Table(
            title=one_line(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
        )
        table.add_column("task", no_wrap=True)
        for name in ("n", "score %", "- dense", "ms", "KV %"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            if (row.length, row.method) == (length, method):
                table.add_row(
                    row.task,
                    str(row.samples),
                    show_interval(row.score, 1, row.samples > 1),
                    show_interval(row.difference, 1, row.samples > 1),
                    "" if row.ms is None else f"{row.ms:.1f}",
                    f"{100 * row.kv_read:.0f}",
                )
        Console().print(table)
    say("- dense: difference on the same prompts; ms: of one token; KV %: bytes that its attention reads, dense = 100")


def _perplexity_table(rows: "list[Perplexity]") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("method", overflow="fold")
    for name in ("tokens", "perplexity", "/ dense", "ms", "KV %"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.method,
            str(row.tokens),
            show_interval(row.perplexity, 2),
            show_interval(row.ratio, 3),
            f"{row.ms:.1f}",
            f"{100 * row.kv_read:.0f}",
        )
    Console().print(table)
    say("/ dense: ratio on the same tokens; ms: of one token; KV %: bytes that its attention reads, dense = 100")
