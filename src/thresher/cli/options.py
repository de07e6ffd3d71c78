"""Options that several commands share, with the words that explain them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

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
        help="What a generated token reads of the cache: dense, auto, or any of `thresher methods`, as lsh:K=9,L=120."
    ),
]
Certify = Annotated[
    float | None,
    typer.Option(
        help="With lsh: answer densely where the estimated error of attention is above this, e.g. 0.2; says how often."
    ),
]
KVBudget = Annotated[
    int | None, typer.Option(help="Memory for keys and values, in MiB. Default: half of what is free.", min=1)
]
Threads = Annotated[int | None, typer.Option(help="Threads to compute with. Default: all cores.", min=1)]
Extrapolate = Annotated[
    bool, typer.Option("--allow-extrapolation", help="Permit texts longer than the model was trained for.")
]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model. Only if you trust it.")
]
Json = Annotated[
    Path | None, typer.Option("--json", help="Write the result as JSON to this file; - for standard output.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback when something goes wrong.")]

MaxNewTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(help="0: always the most likely token; 1: as the model thinks.")]
TopK = Annotated[int, typer.Option(help="Choose among the k most likely tokens; 0: all.")]
TopP = Annotated[float, typer.Option(help="Choose among the most likely tokens that sum to this probability.")]
MinP = Annotated[float, typer.Option(help="Drop tokens less likely than this share of the most likely.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1: tokens of the text so far become less likely.")]
PresencePenalty = Annotated[float, typer.Option(help="Above 0: tokens of the answer so far become less likely.")]
Stop = Annotated[list[str] | None, typer.Option(help="End the answer before this text. May be given several times.")]
Logprobs = Annotated[int | None, typer.Option(help="With --json: log-probabilities of each token and of the n best.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same answer.")]
N = Annotated[int, typer.Option("--n", help="Number of answers; they share the prompt's cache.")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Do not stop at the model's end token.")]


@dataclass(frozen=True)
class ModelOptions:
    """What it takes to load a model."""

    model: str
    weights: str
    attention: str
    kv_budget: int | None
    threads: int | None
    allow_extrapolation: bool
    trust_remote_code: bool

    def load(self) -> Any:
        """The LLM, with messages of what takes long on stderr."""
        from thresher.cli.terminal import say, stderr

        with stderr.status("loading the model"):
            import torch

            from thresher.engine.llm import LLM

            if self.threads:
                torch.set_num_threads(self.threads)
            return LLM(
                self.model,
                attention=self.attention,
                weights=self.weights,
                kv_budget=self.kv_budget * 2**20 if self.kv_budget else None,
                allow_extrapolation=self.allow_extrapolation,
                trust_remote_code=self.trust_remote_code,
                progress=say,
            )


def numbers(name: str, text: str) -> list[int]:
    """`512,2048` as numbers, each once. Raises UsageError that names the option."""
    from thresher.errors import UsageError

    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise UsageError(f"--{name} {text}: give whole numbers above 0, separated by commas")
    return list(dict.fromkeys(found))


def certified(attention: str, bound: float | None) -> str:
    """The method with an error bound. Raises UsageError if it estimates no error."""
    if bound is None:
        return attention
    from thresher.attention.lsh import LSH
    from thresher.attention.registry import parse_method
    from thresher.errors import UsageError

    method = parse_method(attention)
    if not isinstance(method, LSH):
        raise UsageError(f"--certify: {method.name} estimates no error; use it with --attention lsh")
    if bound <= 0:
        raise UsageError(f"--certify {bound}: give an error above 0")
    return str(replace(method, certify=bound))
