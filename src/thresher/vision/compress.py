"""From a classifier to a smaller one: survey, ranks, decomposition; then fine-tuning and folding."""

import copy
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from thresher.errors import UsageError
from thresher.vision.data import Images
from thresher.vision.decompose import LayerReport, Ranks, all_bases, channel_moments, decompose
from thresher.vision.factors import Bases
from thresher.vision.latency import onnx_runner, time_in_turns, torch_runner
from thresher.vision.layers import Survey, contiguous, count_macs, count_parameters, fold_batch_norms, survey
from thresher.vision.models import Classifier, export_onnx
from thresher.vision.ranks import (
    PROBES,
    Costs,
    Pair,
    Target,
    allocate,
    counted_costs,
    equal_ranks,
    layer_options,
    measured_costs,
    target_cost,
    vbmf_ranks,
)

METHODS = ("sensitivity", "equal", "vbmf")
CALIBRATION = 16, 256, 1e12  # images: at least, at most, and multiply-adds of trying ranks, a minute or two
MOST_TRIES, NEAR = 4, 0.01  # of a target of latency, and how near is near enough

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Settings:
    """How to decompose. target: what is to be left, for `sensitivity` and `equal`; weakening: of VBMF; by_hand: ranks
    of layers instead of a method; multiple: that ranks are rounded to; rounds: of HOOI; weighted: the error of outputs
    on calibration images is minimised, not that of weights; first, leave: layers. Raises UsageError."""

    target: Target | None = field(default_factory=lambda: Target(0.5))
    method: str = "sensitivity"
    weakening: float = 1.0
    by_hand: Mapping[str, Pair] = field(default_factory=dict)
    multiple: int = 8
    rounds: int = 10
    weighted: bool = False
    first: bool = False
    leave: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"unknown way to choose ranks {self.method}: choose one of {', '.join(METHODS)}")
        if self.multiple < 1 or self.rounds < 0:
            raise UsageError("ranks are multiples of at least 1, and rounds are not negative")
        if self.target is None and self.method != "vbmf" and not self.by_hand:
            raise UsageError("a target is needed, but for vbmf and ranks by hand")


@dataclass(frozen=True)
class Compressed:
    """What came of it. shares: of the whole model's flops and parameters that are left; reached: of the target's cost,
    latency as measured."""

    classifier: Classifier
    layers: list[LayerReport]
    shares: dict[str, float]
    reached: float | None


def compress(
    classifier: Classifier,
    settings: Settings,
    calibration: Images | None = None,
    progress: Progress = lambda done, total: None,
) -> Compressed:
    """Decompose without training. Without calibration images harm is judged by weights alone. Raises UsageError."""
    module, example = classifier.module, classifier.example
    if classifier.about.folded:
        raise UsageError("its batch norms are folded: decompose the model from before, which can be fine-tuned")
    surveyed = survey(module, example, settings.first, settings.leave)
    if not surveyed.open:
        reasons = ", ".join(sorted({c.left for c in surveyed.convolutions}))
        raise UsageError(f"no convolution of the model can be decomposed: {reasons}")
    images = None if calibration is None else _spread(calibration, _affordable(surveyed))
    moments = None
    if settings.weighted:
        if calibration is None:
            raise UsageError("to weight errors by inputs, images are needed")
        moments = channel_moments(module, surveyed, _spread(calibration, CALIBRATION[1]))
    bases = all_bases(module, surveyed, moments)
    reached = None
    if settings.by_hand:
        ranks = {n: (r[0], r[0] if _pointwise(surveyed, n) else r[1]) for n, r in settings.by_hand.items()}
    elif settings.method == "vbmf":
        ranks = vbmf_ranks(module, surveyed, settings.weakening, settings.multiple)
    else:
        ranks, reached = _meet(classifier, settings, surveyed, bases, images, progress)
    result, layers = decompose(module, surveyed, bases, ranks, settings.rounds)
    shares = {
        "flops": count_macs(result, example) / surveyed.macs,
        "parameters": count_parameters(result) / surveyed.parameters,
    }
    return Compressed(Classifier(result, replace(classifier.about, ranks=ranks)), layers, shares, reached)


