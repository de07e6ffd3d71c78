"""Variable tracking (RULER, section 3): which variables hold a value, through a chain of assignments in noise."""

import random
import string
from itertools import pairwise

from thresher.evaluation.ruler.needles import NOISE
from thresher.evaluation.ruler.sources import Draft, SampleKey, Sources

HOPS = 4
SMALLEST = HOPS + 2  # lines of noise: more than there are assignments
_EXAMPLE_LINES = 10  # the worked example of RULER fills 500 tokens

_TEXT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {value} in the text above."
)
_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, "
    "{count} variables are assigned the value {value}, they are: "
)


def draft(key: SampleKey, amount: int, sources: Sources) -> Draft:
    """A worked example, then one chain of HOPS hops in `amount` lines of noise."""
    rng = key.rng()
    value, example_value = (str(n) for n in rng.sample(range(10_000, 100_000), 2))
    names = _names(rng, 5)
    example_names = _names(rng, 3)  # shorter ones, so that they are no answers to the question
    example = _ask(rng, example_names, example_value, _EXAMPLE_LINES)
    shown = f"{example.text}{example.answer_prefix} {' '.join(example_names)}\n\n"
    asked = _ask(rng, names, value, amount)
    return Draft(f"{shown}\n\n{asked.text}", asked.answer_prefix, tuple(names))


def _names(rng: random.Random, letters: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < HOPS + 1:
        names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    return list(names)


def _ask(rng: random.Random, names: list[str], value: str, lines: int) -> Draft:
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {name} = VAR {before} " for before, name in pairwise(names)]
    text = [NOISE + "\n"] * lines
    for i, place in enumerate(sorted(rng.sample(range(lines), len(chain)))):
        text.insert(place + i, chain[i])
    context = " ".join(text)
    prefix = _PREFIX.format(count=len(names), value=value)
    return Draft(_TEXT.format(context=context, value=value), prefix, tuple(names))
