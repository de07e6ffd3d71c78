"""What commands say: results on stdout, everything else on stderr; errors in one line; JSON for machines."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from thresher.errors import StorageError, ThresherError, UsageError

stderr = Console(stderr=True, highlight=False)


def say(message: str) -> None:
    """A remark on stderr."""
    stderr.print(message, style="dim", soft_wrap=True)


@contextmanager
def clear_errors(debug: bool) -> Iterator[None]:
    """End with one line and an exit code instead of a traceback; 130 on Ctrl-C."""
    try:
        yield
    except ThresherError as error:
        if debug:
            raise
        stderr.print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        stderr.print("interrupted")
        raise typer.Exit(130) from None
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(141) from None


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.0f} tokens/s")


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with rate and time left, fed with (done, total) tokens."""
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), _Rate())
    with Progress(*columns, TimeRemainingColumn(), console=stderr, transient=True) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def write_json(path: Path | None, value: Any) -> None:
    """To a file (whole or not at all) or, for `-`, to stdout."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    if path is None:
        return
    if str(path) == "-":
        sys.stdout.write(text)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(f"{path}: cannot be written: {error.strerror}") from error


def read_text(path: Path, most_bytes: int) -> str:
    """A UTF-8 text file, `-` for stdin. UsageError if it is missing, empty, too large or not UTF-8."""
    try:
        if str(path) == "-":
            data = sys.stdin.buffer.read(most_bytes + 1)
        else:
            with path.open("rb") as file:
                data = file.read(most_bytes + 1)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    if len(data) > most_bytes:
        raise UsageError(f"{path} is larger than {most_bytes / 2**20:.0f} MiB, more than this model can read")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start}); convert it, e.g. with iconv") from None
    if not text.strip():
        raise UsageError(f"{path} is empty; give a text with at least one word")
    return text


def show_answers(
    events: Iterator[Any], labels: list[str], samples: int, quiet: bool
) -> tuple[list[list[dict[str, Any]]], dict[str, float]]:
    """Print answers as they come (a single one token by token, several when they are whole).

    Returns for each prompt and sample the text, tokens and finish reason, and the timing of the run.
    """
    begin = time.perf_counter()
    first = None
    tokens = 0
    single = len(labels) * samples == 1
    answers: list[list[dict[str, Any]]] = [
        [{"text": "", "token_ids": [], "logprobs": [], "finish_reason": None} for _ in range(samples)] for _ in labels
    ]
    read: list[Any] = []
    for event in events:
        answer = answers[event.request][event.sample]
        if event.readings:
            read.append(event.readings)
        if event.choice:
            first = first or time.perf_counter()
            tokens += 1
            answer["token_ids"].append(event.choice.token)
            if event.choice.logprob is not None:
                answer["logprobs"].append({"logprob": event.choice.logprob, "top": event.choice.top})
        answer["text"] += event.text
        answer["finish_reason"] = event.finish_reason
        if quiet:
            continue
        if single:
            sys.stdout.write(event.text)
            sys.stdout.flush()
        elif event.finish_reason:
            which = f" ({event.sample + 1} of {samples})" if samples > 1 else ""
            sys.stdout.write(f"{labels[event.request]}{which}\n  {answer['text'].strip()}\n\n")
            sys.stdout.flush()
    if single and not quiet:
        sys.stdout.write("\n")
    end = time.perf_counter()
    first = first or end
    decoding = tokens - len(labels) * samples
    rate = decoding / (end - first) if decoding > 0 and end > first else 0.0
    times = {"first_token_seconds": first - begin, "seconds": end - begin, "decode_tokens_per_second": rate}
    if read:
        readings = sum(r.readings for r in read)
        times["rows_read"] = sum(r.rows for r in read) / max(readings, 1)
        times["outputs_checked"] = sum(r.checked for r in read)
        times["outputs_escalated"] = sum(r.escalated for r in read)
    return answers, times


def say_readings(times: dict[str, float]) -> None:
    """What sparse attention has read, and how often an estimated error made it read all."""
    if "rows_read" in times:
        say(f"attention read {times['rows_read']:.0f} rows for each KV head of its sparse layers")
    if times.get("outputs_checked"):
        share = 100 * times["outputs_escalated"] / times["outputs_checked"]
        say(f"{share:.2f} % of {times['outputs_checked']:.0f} attention outputs were uncertain and answered densely")
