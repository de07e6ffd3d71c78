"""What prompts are drawn from: a haystack text, questions and documents, and a random stream for each sample."""

import hashlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from thresher.errors import UsageError
from thresher.evaluation.ruler.words import ADJECTIVES, NOUNS


@dataclass(frozen=True)
class SampleKey:
    """Which sample. `length`: tokens of prompt and answer together."""

    task: str
    length: int
    index: int
    seed: int

    def rng(self) -> random.Random:
        """A fresh stream: the same for every call and every length, another for every (seed, task, index)."""
        return random.Random(f"{self.seed}/{self.task}/{self.index}")


@dataclass(frozen=True)
class Draft:
    """A prompt before tokens: what the user says, how the answer begins, what a right answer contains."""

    text: str
    answer_prefix: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """`documents` hold the answer; `related` come from the same article and fill up first, as RULER does for SQuAD."""

    text: str
    answers: tuple[str, ...]
    documents: tuple[int, ...]
    related: tuple[int, ...] = ()


@dataclass(frozen=True)
class QuestionSet:
    """Questions over numbered documents. `kind`: squad or hotpot."""

    name: str
    kind: str
    sha256: str
    questions: tuple[Question, ...]
    documents: tuple[str, ...]


@dataclass(frozen=True)
class Sources:
    """A haystack text and at most one question set of each kind."""

    name: str
    text: str
    questions: tuple[QuestionSet, ...] = ()

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The haystack, word by word, punctuation kept."""
        return tuple(self.text.split())

    @cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """Distinct plain words in fixed order: the lists', the haystack's, then adjective-noun pairs as a reserve."""
        found = set(re.findall(r"\b[a-z]{4,10}\b", self.text)) | set(ADJECTIVES) | set(NOUNS)
        return (*sorted(found), *(f"{a}-{n}" for a in ADJECTIVES for n in NOUNS))

    @cached_property
    def plain_words(self) -> int:
        """How many of `vocabulary` are single words."""
        return len(self.vocabulary) - len(ADJECTIVES) * len(NOUNS)

    def question_set(self, kind: str) -> QuestionSet | None:
        return next((q for q in self.questions if q.kind == kind), None)


def read_questions(paths: Sequence[Path]) -> tuple[QuestionSet, ...]:
    """Question files in SQuAD (`{"data": [...]}`) or HotpotQA (`[{"question": ...}]`) format, told apart by their form.

    Raises UsageError if a file is missing, not of these formats, without questions, or the second of its kind.
    """
    sets: list[QuestionSet] = []
    for path in paths:
        try:
            data = path.read_bytes()
            value = json.loads(data)
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}") from None
        except ValueError:
            raise UsageError(f"{path} is not a JSON file") from None
        kind = "hotpot" if isinstance(value, list) else "squad"
        try:
            documents, questions = _hotpot(value) if kind == "hotpot" else _squad(value)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UsageError(f"{path} is neither in SQuAD nor in HotpotQA format") from None
        if not questions:
            raise UsageError(f"{path} holds no questions that can be answered")
        if any(s.kind == kind for s in sets):
            raise UsageError(f"{path} is a second file in {kind} format; give one of each")
        sets.append(QuestionSet(path.name, kind, hashlib.sha256(data).hexdigest(), questions, documents))
    return tuple(sets)


def _squad(value: Any) -> tuple[tuple[str, ...], tuple[Question, ...]]:
    documents = sorted({p["context"] for article in value["data"] for p in article["paragraphs"]})
    number = {text: i for i, text in enumerate(documents)}
    questions = []
    for article in value["data"]:
        inside = list(dict.fromkeys(number[p["context"]] for p in article["paragraphs"]))
        for paragraph in article["paragraphs"]:
            own = number[paragraph["context"]]
            for qa in paragraph["qas"]:
                answers = tuple(str(a["text"]) for a in qa["answers"])
                if answers and not qa.get("is_impossible", False):
                    related = tuple(i for i in inside if i != own)
                    questions.append(Question(str(qa["question"]), answers, (own,), related))
    return tuple(documents), tuple(questions)


def _hotpot(value: Any) -> tuple[tuple[str, ...], tuple[Question, ...]]:
    def written(title: str, sentences: list[str]) -> str:
        return f"{title}\n{''.join(sentences)}"

    documents = sorted({written(t, s) for item in value for t, s in item["context"]})
    number = {text: i for i, text in enumerate(documents)}
    questions = []
    for item in value:
        inside = tuple(dict.fromkeys(number[written(t, s)] for t, s in item["context"]))
        questions.append(Question(str(item["question"]), (str(item["answer"]),), inside))
    return tuple(documents), tuple(questions)
