"""How a classifier stands up to adversarial images: attacks of torchattacks, and robust accuracy.

A model maps images [N, C, H, W], float32 in [0, 1], to logits [N, classes] or to an output of transformers that has
`.logits`; what normalises is inside it. It is attacked in eval mode and left as it was: modes, requires_grad and
gradients; so is torch's random state.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from thresher.errors import ThresherError, UsageError
from thresher.evaluation.statistics import Interval, bootstrap_difference, wilson
from thresher.vision.layers import evaluating

Progress = Callable[[int, int], None]  # images done, of how many

_SLACK = 1e-6  # of a perturbation's size: rounding


@dataclass(frozen=True)
class Attack:
    """One attack. steps: iterations (of Square: queries); restarts: random starts, an image is lost if one succeeds;
    constant: weight of the logits in CW's loss; parts: attacks whose union this is; minimal: it looks for the nearest
    adversarial image (L2) instead of one within an epsilon (Linf)."""

    name: str
    kind: str
    steps: int = 1
    restarts: int = 1
    constant: float = 0.0
    parts: tuple["Attack", ...] = ()
    minimal: bool = False


# AutoAttack is put together here, as `torchattacks.AutoAttack` makes 10 iterations where the standard set has 100.
_AUTO = (
    Attack("apgd-ce", "apgd-ce", 100),
    Attack("apgd-t", "apgd-t", 100),
    Attack("fab-t", "fab-t", 100),
    Attack("square", "square", 5000),
)
# The library has no search for CW's constant: the nearest image of three is taken.
_CW = tuple(Attack("cw", "cw", 200, constant=constant) for constant in (0.1, 1.0, 10.0))
_ALL = (
    Attack("noise", "noise"),  # random signs times epsilon, what attacks are compared with
    Attack("fgsm", "fgsm"),
    Attack("pgd20", "pgd", 20, 5),
    Attack("pgd100", "pgd", 100, 5),
    Attack("mifgsm", "mifgsm", 10),
    Attack("autoattack", "autoattack", parts=_AUTO),
    *_AUTO,
    Attack("deepfool", "deepfool", 20, minimal=True),
    Attack("cw", "cw", parts=_CW, minimal=True),
)
ATTACKS = {attack.name: attack for attack in _ALL}


@dataclass(frozen=True)
class Outcome:
    """One attack at one epsilon. accuracy: the share of all images that is still classified correctly, with its Wilson
    interval; survived: which; data: a fingerprint of images and labels, so that only like is compared with like."""

    attack: str
    epsilon: float
    accuracy: Interval
    survived: tuple[bool, ...]
    data: str


@dataclass(frozen=True)
class Distance:
    """An attack that looks for the nearest adversarial image. distances: L2, 0 where the image itself is misclassified,
    inf where nothing was found; median: over the `attacked` ones, those classified correctly (nan if there are none);
    failed: how many of these are inf."""

    attack: str
    median: float
    attacked: int
    failed: int
    distances: tuple[float, ...]


@dataclass(frozen=True)
class Robustness:
    """What `evaluate` measures: clean, for each attack at each epsilon, and for each attack that takes none."""

    clean: Outcome
    outcomes: tuple[Outcome, ...]
    distances: tuple[Distance, ...]


@dataclass(frozen=True)
class Comparison:
    """Two outcomes on the same images. difference: robust accuracy of a minus that of b, bootstrap interval; only_a,
    only_b: images that only one of them keeps; p: exact two-sided McNemar test of these two numbers."""

    difference: Interval
    only_a: int
    only_b: int
    p: float


def parse_attacks(text: str) -> list[Attack]:
    """Attacks by name, as in "fgsm,pgd20,autoattack"; each once. Raises UsageError for a name that is not known."""
    names = dict.fromkeys(name.strip().lower() for name in text.split(","))
    for name in names:
        if name not in ATTACKS:
            raise UsageError(f"unknown attack {name!r}; known: {', '.join(ATTACKS)}")
    return [ATTACKS[name] for name in names]


def evaluate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    attacks: str | Sequence[Attack],
    epsilons: Sequence[float],
    *,
    batch: int = 128,
    seed: int = 0,
    progress: Progress | None = None,
) -> Robustness:
    """Robust accuracy under every attack at every epsilon (Linf), and the distances of attacks that minimise them (L2).

    images: [N, C, H, W] float32 in [0, 1]; labels: [N] int64. Images that are misclassified as they are count as lost
    and are not attacked. The same seed and batch give the same result. Raises UsageError for images, labels, epsilons
    and models that make no sense, ThresherError if an attack leaves its epsilon or [0, 1].
    """
    chosen = parse_attacks(attacks) if isinstance(attacks, str) else list(attacks)
    bounded = [(attack, epsilon) for attack in chosen if not attack.minimal for epsilon in epsilons]
    minimal = [attack for attack in chosen if attack.minimal]
    if not bounded and not minimal:
        raise UsageError("nothing to do: give an attack, and an epsilon to those that need one")
    for _, epsilon in bounded:
        check_epsilon(epsilon)
    with attackable(model, images, labels, batch) as target:
        bars = progress_bars(progress, len(bounded) + len(minimal), len(images))
        outcomes = tuple(target.outcome(attack, epsilon, seed, next(bars)) for attack, epsilon in bounded)
        distances = tuple(target.distance(attack, seed, next(bars)) for attack in minimal)
        return Robustness(target.judge("clean", 0.0, target.correct), outcomes, distances)


def transfer(
    source: nn.Module,
    target: nn.Module,
    images: Tensor,
    labels: Tensor,
    attack: Attack,
    epsilon: float,
    *,
    batch: int = 128,
    seed: int = 0,
) -> Outcome:
    """How `target` classifies images that were made to fool `source`; arguments and errors as those of `evaluate`.

    Made of all images that the target classifies correctly. Where the source is not fooled, the last try is taken: for
    AutoAttack that is the image itself or Square's.
    """
    check_epsilon(epsilon)
    if attack.minimal:
        raise UsageError(f"{attack.name} takes no epsilon; transfer is measured with an attack that does")
    with attackable(target, images, labels, batch) as judge:
        made = images.clone()
        if epsilon and judge.correct.any():
            with attackable(source, images, labels, batch) as victim:
                made[judge.correct] = victim.strike(attack, epsilon, judge.correct, seed, lambda share: None)[0]
        return judge.judge(attack.name, epsilon, _right(judge.model, made, labels, batch))


def compare(a: Outcome, b: Outcome, resamples: int = 10_000) -> Comparison:
    """The difference of two models (or attacks), image by image. Raises UsageError if images or labels differ."""
    if a.data != b.data:
        raise UsageError("outcomes on different images or labels cannot be compared as pairs")
    difference = bootstrap_difference(a.survived, b.survived, resamples=resamples)
    only_a, only_b = discordant(a, b)
    return Comparison(difference, only_a, only_b, mcnemar(only_a, only_b))


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p-value of numbers so far apart, if both are as likely; 1 if there is no discordant pair."""
    return min(1.0, 2 * tail(max(only_a, only_b), only_a + only_b))


