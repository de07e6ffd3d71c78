import time
from pathlib import Path
from typing import Annotated

import typer

from thresher.cli import options as o
from thresher.cli.terminal import clear_errors, progress_bar, say_readings, show_answers, stderr, write_json


def ask(
    file: Annotated[Path, typer.Argument(help="A KV file made by: thresher read.")],
    questions: Annotated[list[str], typer.Argument(help="One or more questions; they do not see each other.")],
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not read the whole file to compare checksums first.")
    ] = False,
    max_new_tokens: o.MaxNewTokens = 256,
    temperature: o.Temperature = 0.0,
    top_k: o.TopK = 0,
    top_p: o.TopP = 1.0,
    min_p: o.MinP = 0.0,
    repetition_penalty: o.RepetitionPenalty = 1.0,
    presence_penalty: o.PresencePenalty = 0.0,
    stop: o.Stop = None,
    logprobs: o.Logprobs = None,
    seed: o.Seed = 0,
    n: o.N = 1,
    ignore_eos: o.IgnoreEos = False,
    model: o.Model = "smollm2-135m-instruct",
    weights: Annotated[
        str | None, typer.Option(help="Number format of the weights. Default: that the file was made with.")
    ] = None,
    attention: o.Attention = "auto",
    certify: o.Certify = None,
    kv_budget: o.KVBudget = None,
    threads: o.Threads = None,
    allow_extrapolation: o.Extrapolate = False,
    trust_remote_code: o.RemoteCode = False,
    json: o.Json = None,
    debug: o.Debug = False,
) -> None:
    """Ask questions about a document that was read before.

    thresher ask book.kv "Who speaks first?" "Where are they?"
    """
    with clear_errors(debug):
        from thresher.cache.file import inspect
        from thresher.engine.sampling import SamplingParams

        made = inspect(file)  # a wrong file is told before the model is loaded
        params = SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            stop=tuple(stop or ()),
            logprobs=logprobs,
            seed=seed,
            n=n,
            ignore_eos=ignore_eos,
        )
        chosen = o.ModelOptions(
            model,
            weights or made.weights,
            o.certified(attention, certify),
            kv_budget,
            threads,
            allow_extrapolation,
            trust_remote_code,
        )
        llm = chosen.load()
        begin = time.perf_counter()
        with progress_bar(f"checking {file}") as bar:
            context = llm.open(file, verify=not no_verify, progress=bar)
        opened = time.perf_counter() - begin
        events = llm.stream_answers(context, questions, params)
        answers, times = show_answers(events, questions, n, quiet=str(json) == "-")
        stderr.print(
            f"{context.length} tokens opened in {opened:.2f} s, first token {times['first_token_seconds']:.2f} s "
            f"later, then {times['decode_tokens_per_second']:.1f} tokens/s",
            style="dim",
        )
        say_readings(times)
        listed = [{"question": q, "answers": a} for q, a in zip(questions, answers, strict=True)]
        write_json(
            json,
            {"file": str(file), "tokens": context.length, "open_seconds": opened, "questions": listed} | times,
        )
