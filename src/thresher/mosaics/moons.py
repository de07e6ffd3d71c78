"""Three moons: a network of one context memory predicts three circling moons, with one head or with three.

The experiment of section 3 of "Memory Mosaics" (arXiv 2405.06394). A head of three moons has seen what it needs only
when all of them stand as they once did, after their common period; a head of one moon after the period of that moon.
Nobody tells the three heads to take a moon each: training does, as it asks for right predictions from short contexts.

A sequence is [T, 6]: (sin, cos) of each moon, seen from the centre. "Context t" is a prediction from the first t steps.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from thresher.errors import UsageError

Triple = tuple[float, float, float]

HALVES = range(1, 8)  # periods in halves of a unit of time, so that common periods are exact
KEPT = 9  # of all triples those of the shortest common periods
PHASE = 0.3
LATEST = 10_000  # sequences start at a random step before this one
SHARPNESS = 50.0  # scores are this times the product of key and key
CLIPPED = 0.5  # larger errors have no gradient
DOMINANT = 5.0  # an entry of a permutation is so many times the others of its row and column
CLOSE = 0.06  # an error below counts as known; a mixture of moons has about 0.1
FURTHEST = 1.75  # at twice the common period errors rise again for a few steps
MAPS = ("key", "value", "output")


def triples() -> list[Triple]:
    """All 35 choices of three periods, in units of time, by their common period."""
    halves = sorted(combinations(HALVES, 3), key=lambda p: math.lcm(*p))
    return [(a / 2, b / 2, c / 2) for a, b, c in halves]


def common_period(periods: Sequence[float]) -> float:
    """After which all moons stand as they did."""
    return math.lcm(*(round(2 * p) for p in periods)) / 2


@cache
def split() -> tuple[list[Triple], Triple]:
    """To train on, and held out: a triple that no training sequence has, of periods that others have."""
    *train, held_out = triples()[:KEPT]
    return train, held_out


def _longest() -> float:
    train, held_out = split()
    return max(map(common_period, [*train, held_out]))


@dataclass(frozen=True)
class Settings:
    """Of training. A step of time is so long that `turns` times the longest common period is one block.

    The first `short` of the steps see one common period only, in `turns` times as many sequences. There a head of mixed
    moons is of no use, which makes three heads part; then whole blocks, in which long contexts allow finer memories.
    Three heads of some initial weights stay mixed nevertheless, and their loss tells: of `starts` nets that went so far
    the one of the least loss goes on.
    """

    steps: int = 1500
    batch: int = 5
    block: int = 400
    turns: float = 3.0
    short: float = 2 / 3
    starts: int = 2
    rate: float = 1e-2  # falls in a line to
    last_rate: float = 5e-6

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.block, self.starts) < 1 or not 1 <= self.turns < math.inf:
            raise UsageError("three moons: steps, batch, block, turns and starts are at least 1")
        if not 0 <= self.short <= 1 or (self.starts > 1 and not self.first):
            raise UsageError("three moons: short is between 0 and 1, and more starts than one need it above 0")
        if self.pace < 4:
            least = math.ceil(4 * self.turns * _longest())
            raise UsageError(f"a block of {self.block} steps is too short: the fastest moon needs 2 a turn, so {least}")

    @property
    def pace(self) -> float:
        """Steps a unit of time."""
        return self.block / self.turns / _longest()

    @property
    def first(self) -> int:
        """Steps on one common period."""
        return math.ceil(self.short * self.steps)

    @property
    def all_steps(self) -> int:
        """With those of the starts that are given up."""
        return self.steps + (self.starts - 1) * self.first

    def shape(self, step: int) -> tuple[int, int]:
        """Sequences of this step of training, and their length."""
        if step < self.first:
            return round(self.batch * self.turns), round(self.block / self.turns)
        return self.batch, self.block


PUBLISHED = Settings(steps=500, batch=64, block=800, short=0, starts=1)


@dataclass(frozen=True)
class Mosaic:
    """weights: [3, 3, 3, 2], complex matrices of keys, values and outputs as (real, imaginary). A head has
    6 / heads of the six numbers."""

    heads: int
    weights: Tensor


@dataclass(frozen=True)
class Moons:
    """Periods of three moons, in steps."""

    periods: Triple
    common: float

    @property
    def longest(self) -> float:
        return max(self.periods)


@dataclass(frozen=True)
class Errors:
    """Mean absolute errors of a number between -1 and 1."""

    prediction: list[float]  # of the next step, by context from 1 on
    generation: list[float]  # of the next 25 steps, by `Experiment.contexts`
    before: float  # of predictions between 1.5 times the longest period and 0.9 of the common one
    after: float  # of predictions from 1.1 times the common period on
    settled: int | None  # the context from which on no error is above CLOSE


@dataclass(frozen=True)
class Net:
    heads: int
    seed: int
    loss: float  # of the last 50 steps of training
    dominance: float  # see `dominance`
    separated: bool  # whether each of three heads owns a moon
    train: Errors
    held_out: Errors
    maps: dict[str, list[list[float]]]  # |W| by MAPS, from column to row
    weights: list[list[list[list[float]]]]  # of Mosaic


@dataclass(frozen=True)
class Experiment:
    settings: Settings
    train: Moons  # one of those that were trained on
    held_out: Moons
    contexts: list[int]  # at which generation begins
    generated: int
    nets: list[Net]


def orbits(periods: Tensor, starts: Tensor, steps: int, pace: float) -> Tensor:
    """Sequences [B, steps, 6]. periods: [B, 3] in units of time; starts: [B] in steps; pace: steps a unit."""
    time = (starts[:, None].double() + torch.arange(steps)) / pace
    angle = 2 * math.pi * time[..., None] / periods[:, None, :].double() + PHASE
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(-2).float()


def draw(choices: Sequence[Triple], count: int, steps: int, pace: float, generator: torch.Generator) -> Tensor:
    """So many sequences of triples among these, each from a random time on."""
    chosen = torch.randint(len(choices), (count,), generator=generator)
    starts = torch.randint(LATEST, (count,), generator=generator)
    return orbits(torch.tensor(choices)[chosen], starts, steps, pace)


def initial(heads: int, generator: torch.Generator) -> Mosaic:
    """Each part of a complex number is the mean of two uniform ones, as in the authors' code, where a matrix of 6 x 6
    is drawn and then given its structure."""
    if heads not in (1, 3):
        raise UsageError(f"{heads} heads: three moons are seen by one head or by three")
    return Mosaic(heads, (torch.rand(2, 3, 3, 3, 2, generator=generator) * 2 - 1).mean(0) / math.sqrt(6))


def matrices(weights: Tensor) -> Tensor:
    """[3, 3, 3, 2] as real matrices [3, 6, 6]: a complex a + ib is the scaled rotation (a, -b; b, a)."""
    a, b = weights.unbind(-1)
    blocks = torch.stack((torch.stack((a, -b), -1), torch.stack((b, a), -1)), -2)  # [3, row, column, 2, 2]
    return blocks.transpose(2, 3).reshape(3, 6, 6)


def _heads(x: Tensor, matrix: Tensor, heads: int) -> Tensor:
    """[B, T, 6] to what heads see, [B, heads, T, 6 / heads]."""
    return (x @ matrix.T).view(*x.shape[:2], heads, -1).transpose(1, 2)


def predict(net: Mosaic, x: Tensor) -> Tensor:
    """The next step after each: [B, T, 6] to [B, T, 6]; 0 after the first, when the memory is empty.

    Pair i is (key of step i, value of step i + 1), and step t asks with its key the pairs before t. As streams, the
    queries from step 1 on and the pairs from 0 on are plain causal attention.
    """
    key, value, output = matrices(net.weights)
    keys, values = _heads(x, key, net.heads), _heads(x, value, net.heads)
    answers = scaled_dot_product_attention(
        keys[:, :, 1:], keys[:, :, :-1], values[:, :, 1:], is_causal=True, scale=SHARPNESS
    )
    return pad(answers.transpose(1, 2).flatten(2) @ output.T, (0, 0, 1, 0))


def attention(net: Mosaic, x: Tensor) -> Tensor:
    """Weights of pairs [heads, T, T] (row: the step that asks) in one sequence [T, 6]."""
    keys = _heads(x[None], matrices(net.weights)[0], net.heads)[0]
    later = torch.ones(len(x), len(x), dtype=torch.bool).triu()
    scores = (SHARPNESS * keys @ keys.mT).masked_fill(later, -math.inf)
    return scores.softmax(-1).nan_to_num(0.0)  # the first step has no pairs


def generate(net: Mosaic, x: Tensor, steps: int) -> Tensor:
    """Go on from [B, T, 6] by [B, steps, 6]. What is generated is remembered like what was seen."""
    key, value, output = matrices(net.weights)
    keys, values = _heads(x, key, net.heads), _heads(x, value, net.heads)[:, :, 1:]
    found = []
    for _ in range(steps):
        scores = SHARPNESS * keys[:, :, -1:] @ keys[:, :, :-1].mT  # of no pairs the answer is 0
        step = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2) @ output.T
        keys = torch.cat((keys, _heads(step, key, net.heads)), 2)
        values = torch.cat((values, _heads(step, value, net.heads)), 2)
        found.append(step)
    return torch.cat(found, 1)


def train(
    heads: int, seed: int, settings: Settings, progress: Callable[[int], None] = lambda done: None
) -> tuple[Mosaic, float]:
    """A trained net and its mean loss over the last 50 steps: the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    done = itertools.count(1)
    tried = []
    for _ in range(settings.starts):
        net = initial(heads, generator)
        net.weights.requires_grad_()
        optimizer = torch.optim.AdamW([net.weights], lr=settings.rate, betas=(0.9, 0.999), weight_decay=0)
        losses = []
        for step in range(settings.first):
            losses.append(_step(net, optimizer, step, settings, generator))
            progress(next(done))
        tried.append((_last(losses), net, optimizer))
    _, net, optimizer = min(tried, key=lambda t: t[0])
    losses = []
    for step in range(settings.first, settings.steps):
        losses.append(_step(net, optimizer, step, settings, generator))
        progress(next(done))
    return Mosaic(heads, net.weights.detach()), _last(losses) if losses else min(t[0] for t in tried)


