"""A classifier under attack beside another one, as a report that is kept: rows, distances, transfer and checks."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from thresher.errors import StorageError
from thresher.evaluation.statistics import Interval
from thresher.files import replaced_text
from thresher.vision.attacks import Outcome, Robustness, compare, evaluate, parse_attacks, transfer
from thresher.vision.data import Images
from thresher.vision.masking import masking_checks
from thresher.vision.models import DESCRIPTION, Classifier

KEPT = "robustness.json"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Row:
    """One attack at one epsilon. rival: of the other model on the same images; difference: to it, in pairs; p:
    McNemar."""

    attack: str
    epsilon: float
    accuracy: Interval
    rival: Interval | None = None
    difference: Interval | None = None
    p: float | None = None


@dataclass(frozen=True)
class Report:
    """What `attack` found on so many test images."""

    images: int
    rows: list[Row]
    distances: list[dict[str, Any]]
    checks: list[dict[str, Any]]

    def summary(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def attack(
    classifier: Classifier,
    test: Images,
    attacks: str,
    epsilons: Sequence[float],
    count: int = 1000,
    rival: Classifier | None = None,
    check: bool = True,
    batch: int = 250,
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> Report:
    """Attack a classifier on `count` test images, and `rival` on the same ones; transfer is with the first attack that
    takes an epsilon and iterates, at every epsilon, both ways. Checks are at the middle epsilon. Raises UsageError."""
    chosen = torch.linspace(0, len(test) - 1, min(count, len(test))).long()
    images, labels = test.pixels[chosen].float() / 255, test.labels[chosen]

    def run(name: str, model: Classifier) -> Robustness:
        return evaluate(
            *(model.module, images, labels, attacks, epsilons),
            batch=batch,
            seed=seed,
            progress=lambda done, total: progress(f"attacking {name}", done, total),
        )

    ours = run("the model", classifier)
    theirs = run("the other", rival) if rival else None
    pairs: list[tuple[Outcome, Outcome | None]] = [(ours.clean, theirs.clean if theirs else None)]
    pairs += zip(ours.outcomes, theirs.outcomes if theirs else [None] * len(ours.outcomes), strict=True)
    rows = [_row(a, b) for a, b in pairs]
    iterated = [a for a in parse_attacks(attacks) if a.kind in ("pgd", "mifgsm") and not a.minimal]
    if rival and iterated:
        for epsilon in epsilons:
            for_us, for_them = (
                transfer(a.module, b.module, images, labels, iterated[0], epsilon, batch=batch, seed=seed)
                for a, b in ((rival, classifier), (classifier, rival))
            )
            row = _row(for_us, for_them)
            rows.append(Row(f"{row.attack} transfer", *list(vars(row).values())[1:]))
    distances = [
        {
            "model": name,
            "attack": d.attack,
            "median": d.median if math.isfinite(d.median) else None,  # nothing was attacked, or most attacks failed
            "attacked": d.attacked,
            "failed": d.failed,
        }
        for name, found in (("the model", ours), ("the other", theirs))
        if found
        for d in found.distances
    ]
    checks = []
    if check:
        middle = sorted(e for e in epsilons if e > 0)
        if middle:
            found_checks = masking_checks(
                *(classifier.module, images, labels, middle[len(middle) // 2]),
                surrogate=rival.module if rival else None,
                batch=batch,
                seed=seed,
                progress=lambda done, total: progress("checking gradients", done, total),
            )
            checks = [asdict(c) for c in found_checks]
    return Report(len(chosen), rows, distances, checks)


def _row(ours: Outcome, theirs: Outcome | None) -> Row:
    if theirs is None:
        return Row(ours.attack, ours.epsilon, ours.accuracy)
    between = compare(ours, theirs)
    return Row(ours.attack, ours.epsilon, ours.accuracy, theirs.accuracy, between.difference, between.p)


def keep(report: Report, folder: Path) -> Path | None:
    """Write the report into a folder of this project; of anything else nothing is written. Raises StorageError."""
    if not (folder / DESCRIPTION).is_file():
        return None
    path = folder / KEPT
    try:
        replaced_text(path, json.dumps(report.summary(), indent=1))
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror}") from error
    return path
