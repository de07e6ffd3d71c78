"""Options that several commands share, with the words that explain them.

A command takes a dataclass of options as one parameter; `with_options` spells it out for typer.
"""

import functools
import inspect
import math
import os
import secrets
import shlex
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from thresher.attention import DEFAULT_ATTENTION
from thresher.cli.terminal import check_json_target
from thresher.errors import StorageError, UsageError

if TYPE_CHECKING:
    from thresher.cache.format import KVFileInfo
    from thresher.decoding.sampling import SamplingParams

MOST_THREADS = 1024
_MOST_MIB = 2**40  # more would not count its bytes in 64 bits
_MOST_NUMBER = 2**31 - 1


def writable(path: Path | None) -> Path | None:
    """Refuse before any work what can never become a file. Raises StorageError."""
    if path is None or str(path) == "-":
        return path
    if path.is_dir() or not path.name:
        raise StorageError(f"{path} is a folder; give a file name")
    if not path.parent.is_dir():
        raise StorageError(f"{path}: cannot be written: there is no folder {path.parent}")
    return path


def writable_json(path: Path | None) -> Path | None:
    """The same, and what is no JSON of ours is not replaced."""
    if path is not None and writable(path):
        check_json_target(path)
    return path


Model = Annotated[
    str,
    typer.Option(help="A Hugging Face hub id, a local folder, a .gguf file, or the embedded smollm2-135m-instruct."),
]
Weights = Annotated[
    str, typer.Option(help="Number format of the weights: bf16, int8 (half the memory), or float32 (exact, slowest).")
]
Attention = Annotated[
    str,
    typer.Option(
        help="What a generated token reads of the cache: auto (dense while the context is short, then a small part), "
        "dense (exact), or any of `thresher methods`, as lsh:K=9,L=120."
    ),
]
AttentionOrNot = Annotated[str | None, *Attention.__metadata__]
Speculate = Annotated[
    str | None,
    typer.Option(
        help="Draft tokens and verify them, which gives the same answer sooner: auto (what pays, if anything does), "
        "self:auto (the model's own drafts with sparse attention), ngram, model:ID, each with ,gamma=4 for drafts of 4 "
        "tokens; none. Attention is then dense unless told otherwise."
    ),
]
Certify = Annotated[
    float | None,
    typer.Option(
        help="With lsh: answer densely where the estimated error of attention is above this, e.g. 0.2; says how often."
    ),
]
Threads = Annotated[
    int | None, typer.Option(help="Threads to compute with. Default: all cores.", min=1, max=MOST_THREADS)
]
Json = Annotated[
    Path | None,
    typer.Option(
        "--json", help="Write the result as JSON to this file; - for standard output.", callback=writable_json
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback when something goes wrong.")]


@dataclass(frozen=True)
class Running:
    """How a model is run."""

    kv_budget: Annotated[
        int | None,
        typer.Option(
            help="Memory for keys and values, in MiB (2^20 bytes). Default: half of what is free.",
            min=1,
            max=_MOST_MIB,
        ),
    ] = None
    threads: Threads = None
    allow_extrapolation: Annotated[
        bool, typer.Option("--allow-extrapolation", help="Permit texts longer than the model was trained for.")
    ] = False
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model, if you trust it.")
    ] = False

    def load(self, model: str, weights: str, attention: str | None, speculate: str | None = None) -> Any:
        """The LLM, with messages of what takes long on stderr."""
        from thresher.cli.terminal import say, stderr

        with stderr.status("loading the model"):
            import torch

            from thresher.engine.llm import LLM

            if self.threads:
                torch.set_num_threads(self.threads)
            return LLM(
                model,
                attention=attention,
                speculate=speculate,
                weights=weights,
                kv_budget=self.kv_budget * 2**20 if self.kv_budget else None,
                allow_extrapolation=self.allow_extrapolation,
                trust_remote_code=self.trust_remote_code,
                progress=say,
            )


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when to stop: engine.sampling.SamplingParams as options."""

    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256
    min_tokens: Annotated[int, typer.Option(help="Do not end an answer before it has so many tokens.")] = 0
    temperature: Annotated[float, typer.Option(help="0: always the most likely token; 1: as the model thinks.")] = 0.0
    top_k: Annotated[int, typer.Option(help="Choose among the k most likely tokens; 0 or -1: all.")] = 0
    top_p: Annotated[float, typer.Option(help="Choose among the most likely tokens that sum to this probability.")] = (
        1.0
    )
    min_p: Annotated[float, typer.Option(help="Drop tokens less likely than this share of the most likely.")] = 0.0
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: tokens of the text so far become less likely.")
    ] = 1.0
    presence_penalty: Annotated[
        float, typer.Option(help="Above 0: tokens of the answer so far become less likely.")
    ] = 0.0
    frequency_penalty: Annotated[float, typer.Option(help="The same, each time that a token has come.")] = 0.0
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(metavar="ID=BIAS", help="Add this to the logit of a token id. May be given several times."),
    ] = None
    stop: Annotated[
        list[str] | None, typer.Option(help="End the answer before this text. May be given several times.")
    ] = None
    include_stop: Annotated[
        bool, typer.Option("--include-stop", help="Keep the --stop text at the end of the answer.")
    ] = False
    stop_token_id: Annotated[
        list[int] | None, typer.Option(help="End the answer at this token id. May be given several times.")
    ] = None
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Do not stop at the model's end token.")] = False
    logprobs: Annotated[
        int | None, typer.Option(help="With --json: log-probabilities of each token and of the n best.")
    ] = None
    prompt_logprobs: Annotated[int | None, typer.Option(help="With --json: the same of the prompt's tokens.")] = None
    seed: Annotated[
        int | None, typer.Option(help="The same seed gives the same answer. Default: a random one, which is told.")
    ] = None
    n: Annotated[int, typer.Option("--n", help="Number of answers; they share the prompt's cache.")] = 1

    def drawn(self, speculate: str | None = None) -> "Sampling":
        """With a seed where random numbers are used, so that it can be told and used again. With drafts only one that
        was given: keeping to it makes them right less often."""
        known = self.seed is not None or self.temperature == 0 or speculate not in (None, "none")
        return self if known else replace(self, seed=secrets.randbits(32))

    def params(self, json: Path | None) -> "SamplingParams":
        """Raises UsageError on a value that makes no sense."""
        from thresher.decoding.sampling import SamplingParams

        if json is None and (self.logprobs is not None or self.prompt_logprobs is not None):
            raise UsageError("log-probabilities are written with --json only; add it, e.g. --json -")
        given: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        given = {name: value for name, value in given.items() if value not in (None, [], getattr(Sampling, name, None))}
        if given.get("top_k") == -1:
            del given["top_k"]
        if "stop" in given:
            given["stop"] = tuple(utf8("--stop", text) for text in given["stop"])
        if "stop_token_id" in given:
            given["stop_token_ids"] = tuple(given.pop("stop_token_id"))
        if "logit_bias" in given:
            given["logit_bias"] = dict(_bias(text) for text in given["logit_bias"])
        return SamplingParams(**given)


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise UsageError(f"--logit-bias {text}: give a token id and a number, as 42=-1.5") from None


def with_options(function: Callable[..., None]) -> Callable[..., None]:
    """The command as typer wants it: every parameter that is a dataclass of options is replaced by those options.

    It also gets --debug, which `start.run` looks for by itself, as an error may come before a command is known.
    """
    parameters: list[inspect.Parameter] = []
    groups: dict[str, type] = {}
    for parameter in inspect.signature(function).parameters.values():
        if not is_dataclass(parameter.annotation):
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        kind: Any = parameter.annotation
        groups[parameter.name] = kind
        hints = get_type_hints(kind, include_extras=True)
        parameters += [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
            for f in fields(kind)
        ]
    parameters.append(inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug))

    @functools.wraps(function)
    def command(debug: bool, **values: Any) -> None:
        for name, kind in groups.items():
            values[name] = kind(**{f.name: values.pop(f.name) for f in fields(kind)})
        function(**values)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {}
    return command


def utf8(name: str, text: str) -> str:
    """An argument as text. UsageError if its bytes are none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{name} is not UTF-8 text") from None
    return text


def shell_word(path: Path) -> str:
    """A path as a word of a shell's command line that is not taken for an option."""
    text = f"./{path}" if str(path).startswith("-") else str(path)
    if text.isprintable():
        return shlex.quote(text)
    plain = set(range(32, 127)) - set(b"'\\")
    return "$'" + "".join(chr(b) if b in plain else f"\\x{b:02x}" for b in os.fsencode(text)) + "'"


def kv_header(path: Path) -> "KVFileInfo":
    """What a KV file's header says. Raises KVFileError, also for a pipe or device, which might never end."""
    from thresher.cache.file import inspect
    from thresher.errors import KVFileError

    if path.exists() and not path.is_file() and not path.is_dir():
        raise KVFileError(f"{path} is not a regular file")
    return inspect(path)


def numbers(name: str, text: str) -> list[int]:
    """`512,2048` as numbers, each once. Raises UsageError that names the option."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1 or max(found) > _MOST_NUMBER:
        raise UsageError(f"--{name} {text}: give whole numbers above 0, separated by commas")
    return list(dict.fromkeys(found))


def listed(name: str, given: list[str] | None, default: str) -> list[str]:
    """What is separated by ; or given several times, each once. Raises UsageError that names the option."""
    found = [part.strip() for text in given or [default] for part in text.split(";")]
    if not any(found):
        raise UsageError(f"--{name}: nothing is given")
    return list(dict.fromkeys(filter(None, found)))


def checked_speculation(speculate: str | None, attention: str | None) -> None:
    """Before anything is loaded. Raises UsageError if drafts are not what they can be, or cannot be verified so."""
    if speculate is None:
        return
    from thresher.attention.registry import parse_method
    from thresher.speculation.settings import parse_speculation

    settings = parse_speculation(utf8("--speculate", speculate))
    if settings and attention:
        settings.check_target(parse_method(attention))


def certified(attention: str | None, bound: float | None) -> str | None:
    """The method with an error bound. Raises UsageError if it estimates no error."""
    if bound is None:
        return attention
    attention = attention or DEFAULT_ATTENTION
    from thresher.attention.lsh import LSH
    from thresher.attention.registry import parse_method

    method = parse_method(attention)
    if not isinstance(method, LSH):
        raise UsageError(f"--certify: {method.name} estimates no error; use it with --attention lsh")
    if not bound > 0 or math.isinf(bound):
        raise UsageError(f"--certify {bound}: give an error above 0")
    return str(replace(method, certify=bound))