def _meet(
    classifier: Classifier,
    settings: Settings,
    surveyed: Survey,
    bases: Mapping[str, Bases],
    images: torch.Tensor | None,
    progress: Progress,
) -> tuple[dict[str, Pair], float]:
    """Ranks that meet the target, and what they reach: of latency the nearest of a few tries, as layers alone are not
    quite as fast as among others."""
    target = settings.target
    assert target is not None
    costs = find_costs(classifier, surveyed, target)
    options = None
    if settings.method == "sensitivity":
        options = layer_options(classifier.module, surveyed, bases, images, costs, settings.multiple, progress=progress)

    def choose(share: float) -> dict[str, Pair]:
        if options is None:
            return equal_ranks(surveyed, costs, share, settings.multiple)
        return allocate(options, costs.whole, share)

    if target.cost != "latency":
        ranks = choose(target.share)
        return ranks, target_cost(ranks, surveyed, costs)
    tried: list[tuple[float, float, dict[str, Pair]]] = []
    share = target.share
    while len(tried) < MOST_TRIES:
        ranks = choose(share)
        reached = measured_share(classifier, surveyed, bases, ranks, target)
        tried.append((abs(reached - target.share), reached, ranks))
        if tried[-1][0] <= NEAR:
            break
        share *= target.share / reached
    _, reached, ranks = min(tried, key=lambda t: t[0])
    return ranks, reached


def measured_share(
    classifier: Classifier, surveyed: Survey, bases: Mapping[str, Bases], ranks: Ranks, target: Target
) -> float:
    """Time at these ranks as a share of the whole model's, both folded, in turns."""
    result, _ = decompose(classifier.module, surveyed, bases, ranks, rounds=0)
    times = latencies(classifier, Classifier(result, classifier.about), (target.batch,), target.runtime)[target.batch]
    return times["after"] / times["before"]


def _pointwise(surveyed: Survey, name: str) -> bool:
    return any(c.name == name and c.pointwise for c in surveyed.convolutions)


def find_costs(classifier: Classifier, surveyed: Survey, target: Target) -> Costs:
    """What the target counts: FLOPs, parameters, or measured seconds of the folded model."""
    if target.cost == "latency":
        folded = fold(classifier)
        (whole,) = time_in_turns([runner(folded, target.batch, target.runtime)], 2.0)
        return measured_costs(folded.module, whole, target.batch, target.runtime)
    return counted_costs(surveyed, target.cost)


def fold(classifier: Classifier) -> Classifier:
    """A copy in eval mode with its batch norms folded into convolutions."""
    module = contiguous(copy.deepcopy(classifier.module))
    pairs = fold_batch_norms(module, classifier.example)
    return Classifier(module, replace(classifier.about, folded=(*classifier.about.folded, *pairs)))


def runner(classifier: Classifier, batch: int, runtime: str = "torch") -> Callable[[], object]:
    """Runs a model on so many images, all alike."""
    images = classifier.example.repeat(batch, 1, 1, 1)
    if runtime == "torch":
        return torch_runner(classifier.module, images)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(classifier, path)
        return onnx_runner(path.read_bytes(), images)


def latencies(
    before: Classifier,
    after: Classifier,
    batches: tuple[int, ...] = (1, 32),
    runtime: str = "torch",
    seconds: float = 4.0,
) -> dict[int, dict[str, float]]:
    """Median seconds of a pass, of both folded, in turns: {batch: {before, after}}."""
    models = [fold(before), fold(after)]
    result = {}
    for batch in batches:
        times = time_in_turns([runner(m, batch, runtime) for m in models], seconds)
        result[batch] = {"before": times[0], "after": times[1]}
    return result


def _affordable(surveyed: Survey) -> int:
    """How many calibration images are worth their time: each layer is tried at up to PROBES ranks."""
    least, most, macs = CALIBRATION
    return int(min(most, max(least, macs / (PROBES * len(surveyed.open) * surveyed.macs))))


def _spread(images: Images, count: int) -> torch.Tensor:
    """So many images [N, C, H, W] in [0, 1], evenly from all."""
    chosen = torch.linspace(0, len(images) - 1, min(count, len(images))).long()
    return images.pixels[chosen].float() / 255
