"""Which ranks: by hand, by one ratio, by VBMF, or where they hurt least under a budget of FLOPs, parameters or time."""

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from thresher.errors import UsageError
from thresher.vision.decompose import Ranks, factor, make_layers
from thresher.vision.factors import Bases, Factors, vbmf_rank
from thresher.vision.latency import RUNTIMES, onnx_layers, onnx_runner, time_in_turns, torch_runner
from thresher.vision.layers import Convolution, Survey, evaluating, unwrap_logits

PROBES = 7  # ranks of a layer at which its harm is measured
COSTS = ("flops", "parameters", "latency")
Pair = tuple[int, int]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Target:
    """What is to be left of a cost, as a share of the whole model's: flops, parameters, or latency at `batch` in a
    runtime. Raises UsageError."""

    share: float
    cost: str = "flops"
    batch: int = 1
    runtime: str = "torch"

    def __post_init__(self) -> None:
        if self.cost not in COSTS:
            raise UsageError(f"unknown cost {self.cost}: choose one of {', '.join(COSTS)}")
        if self.runtime not in RUNTIMES:
            raise UsageError(f"unknown runtime {self.runtime}: choose one of {', '.join(RUNTIMES)}")
        if not 0 < self.share < 1 or self.batch < 1:
            raise UsageError(f"a target of {self.share} is not between 0 and 1")


@dataclass(frozen=True)
class Option:
    """A layer at some ranks (None: as it is): what it costs and how much it disturbs the model's output."""

    ranks: Pair | None
    cost: float
    harm: float


@dataclass(frozen=True)
class Costs:
    """whole: of the model; of(convolution, ranks): of one layer, ranks None for as it is; in the unit of the target."""

    whole: float
    of: Callable[[Convolution, Pair | None], float]

    def fixed(self, surveyed: Survey) -> float:
        """What no rank changes."""
        return self.whole - sum(self.of(c, None) for c in surveyed.open)


def counted_costs(surveyed: Survey, cost: str) -> Costs:
    """FLOPs (as multiply-adds) or parameters."""
    if cost == "flops":
        return Costs(surveyed.macs, lambda c, r: c.macs_at(*r) if r else c.macs)
    return Costs(surveyed.parameters, lambda c, r: c.parameters_at(*r) if r else c.parameters)


def measured_costs(model: nn.Module, whole: float, batch: int, runtime: str = "torch", seconds: float = 0.1) -> Costs:
    """Seconds on this machine, each layer alone with input of its size; layers of one shape are measured once.

    whole: seconds of the whole model.
    """
    known: dict[tuple[object, ...], float] = {}

    def of(c: Convolution, ranks: Pair | None) -> float:
        conv = model.get_submodule(c.name)
        assert isinstance(conv, nn.Conv2d)
        key = (c.outputs, c.inputs, c.kernel, c.size, conv.stride, conv.padding, conv.dilation, ranks)
        if key not in known:
            layer: nn.Module = copy.deepcopy(conv)
            if ranks:
                outer, inner = ranks
                size = c.kernel if not c.pointwise else (1, 1)
                shape = Factors(
                    torch.randn(outer, inner, *size), torch.randn(c.outputs, outer), torch.randn(c.inputs, inner), 0
                )
                layer = make_layers(conv, shape)
            images = torch.rand(batch, c.inputs, *c.size)
            if runtime == "torch":
                run = torch_runner(layer, images)
            else:
                parts = [m for m in layer.modules() if isinstance(m, nn.Conv2d)]
                run = onnx_runner(onnx_layers(parts, images), images)
            (known[key],) = time_in_turns([run], seconds, least=7)
        return known[key]

    return Costs(whole, of)


def align(rank: float, channels: int, multiple: int) -> int:
    """The nearest multiple of `multiple`, at least one and within the channels; of fewer channels than that the rank
    itself."""
    if channels < multiple:
        return min(channels, max(1, round(rank)))
    return min(channels, max(multiple, round(rank / multiple) * multiple))