def discordant(a: Outcome, b: Outcome) -> tuple[int, int]:
    """How many images only a, and how many only b still classifies correctly."""
    pairs = list(zip(a.survived, b.survived, strict=True))
    return pairs.count((True, False)), pairs.count((False, True))


def tail(heads: int, tosses: int) -> float:
    """The chance of at least so many heads of a fair coin, exact in integers."""
    ways, term = 0, 1
    for tails in range(tosses - heads + 1):
        ways += term
        term = term * (tosses - tails) // (tails + 1)
    return ways / (1 << tosses)


@dataclass(frozen=True)
class _Target:
    """A model ready to be attacked, and what it is attacked on. correct: [N] bool, what it classifies correctly."""

    model: "_Logits"
    images: Tensor
    labels: Tensor
    correct: Tensor
    classes: int
    batch: int
    data: str

    def judge(self, attack: str, epsilon: float, survived: Tensor) -> Outcome:
        kept = tuple(survived.tolist())
        return Outcome(attack, epsilon, wilson(sum(kept), len(kept)), kept, self.data)

    def outcome(self, attack: Attack, epsilon: float, seed: int, report: Callable[[float], None]) -> Outcome:
        survived = self.correct.clone()
        if epsilon and survived.any():
            survived[self.correct] = self.strike(attack, epsilon, self.correct, seed, report)[1]
        report(1)
        return self.judge(attack.name, epsilon, survived)

    def strike(
        self, attack: Attack, epsilon: float, chosen: Tensor, seed: int, report: Callable[[float], None]
    ) -> tuple[Tensor, Tensor]:
        """Adversarial images of the chosen ones, and which of them the model still classifies correctly. What resists
        one stage is attacked by the next."""
        images, labels = self.images[chosen], self.labels[chosen]
        found, resists = images.clone(), torch.ones_like(labels, dtype=torch.bool)
        for part, made, right in self._tries(attack, images, labels, epsilon, seed, report, resists):
            found[part], resists[part] = made, right
        return found, resists

    def distance(self, attack: Attack, seed: int, report: Callable[[float], None]) -> Distance:
        images, labels = self.images[self.correct], self.labels[self.correct]
        nearest, everything = torch.full(labels.shape, math.inf), torch.ones_like(labels, dtype=torch.bool)
        for part, made, right in self._tries(attack, images, labels, math.inf, seed, report, everything):
            far = (made - images[part]).flatten(1).norm(dim=1).masked_fill(right, math.inf).cpu()
            nearest[part.cpu()] = torch.minimum(nearest[part.cpu()], far)
        report(1)
        distances = torch.zeros(len(self.images)).masked_scatter(self.correct.cpu(), nearest)
        middle = median(nearest.tolist()) if len(nearest) else math.nan
        return Distance(attack.name, middle, len(nearest), int(nearest.isinf().sum()), tuple(distances.tolist()))

    def _tries(
        self,
        attack: Attack,
        images: Tensor,
        labels: Tensor,
        epsilon: float,
        seed: int,
        report: Callable[[float], None],
        wanted: Tensor,
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Every stage on a batch after the other of the images that are `wanted` when it begins: their positions, what
        the stage makes of them, and whether that is still classified correctly."""
        stages = attack.parts or (attack,) * attack.restarts
        for i, stage in enumerate(stages):
            torch.manual_seed(1000 * seed + i)
            perturb = _prepare(stage, self.model, epsilon, self.classes, seed)
            parts = [part for part in torch.split(wanted.nonzero().flatten(), self.batch) if len(part)]
            for j, part in enumerate(parts):
                made = _checked(stage, images[part], perturb(images[part], labels[part]).detach(), epsilon)
                yield part, made, _right(self.model, made, labels[part], self.batch)
                report((i + (j + 1) / len(parts)) / len(stages))


def _checked(attack: Attack, images: Tensor, made: Tensor, epsilon: float) -> Tensor:
    """What an attack made, within its bounds. Where that is NaN (DeepFool divides by the gradient, which may be 0) the
    attack has failed and the image is left as it is: NaN would count as misclassified."""
    made = torch.where(made.flatten(1).isfinite().all(dim=1)[:, None, None, None], made, images)
    size = (made - images).abs().max().item()
    if size > epsilon + _SLACK or made.min() < 0 or made.max() > 1:
        raise ThresherError(f"{attack.name} left its bounds: {size:.3g} for epsilon {epsilon:g}, or outside [0, 1]")
    return made


def _prepare(
    attack: Attack, model: "_Logits", epsilon: float, classes: int, seed: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """The function of images and labels that makes adversarial images. Raises UsageError without torchattacks."""
    if attack.kind == "noise":
        return lambda x, _: (x + epsilon * (2 * torch.randint_like(x, 2) - 1)).clamp(0, 1)
    if attack.kind in ("apgd-t", "fab-t") and classes < 4:  # the loss of APGD-T takes the four largest logits
        raise UsageError(f"{attack.name}, a part of AutoAttack, needs at least 4 classes; the model has {classes}")
    library, steps = _torchattacks(), attack.steps
    bound: dict[str, Any] = {"eps": epsilon}
    seeded = {**bound, "seed": seed}
    iterated = {**bound, "alpha": 2.5 * epsilon / steps, "steps": steps}
    targeted = {**seeded, "steps": steps, "n_classes": min(classes, 10)}  # the standard set tries 9 targets
    known: dict[str, tuple[str, dict[str, Any]]] = {
        "fgsm": ("FGSM", bound),
        "pgd": ("PGD", {**iterated, "random_start": True}),
        "bim": ("PGD", {**iterated, "random_start": False}),
        "mifgsm": ("MIFGSM", {**bound, "alpha": epsilon / steps, "steps": steps, "decay": 1.0}),
        "apgd-ce": ("APGD", {**seeded, "steps": steps, "loss": "ce"}),
        "apgd-t": ("APGDT", targeted),
        "fab-t": ("FAB", {**targeted, "multi_targeted": True}),
        "square": ("Square", {**seeded, "n_queries": steps}),
        "deepfool": ("DeepFool", {"steps": steps}),
        "cw": ("CW", {"c": attack.constant, "steps": steps, "lr": 0.05}),
    }
    if attack.kind not in known:
        raise UsageError(f"unknown kind {attack.kind!r} of attack {attack.name!r}; known: noise, {', '.join(known)}")
    name, options = known[attack.kind]
    made = getattr(library, name)(model, **options)
    if (
        attack.kind == "cw"
    ):  # it optimises the inverse tanh of a pixel, infinite at 0 and 1: such pixels would never move
        return lambda x, y: made(x.clamp(1e-3, 1 - 1e-3), y)
    if attack.kind == "deepfool":
        return lambda x, y: _overshoot(model, x, made(x, y), y)
    return lambda x, y: made(x, y)


def _overshoot(model: "_Logits", images: Tensor, made: Tensor, labels: Tensor) -> Tensor:
    """Over the boundary by 2 % of the way, as in DeepFool's paper. The library lengthens each step instead, which ends
    just before the boundary where many pixels are clipped."""
    further = (images + 1.02 * (made - images)).clamp(0, 1)
    return torch.where(_right(model, made, labels, len(made))[:, None, None, None], further, made)


def _torchattacks() -> Any:
    try:
        import torchattacks
    except ImportError as error:
        raise UsageError(f"attacks need torchattacks ({error}); pip install 'thresher[vision]'") from error
    return torchattacks


class _Logits(nn.Module):
    """A model as torchattacks takes it: logits are a tensor of their own, as Square writes into them, and positive, as
    the loss of CW is wrong where they are not. No attack's loss depends on what is added to all logits."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.inner = model
        self.first = nn.Parameter(torch.zeros(0, device=device), requires_grad=False)  # asked for the device

    def raw(self, images: Tensor) -> Tensor:
        output = self.inner(images)
        logits: Tensor = getattr(output, "logits", output)
        return logits.float()

    def forward(self, images: Tensor) -> Tensor:
        logits = self.raw(images)
        if images.requires_grad and torch.is_grad_enabled() and not logits.requires_grad:
            raise UsageError("the model gives no gradients to its images: attack it with square, or by transfer")
        return logits - logits.detach().amin(dim=1, keepdim=True) + 1


@contextmanager
def attackable(model: nn.Module, images: Tensor, labels: Tensor, batch: int) -> Iterator[_Target]:
    """The model in eval mode with frozen parameters, as long as the context lasts; checks the data and the logits."""
    _check_data(images, labels, batch)
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        devices = [images.device] if images.is_cuda else []
        with evaluating(model), torch.random.fork_rng(devices), torch.enable_grad():
            # The wrapper too: the library puts all of it into training after an attack if it finds it there.
            wrapped = _Logits(model.requires_grad_(False), images.device).eval()
            with torch.no_grad():
                logits = torch.cat([wrapped.raw(part) for part in torch.split(images, batch)])
            if logits.dim() != 2 or len(logits) != len(images):
                raise UsageError(f"a model must give logits [{len(images)}, classes], not {list(logits.shape)}")
            if not logits.isfinite().all():
                raise UsageError("the model gives logits that are not finite")
            if labels.max() >= logits.shape[1]:
                raise UsageError(f"label {labels.max()}: the model has {logits.shape[1]} classes, counted from 0")
            data = hashlib.sha256(images.cpu().numpy().tobytes() + labels.cpu().numpy().tobytes()).hexdigest()
            yield _Target(wrapped, images, labels, logits.argmax(dim=1) == labels, logits.shape[1], batch, data)
    finally:
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)


