"""One engine, shared: decoding beside busy processes, a short prompt behind a long one, what the sampler costs a step.

python benchmarks/shared.py --tokens 6000
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time

from thresher import LLM, SamplingParams
from thresher.engine import scheduler
from thresher.engine.documents import Context
from thresher.engine.requests import Request
from thresher.evaluation.bench import prompt
from thresher.evaluation.machine import measure_machine
from thresher.kernels.native import kernel_set

BUSY = [sys.executable, "-c", "while True: pass"]


def token_seconds(llm: LLM, context: Context, tokens: int) -> float:
    """Median time between the tokens of an answer."""
    times = []
    for event in llm.stream_answers(context, ["And then?"], SamplingParams(max_new_tokens=tokens, ignore_eos=True)):
        if event.choice:
            times.append(time.perf_counter())
    return statistics.median(b - a for a, b in itertools.pairwise(times))


def beside_busy_processes(llm: LLM, ids: list[int], rounds: int = 3) -> dict[str, float]:
    """Milliseconds of a token with 0, 1 and 2 processes that never sleep, in turns."""
    context = llm.read(llm.model.tokenizer.decode(ids))
    found: dict[int, list[float]] = {0: [], 1: [], 2: []}
    for _ in range(rounds):
        for count, seconds in found.items():
            busy = [subprocess.Popen(BUSY) for _ in range(count)]
            try:
                time.sleep(0.5)
                seconds.append(token_seconds(llm, context, 60))
            finally:
                for process in busy:
                    process.kill()
    return {f"{count} busy": 1e3 * statistics.median(seconds) for count, seconds in found.items()}


def first_token(llm: LLM, ids: list[int]) -> float:
    begin = time.perf_counter()
    stream = llm.stream([ids], SamplingParams(max_new_tokens=1))
    next(event for event in stream if event.choice)
    return time.perf_counter() - begin


def behind_a_long_prompt(llm: LLM, ids: list[int], after: tuple[float, ...] = (0.1, 0.5, 1.0, 2.0)) -> dict[str, float]:
    """Seconds to the first token of a prompt of 20 tokens: alone, and so long after a long one has begun."""
    short = ids[:20]
    first_token(llm, short)
    found = {"alone": first_token(llm, short)}
    for delay in after:
        long = llm.engine.submit([Request(llm.engine.new_id(), ids, SamplingParams(max_new_tokens=1))])
        time.sleep(delay)
        found[f"after {delay} s"] = first_token(llm, short)
        long.close()
    return found


def sampler_share(llm: LLM, ids: list[int], batch: int = 16) -> dict[str, float]:
    """Of the time of decoding steps of a batch, with a temperature and top-p."""
    spent = []
    verify = scheduler.verify

    def timed(*args: object) -> object:
        begin = time.perf_counter()
        try:
            return verify(*args)  # type: ignore[arg-type]
        finally:
            spent.append(time.perf_counter() - begin)

    params = SamplingParams(max_new_tokens=64, temperature=0.8, top_p=0.95, ignore_eos=True)
    scheduler.verify = timed  # type: ignore[assignment]
    try:
        prompts = [ids[at : at + 200] for at in range(0, 200 * batch, 200)]
        begins: list[float] = []
        for event in llm.stream(prompts, params):
            if event.choice and event.request == 0:
                begins.append(time.perf_counter())
    finally:
        scheduler.verify = verify
    step = statistics.median(b - a for a, b in itertools.pairwise(begins[8:]))
    sampler = statistics.median(spent[-40:])
    return {"step_ms": 1e3 * step, "sampler_ms": 1e3 * sampler, "share": sampler / step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=6000)
    options = parser.parse_args()
    llm = LLM()
    ids = prompt(llm, options.tokens)
    print(json.dumps({"kernels": kernel_set().name, "GB_per_s": measure_machine().read / 1e9}))
    for measure in (behind_a_long_prompt, sampler_share, beside_busy_processes):
        print(json.dumps({measure.__name__: measure(llm, ids)}), flush=True)


if __name__ == "__main__":
    main()