def _step(
    net: Mosaic, optimizer: torch.optim.Optimizer, step: int, settings: Settings, generator: torch.Generator
) -> float:
    """The loss before it."""
    for group in optimizer.param_groups:
        group["lr"] = settings.rate + (settings.last_rate - settings.rate) * step / settings.steps
    count, length = settings.shape(step)
    x = draw(split()[0], count, length + 1, settings.pace, generator)
    errors = predict(net, x[:, :-1]) - x[:, 1:]
    loss = errors.clamp(-CLIPPED, CLIPPED).square().mean()
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.item()


def _last(losses: Sequence[float]) -> float:
    """The mean of the last 50."""
    return statistics.fmean(losses[-50:]) if losses else math.inf


def sizes(weights: Tensor) -> Tensor:
    """|W|: [3, 3, 3]. An output matrix says what moons are made of, so it is transposed: rows are heads in all."""
    found = weights.square().sum(-1).sqrt()
    return torch.stack((found[0], found[1], found[2].T))


def dominance(sizes: Tensor) -> float:
    """How much larger the largest entry of each row is than all else in its row and column, in the worst row [3, 3]. At
    most 1 if two rows have theirs in one column, so that it is no permutation."""
    found = math.inf
    for row, column in enumerate(sizes.argmax(1).tolist()):
        rest = sizes.clone()
        rest[row, column] = 0
        most = max(rest[row].max().item(), rest[:, column].max().item())
        found = min(found, sizes[row, column].item() / max(most, 1e-12))
    return found


