import json as json_format
from pathlib import Path
from typing import Annotated

import typer

from thresher.attention import DEFAULT_ATTENTION
from thresher.cli import options as o
from thresher.cli.answers import say_cut, say_readings, say_speculation, show_answers
from thresher.cli.read import MOST_BYTES
from thresher.cli.terminal import read_text, say, write_json
from thresher.errors import UsageError


def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to say to the model.")] = None,
    *,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Read the prompt from this file; - for stdin.")
    ] = None,
    messages: Annotated[
        Path | None,
        typer.Option(
            help='A conversation in place of a prompt: a JSON file as [{"role": "user", "content": "Hi"}]; - for stdin.'
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    sampling: o.Sampling,
    model: o.Model = "smollm2-135m-instruct",
    weights: o.Weights = "bf16",
    attention: o.AttentionOrNot = None,
    speculate: o.Speculate = None,
    certify: o.Certify = None,
    running: o.Running,
    json: o.Json = None,
) -> None:
    """Answer a prompt or go on with a conversation.

    thresher generate "Name three colours."
    """
    from thresher.engine.framing import default_framing

    if sum(given is not None for given in (prompt, file, messages)) != 1:
        raise UsageError("give a prompt, or --file with one, or --messages with a conversation")
    if raw and (messages or system is not None):
        raise UsageError("--raw continues a text; it has no --messages and no --system")
    method = o.certified(attention, certify)
    o.checked_speculation(speculate, method)
    drawn = sampling.drawn(speculate)
    params = drawn.params(json)
    text = read_text(file, MOST_BYTES) if file else o.utf8("the prompt", prompt or "")
    turns = read_messages(messages) if messages else []
    if system is not None:
        turns = [message("system", o.utf8("--system", system)), *(turns or [message("user", text)])]
    llm = running.load(model, weights, method, speculate)
    framing = "plain" if raw else default_framing(llm.model.tokenizer)
    if turns and framing == "plain":
        raise UsageError(f"{llm.model.name} has no chat template; give a prompt alone")
    events = llm.stream_chat(turns, params) if turns else llm.stream([text], params, framing)
    shown = show_answers(events, ["answer"], sampling.n, quiet=str(json) == "-")
    times = shown.times
    say(
        f"first token after {times['first_token_seconds']:.2f} s, then {times['decode_tokens_per_second']:.1f} tokens/s"
    )
    say_cut(shown.answers, sampling.max_new_tokens)
    if drawn is not sampling:
        say(f"--seed {drawn.seed} gives this again")
    say_readings(times)
    say_speculation(shown.answers)
    if attention not in (None, DEFAULT_ATTENTION) and llm.dense_up_to and "rows_read" not in times:
        say(f"attention was dense: {llm.attention} begins beyond {llm.dense_up_to} tokens")
    asked = {"messages": turns} if turns else {"prompt": text}
    write_json(json, {"model": llm.model.name, **asked, "seed": drawn.seed, "answers": shown.answers[0]} | times)
    shown.raise_error()


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def read_messages(path: Path) -> list[dict[str, str]]:
    """A conversation from a JSON file. UsageError if it is none."""
    try:
        found = json_format.loads(read_text(path, MOST_BYTES))
    except (ValueError, RecursionError):
        raise UsageError(f"{path} is not a JSON file") from None
    try:
        turns = [message(**turn) for turn in found]
        if not turns or not all(isinstance(value, str) for turn in turns for value in turn.values()):
            raise TypeError
    except TypeError:
        raise UsageError(f'{path}: give a list of messages, each as {{"role": "user", "content": "Hi"}}') from None
    for turn in turns:
        o.utf8(f"{path}: a message", turn["role"] + turn["content"])
    return turns
