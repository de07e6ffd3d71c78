"""From a task to tokens: as much haystack as fits into the wanted length."""

from dataclasses import dataclass
from typing import Any

from thresher.engine.framing import prompt_tokens
from thresher.errors import UsageError
from thresher.evaluation.ruler.sources import Draft, SampleKey, Sources
from thresher.evaluation.ruler.tasks import TASKS


@dataclass(frozen=True)
class Sample:
    """A prompt ready to run. `amount`: units of haystack (lines, words, documents) in it."""

    key: SampleKey
    draft: Draft
    token_ids: tuple[int, ...]
    amount: int


def build_sample(key: SampleKey, sources: Sources, tokenizer: Any, framing: str) -> Sample:
    """The prompt with the most haystack for which prompt and answer stay within `key.length` tokens.

    framing "chat": the text is the user's message and the answer prefix begins the model's turn; "plain": one text.
    Raises UsageError if even the smallest prompt is longer, with the length it needs.
    """
    task = TASKS[key.task]

    def made(amount: int) -> Sample:
        draft = task.draft(key, amount, sources)
        ids = prompt_tokens(tokenizer, draft.text, framing)
        ids += tokenizer.encode(draft.answer_prefix, add_special_tokens=False)
        return Sample(key, draft, tuple(ids), amount)

    def fits(sample: Sample) -> bool:
        return len(sample.token_ids) + task.tokens_to_generate <= key.length

    best = made(task.smallest)
    if not fits(best):
        needed = len(best.token_ids) + task.tokens_to_generate
        raise UsageError(f"task {key.task} does not fit into {key.length} tokens; it needs {needed} or more")
    # Every unit is at least a token, so `length` units are more than enough. Doubling first keeps the longest prompt
    # that is tried below twice the wanted one. Tokens are nearly, not strictly, monotone in the amount; what is
    # returned has always been seen to fit.
    step = max(1, task.smallest)
    high = key.length
    while best.amount + step < key.length:
        tried = made(best.amount + step)
        if not fits(tried):
            high = tried.amount
            break
        best, step = tried, 2 * step
    while high - best.amount > 1:
        tried = made((best.amount + high) // 2)
        if fits(tried):
            best = tried
        else:
            high = tried.amount
    return best
