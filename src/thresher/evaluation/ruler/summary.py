"""Scores of many answers: means with intervals, differences to dense on the same samples."""

from collections.abc import Sequence
from dataclasses import dataclass

from thresher.attention.dense import Dense
from thresher.evaluation.ruler.run import Outcome
from thresher.evaluation.ruler.sources import Sources
from thresher.evaluation.ruler.tasks import Task
from thresher.evaluation.statistics import Interval, bootstrap_difference, bootstrap_mean

ALL = "all"  # the mean over tasks
DENSE = Dense.name
FAILS_BELOW = 50.0  # per cent at dense: below, the model itself cannot do the task


@dataclass(frozen=True)
class Summary:
    """Scores in per cent. difference: to dense, paired by sample, None for dense itself. ms: of one decode step,
    None if no answer had a second token."""

    task: str
    length: int
    method: str
    samples: int
    score: Interval
    difference: Interval | None
    ms: float | None
    kv_read: float


def summarize(outcomes: Sequence[Outcome], seed: int = 0) -> list[Summary]:
    """One summary for each length, task and method; with several tasks also their mean, called "all"."""
    lengths = dict.fromkeys(o.length for o in outcomes)
    tasks = list(dict.fromkeys(o.task for o in outcomes))
    methods = dict.fromkeys(o.method for o in outcomes)
    rows = []
    for length in lengths:
        for task in [*tasks, ALL] if len(tasks) > 1 else tasks:
            chosen = [o for o in outcomes if o.length == length and task in (ALL, o.task)]
            # Tasks have as many samples each, so the mean over samples is the mean over tasks.
            baseline = {(o.task, o.index): 100 * o.score for o in chosen if o.method == DENSE}
            for method in methods:
                own = [o for o in chosen if o.method == method]
                rows.append(_summary(task, length, method, own, baseline, seed))
    return rows


def _summary(
    task: str, length: int, method: str, own: Sequence[Outcome], baseline: dict[tuple[str, int], float], seed: int
) -> Summary:
    scores = [100 * o.score for o in own]
    difference = None
    if method != DENSE:
        difference = bootstrap_difference(scores, [baseline[o.task, o.index] for o in own], seed=seed)
    steps = sum(o.steps for o in own)
    return Summary(
        task=task,
        length=length,
        method=method,
        samples=len(own),
        score=bootstrap_mean(scores, seed=seed),
        difference=difference,
        ms=1e3 * sum(o.seconds for o in own) / steps if steps else None,
        kv_read=sum(o.kv_read for o in own) / len(own),
    )


def notes(rows: Sequence[Summary], tasks: Sequence[Task], sources: Sources) -> list[str]:
    """What must be said beside the scores: where the model itself fails, and which questions are invented."""
    remarks = []
    # Where dense fails, a method has little to lose: its score says nothing about the method.
    failing = [f"{r.task} at {r.length}" for r in rows if _dense(r) and r.score.mean < FAILS_BELOW]
    if failing:
        remarks.append(
            f"The model itself fails with dense attention (below {FAILS_BELOW:.0f} %), so these say nothing about a "
            f"method: {', '.join(failing)}"
        )
    for task in tasks:
        if task.question_kind and sources.question_set(task.question_kind) is None:
            dataset = {"squad": "SQuAD", "hotpot": "HotpotQA"}[task.question_kind]
            remarks.append(
                f"{task.name}: questions are a synthetic construction about invented persons, not {dataset}, and not "
                "comparable with published scores; give --qa FILE for the real ones"
            )
    return remarks


def _dense(row: Summary) -> bool:
    return row.method == DENSE and row.task != ALL