def candidates(c: Convolution, bases: Bases, multiple: int) -> list[Pair]:
    """Aligned ranks of a layer worth considering: cheaper in FLOPs than the layer as it is, and none both cheaper than
    another and nearer in weight; the cheapest first."""

    def steps(channels: int) -> list[int]:
        return sorted({align(r, channels, multiple) for r in range(1, channels + 1)})

    if c.pointwise:
        pairs = [(r, r) for r in steps(min(c.outputs, c.inputs))]
        lost = {p: bases.expected_error(p[0], c.inputs) for p in pairs}
    else:
        pairs = [(o, i) for o in steps(c.outputs) for i in steps(c.inputs)]
        outer = torch.cat([bases.outer_energy.flip(0).cumsum(0).flip(0), torch.zeros(1)]).tolist()
        inner = torch.cat([bases.inner_energy.flip(0).cumsum(0).flip(0), torch.zeros(1)]).tolist()
        lost = {(o, i): outer[o] + inner[i] for o, i in pairs}
    pairs = [p for p in pairs if c.macs_at(*p) < c.macs]
    front: list[Pair] = []
    for pair in sorted(pairs, key=lambda p: (c.macs_at(*p), lost[p])):
        if not front or lost[pair] < lost[front[-1]]:
            front.append(pair)
    return front


