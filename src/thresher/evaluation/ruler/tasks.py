"""The 13 tasks by name, with what RULER sets for each, and how answers are scored."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from thresher.errors import UsageError
from thresher.evaluation.ruler import frequency, questions, tracking
from thresher.evaluation.ruler.needles import Needles
from thresher.evaluation.ruler.sources import Draft, SampleKey, Sources

Score = Callable[[str, Sequence[str]], float]


def string_match_all(answer: str, references: Sequence[str]) -> float:
    """Share of the references that occur in the answer, whatever the case, 0 .. 1."""
    low = answer.lower()
    return sum(reference.lower() in low for reference in references) / len(references)


def string_match_part(answer: str, references: Sequence[str]) -> float:
    """1 if any reference occurs in the answer, whatever the case, else 0."""
    low = answer.lower()
    return float(any(reference.lower() in low for reference in references))


@dataclass(frozen=True)
class Task:
    """draft(sample, amount of haystack, sources); smallest: the amount it needs at least; question_kind: that of the
    question file it draws from, if it does."""

    name: str
    tokens_to_generate: int
    draft: Callable[[SampleKey, int, Sources], Draft]
    smallest: int = 1
    score: Score = string_match_all
    question_kind: str | None = None


_NEEDLES = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", value_kind="uuids"),
    "niah_multikey_1": Needles("essay", keys=4),
    "niah_multikey_2": Needles("needles"),
    "niah_multikey_3": Needles("needles", key_kind="uuids", value_kind="uuids"),
    "niah_multivalue": Needles("essay", values=4),
    "niah_multiquery": Needles("essay", keys=4, queries=4),
}
TASKS: dict[str, Task] = {name: Task(name, 128, needles.draft) for name, needles in _NEEDLES.items()} | {
    "vt": Task("vt", 30, tracking.draft, tracking.SMALLEST),
    "cwe": Task("cwe", 120, frequency.common_words, frequency.SMALLEST_COMMON),
    "fwe": Task("fwe", 50, frequency.frequent_words, frequency.SMALLEST_FREQUENT),
    "qa_1": Task("qa_1", 32, questions.draft_single, 1, string_match_part, "squad"),
    "qa_2": Task("qa_2", 32, questions.draft_double, 2, string_match_part, "hotpot"),
}


def choose_tasks(names: Sequence[str]) -> list[Task]:
    """Tasks by name; a family's name (niah, qa) means all of it, "all" all 13. Raises UsageError for an unknown one."""
    chosen: dict[str, Task] = {}
    for name in names:
        matching = [t for t in TASKS if name in ("all", t) or t.startswith(f"{name}_")]
        if not matching:
            raise UsageError(f"task '{name}': not known; there is {', '.join(TASKS)}, and all, niah, qa")
        chosen |= {t: TASKS[t] for t in matching}
    if not chosen:
        raise UsageError("no tasks given; e.g. niah_single_1,vt or all")
    return list(chosen.values())
