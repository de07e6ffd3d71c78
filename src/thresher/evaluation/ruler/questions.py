"""Question answering among documents (RULER's qa_1 and qa_2), from a file or about invented persons."""

import random

from thresher.errors import UsageError
from thresher.evaluation.ruler.sources import Draft, SampleKey, Sources
from thresher.evaluation.ruler.words import listed

_TEXT = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "The following are given documents.\n\n{context}\n\n"
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "Question: {query}"
)
_PREFIX = " Answer:"

_FIRST = listed(
    "Ada Basil Clara Dario Edda Felix Greta Hugo Ida Jonas Karin Lars Mira Nils Olga Paul Rosa Sven Tilda Ugo Vera Wim "
    "Xenia Yann Zora Anton Berta Cyril Doris Emil"
)
_ONSET = listed("Bal Cor Dren Fal Gar Hol Kes Lind Mar Nor Oster Pel Quin Rav Sol Tarn Ulm Vas Wel Zan")
_MIDDLE = listed("a e i o u an er in ol um")
_SURNAME_END = listed("berg dale feld gren holt lund mann nik quist rand sson tov vik wick")
_TOWN_END = listed("borough bridge bury by dorf field ford ham haven minster mouth port stead stow ton ville")
_TRADE = listed(
    "baker botanist carpenter chemist clockmaker cook engraver farmer glassblower gardener jeweller judge librarian "
    "mason miller musician painter physician pilot printer sailor sculptor surveyor tailor teacher weaver"
)


def draft_single(key: SampleKey, amount: int, sources: Sources) -> Draft:
    """One document holds the answer: SQuAD, or an invented person's birthplace."""
    return _draft(key, amount, sources, "squad")


def draft_double(key: SampleKey, amount: int, sources: Sources) -> Draft:
    """Two documents are needed: HotpotQA, or the birthplace of an invented person's teacher."""
    return _draft(key, amount, sources, "hotpot")


def _draft(key: SampleKey, amount: int, sources: Sources, kind: str) -> Draft:
    rng = key.rng()
    given = sources.question_set(kind)
    if given is None:
        documents, query, answers = _persons(rng, max(amount, 2), two_hops=kind == "hotpot")
    else:
        if key.index >= len(given.questions):
            raise UsageError(f"{given.name} holds {len(given.questions)} questions; choose fewer samples")
        question = given.questions[key.index]
        chosen = list(question.documents)
        chosen += _some(rng, list(question.related), amount - len(chosen))
        if amount > len(chosen):
            used = set(chosen)
            chosen += _some(rng, [i for i in range(len(given.documents)) if i not in used], amount - len(chosen))
        documents, query, answers = [given.documents[i] for i in chosen], question.text, question.answers
    rng.shuffle(documents)
    context = "\n\n".join(f"Document {i}:\n{document}" for i, document in enumerate(documents, 1))
    return Draft(_TEXT.format(context=context, query=query), _PREFIX, tuple(answers))


def _some(rng: random.Random, numbers: list[int], count: int) -> list[int]:
    return rng.sample(numbers, max(0, min(count, len(numbers))))


def _persons(rng: random.Random, amount: int, two_hops: bool) -> tuple[list[str], str, tuple[str, ...]]:
    """`amount` documents, a question, and its answer. Each person learned from another one, who has a document too."""
    surnames = len(_ONSET) * len(_MIDDLE) * len(_SURNAME_END)
    names = [
        f"{_FIRST[n // surnames]} {_combine(n, _ONSET, _MIDDLE, _SURNAME_END)}"
        for n in rng.sample(range(len(_FIRST) * surnames), amount)
    ]
    towns = [_combine(rng.randrange(1 << 30), _ONSET, _MIDDLE, _TOWN_END) for _ in names]
    documents = []
    for i, (name, town) in enumerate(zip(names, towns, strict=True)):
        trade, year = rng.choice(_TRADE), rng.randint(1700, 1950)
        work = _combine(rng.randrange(1 << 30), _ONSET, _MIDDLE, _TOWN_END)
        documents.append(
            f"{name}\n{name} (born {year}) was a {trade}. {name} was born in the town of {town} and later worked in "
            f"{work}. {name} learned the trade from {names[(i + 1) % amount]}."
        )
    if two_hops:
        return documents, f"In which town was the teacher of {names[0]} born?", (towns[1],)
    return documents, f"In which town was {names[0]} born?", (towns[0],)


def _combine(number: int, *parts: tuple[str, ...]) -> str:
    """A word of one syllable from each list; different for all numbers below the number of combinations."""
    word = ""
    for part in parts:
        word += part[number % len(part)]
        number //= len(part)
    return word