def thin(items: Sequence[Pair], most: int) -> list[Pair]:
    """At most so many, spread evenly, both ends kept."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


@torch.no_grad()
def measure_harm(
    model: nn.Module, c: Convolution, bases: Bases, pairs: Sequence[Pair], images: torch.Tensor, expected: torch.Tensor
) -> list[float]:
    """KL(model || model with this layer at these ranks), nats an image, over calibration images [N, C, H, W].

    expected: the model's log-probabilities. The weight is exchanged for what the factors stand for, and put back.
    """
    conv = model.get_submodule(c.name)
    assert isinstance(conv, nn.Conv2d)
    original = conv.weight.data
    harms = []
    try:
        for pair in pairs:
            weight = factor(c, bases, pair, rounds=0).weight()
            conv.weight.data = weight.to(original).contiguous(memory_format=torch.channels_last)
            given = log_probabilities(model, images)
            harms.append(float(F.kl_div(given, expected, reduction="batchmean", log_target=True)))
    finally:
        conv.weight.data = original
    return harms


@torch.no_grad()
def log_probabilities(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """[N, classes] in float64, in eval mode."""
    parts = torch.split(images, 64)
    with evaluating(model):
        pieces = [unwrap_logits(model(x.contiguous(memory_format=torch.channels_last))) for x in parts]
    return F.log_softmax(torch.cat(pieces).double(), 1)


def layer_options(
    model: nn.Module,
    surveyed: Survey,
    bases: Mapping[str, Bases],
    images: torch.Tensor | None,
    costs: Costs,
    multiple: int = 8,
    probes: int = PROBES,
    most: int = 48,
    progress: Progress = lambda done, total: None,
) -> dict[str, list[Option]]:
    """For every open layer the ranks to choose from, with costs and harm, and the layer as it is.

    Harm is measured on images [N, C, H, W] at `probes` of them and interpolated, in the square of the error that is
    expected of the weight, between them. Without images it is that square.
    """
    expected = None if images is None else log_probabilities(model, images)
    result = {}
    for done, c in enumerate(surveyed.open):
        progress(done, len(surveyed.open))
        b = bases[c.name]
        pairs = thin(candidates(c, b, multiple), most)
        probed = thin(pairs, probes)
        if images is None or expected is None:
            harms = [_expected(c, b, p) ** 2 for p in probed]
        else:
            harms = measure_harm(model, c, b, probed, images, expected)
        # Harm grows with the error of the weight, and is 0 where that is.
        known = [(0.0, 0.0)]
        for error, harm in sorted((_expected(c, b, p) ** 2, h) for p, h in zip(probed, harms, strict=True)):
            known.append((error, max(harm, known[-1][1] + 1e-9)))
        options = [Option(p, costs.of(c, p), _between(known, _expected(c, b, p) ** 2)) for p in pairs]
        result[c.name] = [*options, Option(None, costs.of(c, None), 0.0)]
    progress(len(surveyed.open), len(surveyed.open))
    return result


def _expected(c: Convolution, bases: Bases, pair: Pair) -> float:
    return bases.expected_error(pair[0], c.inputs if c.pointwise else pair[1])


def _between(known: list[tuple[float, float]], at: float) -> float:
    for (x0, y0), (x1, y1) in itertools.pairwise(known):
        if at <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    return known[-1][1]


def allocate(options: Mapping[str, Sequence[Option]], whole: float, share: float) -> dict[str, Pair]:
    """Ranks of least summed harm that leave at most this share of the model's cost `whole`; layers that stay as they
    are are left out.

    Steps down the convex hulls of the layers in order of harm per cost saved, which is optimal but for the last step;
    what that leaves over is then spent where it helps most. Raises UsageError with the least that can be reached.
    """
    fixed = whole - sum(o.cost for layer in options.values() for o in layer if o.ranks is None)
    allowed = share * whole
    least = fixed + sum(min(o.cost for o in layer) for layer in options.values())
    if least > allowed:
        raise _out_of_reach(least / whole, share)
    hulls = {name: _hull(layer) for name, layer in options.items()}
    at = dict.fromkeys(hulls, 0)
    total = fixed + sum(h[0].cost for h in hulls.values())
    while total > allowed:
        name = min(
            (n for n in hulls if at[n] + 1 < len(hulls[n])),
            key=lambda n: _slope(hulls[n][at[n]], hulls[n][at[n] + 1]),
        )
        total += hulls[name][at[name] + 1].cost - hulls[name][at[name]].cost
        at[name] += 1
    chosen = {name: hulls[name][i] for name, i in at.items()}
    while True:
        better = [
            (chosen[name].harm - o.harm, name, o)
            for name, layer in options.items()
            for o in layer
            if o.harm < chosen[name].harm and total - chosen[name].cost + o.cost <= allowed
        ]
        if not better:
            break
        _, name, option = max(better, key=lambda b: b[0])
        total += option.cost - chosen[name].cost
        chosen[name] = option
    return {name: o.ranks for name, o in chosen.items() if o.ranks is not None}


def _hull(layer: Sequence[Option]) -> list[Option]:
    """From the costliest (or the cheapest that is harmless) down: options on the lower convex hull of harm over
    cost."""
    hull: list[Option] = []
    for option in sorted(layer, key=lambda o: (o.harm, o.cost)):
        if hull and option.cost >= hull[-1].cost:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(a: Option, b: Option) -> float:
    return (b.harm - a.harm) / (a.cost - b.cost)


def _out_of_reach(least: float, share: float) -> UsageError:
    return UsageError(f"a target of {share:g} is out of reach: the least is {least:.3f} of the whole model's cost")


def equal_ranks(surveyed: Survey, costs: Costs, share: float, multiple: int = 8) -> dict[str, Pair]:
    """One ratio of ranks to channels for all layers, the largest that leaves at most this share of the whole cost.
    Raises UsageError with the least that can be reached."""
    allowed = share * costs.whole
    best: dict[str, Pair] | None = None
    least = math.inf
    for step in range(1, 101):
        chosen: dict[str, Pair] = {}
        for c in surveyed.open:
            ratio = step / 100
            if c.pointwise:
                rank = align(ratio * min(c.outputs, c.inputs), min(c.outputs, c.inputs), multiple)
                pair = (rank, rank)
            else:
                pair = align(ratio * c.outputs, c.outputs, multiple), align(ratio * c.inputs, c.inputs, multiple)
            if c.macs_at(*pair) < c.macs:
                chosen[c.name] = pair
        total = costs.fixed(surveyed) + sum(costs.of(c, chosen.get(c.name)) for c in surveyed.open)
        least = min(least, total)
        if total <= allowed and chosen != best:
            best = chosen
    if best is None:
        raise _out_of_reach(least / costs.whole, share)
    return best


def vbmf_ranks(model: nn.Module, surveyed: Survey, weakening: float = 1.0, multiple: int = 8) -> dict[str, Pair]:
    """Ranks of each unfolding by VBMF (Kim et al. 2016), R = full - weakening (full - R_vbmf) (MUSCO), aligned; layers
    that would not become cheaper stay."""
    if not 0 <= weakening <= 1:
        raise UsageError(f"a weakening of {weakening} is not between 0 and 1")
    chosen = {}
    for c in surveyed.open:
        weight = model.get_submodule(c.name).weight.detach()  # type: ignore[operator]
        outer = vbmf_rank(weight.flatten(1))
        inner = outer if c.pointwise else vbmf_rank(weight.transpose(0, 1).flatten(1))
        full = (min(c.outputs, c.inputs),) * 2 if c.pointwise else (c.outputs, c.inputs)
        pair = tuple(align(f - weakening * (f - r), f, multiple) for f, r in zip(full, (outer, inner), strict=True))
        if c.macs_at(*pair) < c.macs:
            chosen[c.name] = (pair[0], pair[1])
    return chosen


def target_cost(ranks: Ranks, surveyed: Survey, costs: Costs) -> float:
    """The cost of the model at these ranks as a share of the whole."""
    return (costs.fixed(surveyed) + sum(costs.of(c, ranks.get(c.name)) for c in surveyed.open)) / costs.whole
