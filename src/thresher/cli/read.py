import time
from pathlib import Path
from typing import Annotated

import typer

from thresher.attention import DEFAULT_ATTENTION
from thresher.cli import options as o
from thresher.cli.terminal import progress_bar, read_text, say, write_json

MOST_BYTES = 2**28  # a larger text would keep the tokenizer busy for minutes before it is refused


def read(
    document: Annotated[Path, typer.Argument(help="A UTF-8 text file; - for stdin.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where the KV file goes, e.g. book.kv.", callback=o.writable)
    ],
    *,
    plain: Annotated[bool, typer.Option("--plain", help="Do not wrap the text in the model's chat template.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Do not go on from an interrupted read.")] = False,
    model: o.Model = "smollm2-135m-instruct",
    weights: o.Weights = "bf16",
    attention: Annotated[
        str, typer.Option(help="Keep this method's index in the file, so that `ask` starts at once; dense: none.")
    ] = DEFAULT_ATTENTION,
    running: o.Running,
    json: o.Json = None,
) -> None:
    """Read a long document once and keep its KV cache as a file.

    thresher read BOOK.txt -o book.kv

    Interrupt it when you like: the same command goes on where it was.
    """
    text = read_text(document, MOST_BYTES)
    llm = running.load(model, weights, attention)
    begin = time.perf_counter()
    started_at = None
    with progress_bar(f"reading {document}") as bar:

        def progress(done: int, total: int) -> None:
            nonlocal started_at
            started_at = done if started_at is None else started_at
            bar(done, total)

        context = llm.read(
            text,
            output,
            name=document.name,
            framing="plain" if plain else None,
            resume=not restart,
            progress=progress,
        )
    seconds = time.perf_counter() - begin
    resumed = started_at or 0
    size = output.stat().st_size
    rate = (context.length - resumed) / seconds
    from_there = f" (went on from token {resumed})" if resumed else ""
    say(
        f"{output}: {context.length} tokens{from_there} in {seconds:.1f} s, {rate:.0f} tokens/s, "
        f"{size / 2**20:.0f} MiB",
        style="",
    )
    say(f"Now ask it: {ask_command(output, running)}")
    write_json(
        json,
        {
            "file": str(output),
            "tokens": context.length,
            "resumed_at": resumed,
            "seconds": seconds,
            "tokens_per_second": rate,
            "bytes": size,
        },
    )


def ask_command(output: Path, running: o.Running) -> str:
    """What a shell takes to ask the file. It knows its model and weights, but not what that model was allowed."""
    flags = {"--allow-extrapolation": running.allow_extrapolation, "--trust-remote-code": running.trust_remote_code}
    allowed = "".join(f" {flag}" for flag, given in flags.items() if given)
    return f"thresher ask {o.shell_word(output)} 'What is it about?'{allowed}"
