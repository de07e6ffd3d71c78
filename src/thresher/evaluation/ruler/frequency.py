"""Aggregation (RULER, section 3): the common words of a numbered list, the frequent words of a coded text."""

import math
import random
import string

from thresher.evaluation.ruler.sources import Draft, SampleKey, Sources

COMMON = 10
SMALLEST_COMMON = COMMON + 1  # words: at least one that is not common
_SHORT = 4096  # tokens; below, RULER repeats words less often

_CWE = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list?"
)
_CWE_PREFIX = " Answer: The top 10 words that appear most often in the list are:"

ALPHA = 2.0
_ZETA = math.pi**2 / 6  # of ALPHA
# Expected words of the coded text: from here on the third and the fourth answer's counts differ after rounding down.
SMALLEST_FREQUENT = 100
_FWE = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. {context}\n"
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
_FWE_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"


def common_words(key: SampleKey, amount: int, sources: Sources) -> Draft:
    """A worked example, then `amount` different words, 10 of them common.

    Common words appear 30 times and others 3 times; 6 and once if the prompt is shorter than 4,096 tokens. The example
    has 40 words, 10 times and 3 times; in short prompts 20 words, 3 times and once.
    """
    rng = key.rng()
    short = key.length < _SHORT
    example, common = _word_list(rng, sources, 20 if short else 40, *((3, 1) if short else (10, 3)))
    shown = _CWE.format(context=example) + _CWE_PREFIX + " " + _numbered(common)
    context, common = _word_list(rng, sources, amount, *((6, 1) if short else (30, 3)))
    return Draft(f"{shown}\n{_CWE.format(context=context)}", _CWE_PREFIX, tuple(common))


def _word_list(rng: random.Random, sources: Sources, amount: int, often: int, seldom: int) -> tuple[str, list[str]]:
    pool = sources.vocabulary
    if amount <= sources.plain_words:  # pairs of words are a reserve for very long lists
        pool = pool[: sources.plain_words]
    chosen = rng.sample(pool, min(amount, len(pool)))
    common = chosen[:COMMON]
    words = common * often + chosen[COMMON:] * seldom
    rng.shuffle(words)
    return _numbered(words), common


def _numbered(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def frequent_words(key: SampleKey, amount: int, sources: Sources) -> Draft:
    """Invented words of six letters; the word of rank k appears amount / (zeta(2) k^2) times, rounded down.

    The first is replaced by dots, as noise; the next three are asked for.
    """
    rng = key.rng()
    coded: dict[str, None] = {}
    while len(coded) < max(5, key.length // 50):
        coded["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    ranked = ["...", *list(coded)[1:]]
    counts = [int(amount * rank**-ALPHA / _ZETA) for rank in range(1, len(ranked) + 1)]
    words = [word for word, count in zip(ranked, counts, strict=True) for _ in range(count)]
    rng.shuffle(words)
    return Draft(_FWE.format(context=" ".join(words)), _FWE_PREFIX, tuple(ranked[1:4]))
