from pathlib import Path
from typing import Annotated

import typer

from thresher.cli import options as o
from thresher.cli.read import MOST_BYTES
from thresher.cli.terminal import clear_errors, read_text, say, say_readings, show_answers, stderr, write_json


def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to say to the model.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Read the prompt from this file; - for stdin.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
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
    weights: o.Weights = "bf16",
    attention: o.Attention = "dense",
    certify: o.Certify = None,
    kv_budget: o.KVBudget = None,
    threads: o.Threads = None,
    allow_extrapolation: o.Extrapolate = False,
    trust_remote_code: o.RemoteCode = False,
    json: o.Json = None,
    debug: o.Debug = False,
) -> None:
    """Answer a prompt.

    thresher generate "Name three colours."
    """
    with clear_errors(debug):
        from thresher.engine.framing import default_framing
        from thresher.engine.sampling import SamplingParams
        from thresher.errors import UsageError

        if (prompt is None) == (file is None):
            raise UsageError("give a prompt, or --file with one")
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
        text = prompt if prompt is not None else read_text(Path(file or "-"), MOST_BYTES)
        method = o.certified(attention, certify)
        chosen = o.ModelOptions(model, weights, method, kv_budget, threads, allow_extrapolation, trust_remote_code)
        llm = chosen.load()
        framing = "plain" if raw else default_framing(llm.model.tokenizer)
        events = llm.stream([text], params, framing)
        answers, times = show_answers(events, ["answer"], n, quiet=str(json) == "-")
        stderr.print(
            f"first token after {times['first_token_seconds']:.2f} s, then "
            f"{times['decode_tokens_per_second']:.1f} tokens/s",
            style="dim",
        )
        say_readings(times)
        if llm.dense_up_to and "rows_read" not in times:
            say(f"attention was dense: {llm.attention} begins beyond {llm.dense_up_to} tokens")
        write_json(json, {"model": llm.model.name, "prompt": text, "answers": answers[0]} | times)
