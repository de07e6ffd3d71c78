"""Whether a classifier withstands attacks because it is robust, or because its gradients lead nowhere."""

from dataclasses import dataclass, replace

from torch import Tensor, nn

from thresher.errors import UsageError
from thresher.vision.attacks import (
    ATTACKS,
    Attack,
    Outcome,
    Progress,
    attackable,
    check_epsilon,
    discordant,
    progress_bars,
    tail,
    transfer,
)

_LEVEL = 0.01  # of the tests


@dataclass(frozen=True)
class Check:
    """A sign of masked gradients. rule: what passes; numbers: accuracies by attack, and p where there is a test."""

    name: str
    passed: bool
    rule: str
    numbers: dict[str, float]


def masking_checks(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    *,
    surrogate: nn.Module | None = None,
    large: float = 1.0,
    batch: int = 128,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Check]:
    """Whether attacks fail because the model is robust, or because its gradients lead nowhere (Athalye 2018, Carlini
    2019). Black-box attacks are Square with 1,000 queries and, with a `surrogate`, images made on that.

    Tolerances. "A no stronger than B" passes unless A wins images that B does not, more often than the other way round,
    by an exact one-sided McNemar test at level 0.01: fewer than 7 such images never fail it, and where A and B are as
    strong it fails once in a hundred. Runs that are compared start from points of their own, as more restarts from the
    same ones are stronger by construction. "Reaches 0" at a `large` epsilon (1: any image may become any other) is of
    PGD without a random start, which would be half an attack by itself; it passes if the Wilson interval (95 %) reaches
    down to 1 %. Noise, random signs times epsilon, passes if it loses at most a quarter of the images that PGD loses,
    or 1 % of all. A model may pass all of it and yet be masked.

    Raises what `evaluate` does, and UsageError if epsilon is 0 or no image is classified correctly.
    """
    check_epsilon(epsilon)
    if not epsilon:
        raise UsageError("gradients cannot be checked with epsilon=0")
    pgd, square = ATTACKS["pgd20"], replace(ATTACKS["square"], steps=1000)
    once, longer, walk = Attack("pgd20 once", "pgd", 20), Attack("pgd100 once", "pgd", 100), Attack("bim20", "bim", 20)
    plan = [(attack, epsilon) for attack in (ATTACKS["noise"], ATTACKS["fgsm"], once, longer, pgd, square)]
    plan.append((walk, large))
    with attackable(model, images, labels, batch) as target:
        if not target.correct.any():
            raise UsageError("no image is classified correctly: there is nothing to attack")
        bars = progress_bars(progress, len(plan), len(images))
        found = [target.outcome(*run, len(plan) * seed + i, next(bars)) for i, run in enumerate(plan)]
    noise, fgsm, short, long, white, black, most = found
    clean = int(target.correct.sum())
    by_noise, by_pgd = clean - sum(noise.survived), clean - sum(white.survived)
    checks = [
        _no_stronger("iterative beats single-step", fgsm, short),
        _no_stronger("more steps never help the defender", short, long),
        _no_stronger("more restarts never help the defender", short, white),
        Check(
            "a large epsilon reaches 0",
            most.accuracy.low <= 0.01,
            f"the interval of robust accuracy at epsilon {large:g} reaches down to 1 %",
            {"bim20": most.accuracy.mean, "low": most.accuracy.low},
        ),
        _no_stronger("black box (Square) is no stronger than white box", black, white),
        Check(
            "noise is nearly harmless",
            by_noise <= max(by_pgd / 4, 0.01 * len(images)),
            "random signs lose at most a quarter of the images that pgd20 loses, or 1 % of all",
            {"clean": clean / len(images), "noise": noise.accuracy.mean, "pgd20": white.accuracy.mean},
        ),
    ]
    if surrogate is not None:
        moved = replace(
            transfer(surrogate, model, images, labels, pgd, epsilon, batch=batch, seed=seed), attack="transfer"
        )
        checks.append(_no_stronger("black box (transfer) is no stronger than white box", moved, white))
    return checks


def _no_stronger(name: str, weak: Outcome, strong: Outcome) -> Check:
    against, expected = discordant(strong, weak)  # images that only the weak, or only the strong attack wins
    p = tail(against, against + expected)
    rule = f"{weak.attack} does not win significantly more images than {strong.attack} (p >= {_LEVEL:g})"
    return Check(
        name, p >= _LEVEL, rule, {weak.attack: weak.accuracy.mean, strong.attack: strong.accuracy.mean, "p": p}
    )