@torch.no_grad()
def _right(model: _Logits, images: Tensor, labels: Tensor, batch: int) -> Tensor:
    """[N] bool: which images are classified as labelled. Logits that are NaN are wrong."""
    logits = torch.cat([model.raw(part) for part in torch.split(images, batch)])
    return (logits.argmax(dim=1) == labels) & ~logits.isnan().any(dim=1)


def _check_data(images: Tensor, labels: Tensor, batch: int) -> None:
    if images.dim() != 4 or images.dtype != torch.float32:
        raise UsageError(f"images must be float32 [N, C, H, W], not {images.dtype} {list(images.shape)}")
    if not len(images):
        raise UsageError("there are no images")
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        raise UsageError(f"labels must be int64 [{len(images)}], not {labels.dtype} {list(labels.shape)}")
    if not images.isfinite().all():
        raise UsageError("images hold NaN or infinity")
    if images.min() < 0 or images.max() > 1:
        raise UsageError(f"images must be in [0, 1], not [{images.min():g}, {images.max():g}]; normalise in the model")
    if labels.min() < 0:
        raise UsageError(f"label {labels.min()}: labels are counted from 0")
    if batch < 1:
        raise UsageError(f"batch={batch}: must be at least 1")


def check_epsilon(epsilon: float) -> None:
    if not 0 <= epsilon <= 1:
        raise UsageError(f"epsilon={epsilon:g}: must be between 0 and 1, the range of the images (8/255, not 8)")


def progress_bars(progress: Progress | None, runs: int, images: int) -> Iterator[Callable[[float], None]]:
    """For each run, what it calls with the share of it that is done."""

    def bar(run: int) -> Callable[[float], None]:
        return lambda share: progress(round((run + share) * images), runs * images) if progress else None

    return (bar(run) for run in range(runs))
