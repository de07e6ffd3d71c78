"""Needles in a haystack (RULER, section 3 and table 2): values hidden under keys, some of them asked for."""

import random
import re
from dataclasses import dataclass

from thresher.evaluation.ruler.sources import Draft, SampleKey, Sources
from thresher.evaluation.ruler.words import RANDOM, distinct

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_DEPTHS = [round(100 * i / 39) for i in range(40)]  # per cent of the text where a needle may lie

_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What is the special magic {kind} for {query} mentioned in the provided text?"
)
_ONE_PREFIX = " The special magic {kind} for {query} mentioned in the provided text is"
_SOME = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What are all the special magic {kind} for {query} mentioned in the provided text?"
)
_SOME_PREFIX = " The special magic {kind} for {query} mentioned in the provided text are"


@dataclass(frozen=True)
class Needles:
    """What is hidden where. haystack: noise (one unit: a line), essay (a word) or needles (a needle)."""

    haystack: str
    key_kind: str = "words"
    value_kind: str = "numbers"
    keys: int = 1
    values: int = 1  # of each key
    queries: int = 1  # keys that are asked for

    def draft(self, key: SampleKey, amount: int, sources: Sources) -> Draft:
        """A prompt with `amount` units of haystack."""
        rng = key.rng()
        names = distinct(rng, self.key_kind, self.keys)
        values = distinct(rng, self.value_kind, self.keys * self.values)
        held = {name: values[i * self.values : (i + 1) * self.values] for i, name in enumerate(names)}
        asked = rng.sample(names, self.queries)
        needles = [_needle(self.value_kind, name, value) for name in names for value in held[name]]
        rng.shuffle(needles)
        if self.haystack == "essay":
            context = _among_sentences(rng, needles, _repeated(sources.words, amount))
        else:
            lines = [NOISE] * amount if self.haystack == "noise" else self._distractors(rng, names, amount)
            for at, needle in zip(sorted(rng.sample(range(amount), len(needles)), reverse=True), needles, strict=True):
                lines.insert(at, needle)
            context = "\n".join(lines)
        single = self.queries * self.values == 1
        kind = self.value_kind.removesuffix("s") if single else self.value_kind
        query = ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0]
        return Draft(
            (_ONE if single else _SOME).format(kind=kind, context=context, query=query),
            (_ONE_PREFIX if single else _SOME_PREFIX).format(kind=kind, query=query),
            tuple(value for name in asked for value in held[name]),
        )

    def _distractors(self, rng: random.Random, names: list[str], amount: int) -> list[str]:
        lines = []
        for _ in range(amount):
            name = RANDOM[self.key_kind](rng)
            while name in names:  # a question must have one answer
                name = RANDOM[self.key_kind](rng)
            lines.append(_needle(self.value_kind, name, RANDOM[self.value_kind](rng)))
        return lines


def _needle(kind: str, name: str, value: str) -> str:
    return f"One of the special magic {kind} for {name} is: {value}."


def _repeated(words: tuple[str, ...], amount: int) -> list[str]:
    """The first `amount` words of the text, begun again where it ends."""
    return list((words * -(-amount // len(words)))[:amount])


def _among_sentences(rng: random.Random, needles: list[str], words: list[str]) -> str:
    sentences = re.split(r"(?<=[.!?]) ", " ".join(words))
    places = sorted(int(len(sentences) * depth / 100) for depth in rng.sample(_DEPTHS, len(needles)))
    parts, begin = [], 0
    for place, needle in zip(places, needles, strict=True):
        parts += [*sentences[begin:place], needle]
        begin = place
    return " ".join([*parts, *sentences[begin:]])
