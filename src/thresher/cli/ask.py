import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from thresher.cli import options as o
from thresher.cli.answers import Shown, say_cut, say_readings, say_speculation, show_answers
from thresher.cli.terminal import progress_bar, say, stderr, stdin_lines, write_json
from thresher.errors import ModelError, ThresherError, UsageError


def ask(
    file: Annotated[Path, typer.Argument(help="A KV file made by: thresher read.")],
    questions: Annotated[
        list[str] | None,
        typer.Argument(
            help="One or more questions; they do not see each other. None: ask for them, one after the other; "
            "-: read them from standard input, one a line."
        ),
    ] = None,
    *,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not read the whole file to compare checksums first.")
    ] = False,
    sampling: o.Sampling,
    model: Annotated[
        str | None, typer.Option(help="Where the model lies, if no more where the file was made with it.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Number format of the weights. Default: that the file was made with.")
    ] = None,
    attention: o.AttentionOrNot = None,
    speculate: o.Speculate = None,
    certify: o.Certify = None,
    running: o.Running,
    json: o.Json = None,
) -> None:
    """Ask questions about a document that was read before.

    thresher ask book.kv "Who speaks first?" "Where are they?"

    Model and weights are those that the file was made with.
    """
    listed = [o.utf8(f"question {i}", q) for i, q in enumerate(questions or [], 1)]
    one_by_one = listed in ([], ["-"])
    if not listed and not sys.stdin.isatty():
        raise UsageError("give a question, or - to read questions from standard input, one a line")
    method = o.certified(attention, certify)
    o.checked_speculation(speculate, method)
    drawn = sampling.drawn(speculate)
    params = drawn.params(json)
    made = o.kv_header(file)  # a wrong file is told before the model is loaded
    try:
        llm = running.load(model or made.model or "smollm2-135m-instruct", weights or made.weights, method, speculate)
    except ModelError as error:
        if model or not made.model:
            raise
        raise type(error)(
            f"{file} was made with the model {made.model}: {error}; --model says where it is now"
        ) from error
    begin = time.perf_counter()
    with progress_bar(f"checking {file}") as bar:
        context = llm.open(file, verify=not no_verify, progress=bar)
    opened = time.perf_counter() - begin
    quiet = str(json) == "-"
    result: dict[str, Any] = {
        "file": str(file),
        "tokens": context.length,
        "open_seconds": opened,
        "seed": drawn.seed,
    }
    if drawn is not sampling:
        say(f"--seed {drawn.seed} gives the same answers again")

    def answer(asked: list[str], labelled: bool = False) -> Shown:
        events = llm.stream_answers(context, asked, params)
        shown = show_answers(events, asked, sampling.n, quiet, labelled)
        say_cut(shown.answers, sampling.max_new_tokens)
        say_readings(shown.times)
        say_speculation(shown.answers)
        return shown

    if one_by_one:
        say(f"{context.length} tokens opened in {opened:.2f} s")
        answered = []
        for question in stdin_lines() if listed else typed_questions():
            try:
                shown = answer([question], labelled=bool(listed))
                shown.raise_error()
            except ThresherError as error:
                if listed:
                    raise
                say(f"error: {error}", style="red")  # whoever types may ask something else
                continue
            answered.append({"question": question, "answers": shown.answers[0]} | shown.times)
        write_json(json, result | {"questions": answered})
        return
    shown = answer(listed)
    times = shown.times
    say(
        f"{context.length} tokens opened in {opened:.2f} s, first token {times['first_token_seconds']:.2f} s "
        f"later, then {times['decode_tokens_per_second']:.1f} tokens/s"
    )
    pairs = [{"question": q, "answers": a} for q, a in zip(listed, shown.answers, strict=True)]
    write_json(json, result | {"questions": pairs} | times)
    shown.raise_error()


def typed_questions() -> Iterable[str]:
    """Questions as they are typed, until Ctrl-D."""
    say("Ask a question, end with Ctrl-D.")
    lines = stdin_lines()
    while True:
        stderr.print("> ", end="")
        line = next(lines, None)
        if line is None:
            stderr.print()
            return
        yield line
