"""Read Paradise Lost once, keep it as a KV file, ask it. Prints what it measured, right answers and wrong ones alike.

Run it with: make demo
"""

import argparse
import time
from pathlib import Path

from paradise_lost import FACTS, paradise_lost, with_facts
from rich.console import Console

from thresher import LLM, SamplingParams
from thresher.cli.terminal import progress_bar
from thresher.kernels.native import kernel_set, threads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--words", type=int, default=4000, help="how much of the text to read")
    parser.add_argument("--weights", default="bf16", help="bf16, int8 or float32")
    parser.add_argument("--output", type=Path, default=Path("build/paradise_lost.kv"), help="where the KV file goes")
    options = parser.parse_args()
    console = Console(highlight=False)

    text = paradise_lost()
    lines, words = [], 0
    for line in text.splitlines():
        lines.append(line.rstrip())
        words += len(line.split())
        if words >= options.words:
            break
    document = with_facts("\n".join(lines))

    llm = LLM(weights=options.weights, progress=console.print)
    console.print(f"model {llm.model.name} ({options.weights}), kernels {kernel_set().name}, {threads()} threads")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    with progress_bar("reading Paradise Lost") as bar:
        context = llm.read(document, options.output, name="Paradise Lost", resume=False, progress=bar)
    reading = time.perf_counter() - begin
    size = options.output.stat().st_size / 2**20
    console.print(
        f"read {context.length} tokens in {reading:.1f} s ({context.length / reading:.0f} tokens/s) "
        f"into {options.output} ({size:.0f} MiB)"
    )
    del context

    params = SamplingParams(max_new_tokens=40)
    console.print("\nOpened again from the file, memory-mapped and checked, for every question:")
    waits, rates, right = [], [], 0
    for share, _, question, expected in FACTS:
        begin = time.perf_counter()
        opened = llm.open(options.output)
        first, count, answer = 0.0, 0, ""
        for event in llm.stream_answers(opened, question, params):
            count += 1
            first = first or time.perf_counter() - begin
            answer += event.text
        elapsed = time.perf_counter() - begin
        waits.append(first)
        if count > 1:
            rates.append((count - 1) / (elapsed - first))
        good = expected.lower() in answer.lower()
        right += good
        console.print(f"\n  {question}  [dim](planted at {share:.0%} of the text)[/dim]")
        console.print(f"  {answer.strip()}  {'[green]right' if good else f'[red]wrong, it is {expected}'}")

    wait = sorted(waits)[len(waits) // 2]
    rate = sorted(rates)[len(rates) // 2]
    console.print(f"\n{right} of {len(FACTS)} planted facts found, by a model of 135 million parameters.")
    console.print(
        f"first token from the file: {wait:.3f} s (median), {100 * wait / reading:.1f} % of reading the text again"
    )
    console.print(f"decoding: {rate:.0f} tokens/s (median over the questions)")
    compare_drafts(llm, options.output, console)
    console.print("all questions at once, sharing the cache:", end=" ")
    begin = time.perf_counter()
    answers = llm.ask(llm.open(options.output), [question for _, _, question, _ in FACTS], params)
    elapsed = time.perf_counter() - begin
    tokens = sum(len(a[0].token_ids) for a in answers)
    console.print(f"{tokens} tokens in {elapsed:.2f} s, {tokens / elapsed:.0f} tokens/s")


def compare_drafts(llm: LLM, path: Path, console: Console) -> None:
    """One long answer with exact attention, decoded plainly and with drafts, in turns."""
    params = SamplingParams(max_new_tokens=200, ignore_eos=True)
    rates: dict[str, list[float]] = {"none": [], "auto": []}
    answers = set()
    for speculate in ("none", "auto", "auto", "none"):
        opened, times, text = llm.open(path), [], ""
        for event in llm.stream_answers(opened, "Tell it again.", params, attention="dense", speculate=speculate):
            times.append(time.perf_counter())
            text += event.text
        rates[speculate].append((len(times) - 1) / (times[-1] - times[0]))
        answers.add(text)
    plain, drafted = (sum(rates[name]) / 2 for name in ("none", "auto"))
    console.print(
        f"200 tokens with exact attention: {plain:.0f} tokens/s, with drafts {drafted:.0f} ({drafted / plain:.2f} x), "
        f"{'the same text' if len(answers) == 1 else 'ANOTHER TEXT'}"
    )


if __name__ == "__main__":
    main()