def owners(net: Mosaic) -> tuple[float, bool]:
    """The least dominance of the three matrices, and whether each of three heads owns a moon: all three are clear
    permutations, and the same one, so that a head's key, value and output are of one moon."""
    found = sizes(net.weights)
    least = min(map(dominance, found))
    moons = found.argmax(2)
    return least, net.heads == 3 and least > DOMINANT and bool((moons == moons[0]).all())


def measure(net: Mosaic, x: Tensor, moons: Moons, contexts: Sequence[int], generated: int) -> Errors:
    """x: [B, T + generated, 6], sequences of these moons; contexts go up to T."""
    steps = x.shape[1] - generated
    with torch.no_grad():
        errors = (predict(net, x[:, :steps]) - x[:, 1 : steps + 1]).abs().mean((0, 2))
        far = [(generate(net, x[:, :c], generated) - x[:, c : c + generated]).abs().mean().item() for c in contexts]
    large = (errors > CLOSE).nonzero().flatten().tolist()
    settled = large[-1] + 2 if large else 1  # errors[i] is of context i + 1
    return Errors(
        prediction=_rounded(errors.tolist()),
        generation=_rounded(far),
        before=_mean(errors, 1.5 * moons.longest, 0.9 * moons.common),
        after=_mean(errors, 1.1 * moons.common, math.inf),
        settled=settled if settled <= steps else None,
    )


def _mean(errors: Tensor, low: float, high: float) -> float:
    contexts = torch.arange(1, len(errors) + 1)
    return round(errors[(contexts >= low) & (contexts < high)].mean().item(), 6)


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(v, 6) for v in values]


def in_steps(periods: Triple, pace: float) -> Moons:
    a, b, c = (p * pace for p in periods)
    return Moons((a, b, c), common_period(periods) * pace)


def run(
    settings: Settings,
    seeds: Sequence[int],
    heads: Sequence[int] = (1, 3),
    sequences: int = 32,
    generated: int = 25,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Experiment:
    """Nets of all heads and seeds, each measured on the same sequences of one training triple and the held-out one, up
    to contexts of FURTHEST times the longest common period. Raises UsageError."""
    choices, held_out = split()
    # Of those trained on, one of the longest common period: it lies furthest from the moons' own.
    shown = (max(choices, key=common_period), held_out)
    kinds = [in_steps(t, settings.pace) for t in shown]
    steps = math.ceil(FURTHEST * _longest() * settings.pace)
    generator = torch.Generator().manual_seed(2**31)  # no seed of training
    seen = [draw([t], sequences, steps + generated, settings.pace, generator) for t in shown]
    contexts = list(range(1, steps + 1, max(1, steps // 90)))
    total = len(seeds) * len(heads) * settings.all_steps
    nets: list[Net] = []
    for seed in seeds:
        for count in heads:
            before = len(nets) * settings.all_steps
            net, loss = train(count, seed, settings, lambda done, before=before: progress(before + done, total))  # type: ignore[misc]
            least, separated = owners(net)
            of = [measure(net, x, k, contexts, generated) for x, k in zip(seen, kinds, strict=True)]
            maps = dict(zip(MAPS, net.weights.square().sum(-1).sqrt().tolist(), strict=True))
            nets.append(Net(count, seed, loss, least, separated, of[0], of[1], maps, net.weights.tolist()))
    return Experiment(settings, kinds[0], kinds[1], contexts, generated, nets)
