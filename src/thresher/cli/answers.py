"""Answers on stdout as they come, and remarks on how they came about."""

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from thresher.cli.terminal import say


@dataclass(frozen=True)
class Shown:
    """What was shown.

    answers: for each prompt and sample text, tokens, finish reason and what else was asked for. times: of the run, and
    what attention has read. errors: of the prompts that failed, while others were answered.
    """

    answers: list[list[dict[str, Any]]]
    times: dict[str, float] = field(default_factory=dict)
    errors: list[Exception] = field(default_factory=list)

    def raise_error(self) -> None:
        """The first error, after everything else has been said and written."""
        if self.errors:
            raise self.errors[0]


def show_answers(events: Iterator[Any], labels: list[str], samples: int, quiet: bool, labelled: bool = False) -> Shown:
    """Print answers as they come: a single one token by token, unless `labelled`; several when they are whole."""
    begin = time.perf_counter()
    first = None
    tokens = 0
    single = len(labels) * samples == 1 and not labelled
    answers: list[list[dict[str, Any]]] = [
        [{"text": "", "token_ids": [], "logprobs": [], "finish_reason": None} for _ in range(samples)] for _ in labels
    ]
    read: list[Any] = []
    errors: list[Exception] = []
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
        if event.speculation:
            answer["speculation"] = asdict(event.speculation)
        if error := event.error:
            answer["error"] = str(error)
            errors.append(error)
            continue
        if prompt := event.prompt:
            answer |= {"prompt_tokens": prompt.tokens, "cached_tokens": prompt.cached}
            if prompt.logprobs is not None:
                answer["prompt_logprobs"] = [c and {"logprob": c.logprob, "top": c.top} for c in prompt.logprobs]
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
        sys.stdout.flush()
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
    return Shown(answers, times, errors)


def say_readings(times: dict[str, float]) -> None:
    """What sparse attention has read, and how often an estimated error made it read all."""
    if "rows_read" in times:
        say(f"attention read {times['rows_read']:.0f} rows for each KV head of its sparse layers")
    if times.get("outputs_checked"):
        share = 100 * times["outputs_escalated"] / times["outputs_checked"]
        say(f"{share:.2f} % of {times['outputs_checked']:.0f} attention outputs were uncertain and answered densely")


def say_speculation(answers: list[list[dict[str, Any]]]) -> None:
    """What drafts were worth."""
    found = [a for samples in answers for a in samples if "speculation" in a]
    passes = sum(a["speculation"]["passes"] for a in found)
    if not passes:
        return
    tokens = sum(len(a["token_ids"]) for a in found) - len(found)  # the first of each comes with the prompt
    drafted, accepted = (sum(sum(a["speculation"][name]) for a in found) for name in ("drafted", "accepted"))
    if not drafted:
        say("speculation: no drafts, as none would have paid")
        return
    say(
        f"speculation: {tokens / passes:.2f} tokens a pass, "
        f"{100 * accepted / drafted:.0f} % of {drafted} drafted tokens accepted"
    )


def say_cut(answers: list[list[dict[str, Any]]], max_new_tokens: int) -> None:
    """Which answers did not come to their end."""
    cut = [len(a["token_ids"]) for samples in answers for a in samples if a["finish_reason"] == "length"]
    if not cut or not max_new_tokens:
        return
    which = "the answer was" if sum(map(len, answers)) == 1 else f"{len(cut)} of {sum(map(len, answers))} answers were"
    if max(cut) >= max_new_tokens:
        say(f"{which} cut after {max_new_tokens} tokens; --max-new-tokens allows more")
    else:
        say(f"{which} cut after {max(cut)} tokens: the model was trained for no more positions")
