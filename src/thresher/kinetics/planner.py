"""Which model, how many samples, how long, which attention: what could be run, by what it costs and reaches."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from thresher.attention.base import AttentionMethod
from thresher.errors import UsageError
from thresher.evaluation.statistics import Interval
from thresher.kinetics.analysis import coverage_interval, majority_interval
from thresher.kinetics.law import Reading, RunCost, Terms, drafted, run_cost, step_cost
from thresher.kinetics.traces import Question, Trace
from thresher.machine.cost import Cost, ModelShape
from thresher.machine.devices import Device
from thresher.speculation.policy import expected_tokens
from thresher.speculation.theory import MOST_GAMMA, Hardware

How = Reading | AttentionMethod
PassSeconds = Callable[["Model", How, "Pass"], float]

_KNOTS = 17  # lengths of an answer at which the time of a pass is asked
TERMS = Terms(batch=1, prefill=True)


@dataclass(frozen=True)
class Model:
    """One that could be run: name, number format of its weights, shape in it."""

    name: str
    weights: str
    shape: ModelShape


@dataclass(frozen=True)
class Pass:
    """A token of each of `samples` answers to each of `questions` prompts, `produced` tokens behind the prompts."""

    questions: int
    samples: float
    prompt: float
    produced: float


@dataclass(frozen=True)
class Machine:
    """What runs it. devices share every model (tensor parallel). efficiency: share of their peaks that they reach.
    additive: arithmetic waits for memory, as the paper counts. measured: the time of a pass where layers were timed, in
    place of the rates. price: money an hour of all devices."""

    device: Device
    devices: int = 1
    efficiency: float = 1.0
    additive: bool = True
    price: float | None = None
    measured: PassSeconds | None = None

    @property
    def hardware(self) -> Hardware:
        factor = self.devices * self.efficiency
        return Hardware(self.device.flops * factor, self.device.bandwidth * factor)

    def pass_seconds(self, model: Model, how: How, one: Pass) -> float:
        if self.measured:
            return self.measured(model, how, one)
        hardware = self.hardware
        cost = step_cost(model.shape, how, one.prompt, one.produced, one.samples, one.questions)
        return cost.seconds(hardware.flops, hardware.bandwidth, self.additive)

    def more_tokens_seconds(self, model: Model, one: Pass, tokens: int) -> float:
        """What `tokens` further new tokens of every sequence add to a dense pass."""
        hardware = self.hardware
        cost = step_cost(model.shape, Reading(), one.prompt, one.produced, one.samples, one.questions)
        more = RunCost(
            Cost(cost.linear.flops * (tokens + 1), cost.linear.bytes),
            Cost(cost.attention.flops * (tokens + 1), cost.attention.bytes),
        )
        rates = (hardware.flops, hardware.bandwidth, self.additive and not self.measured)
        return more.seconds(*rates) - cost.seconds(*rates)

    def prefill_seconds(self, shape: ModelShape, prompt: float) -> float:
        by_query = 4.0 * shape.layers * shape.q_heads * shape.head_dim
        cost = Cost(2.0 * shape.active_count * prompt + by_query * prompt * prompt / 2, float(shape.stored_bytes))
        return self.hardware.seconds(cost)


@dataclass(frozen=True)
class Work:
    """What is asked. prompt: tokens; lengths: of answers, as many as one likes to state; batch: questions at once."""

    prompt: float
    lengths: Sequence[float]
    batch: int = 1


@dataclass(frozen=True)
class Plan:
    """One way to run it.

    cap: most tokens of an answer; eflops: Tera-eFLOPs of a question, reading the prompt and a share of the weights
    included; seconds: until all answers to the questions of a batch are there; ms_per_token: mean time of a pass;
    tokens_per_second: of the batch; memory: bytes of weights and caches; capacity: questions with all their samples
    that fit into the devices at once, 0 if their memory is not known; attention: its share of the eflops; joules,
    money: of a question; gamma, speedup: of drafts, 0 and 1 without; accuracy: where traces tell it.
    """

    model: str
    weights: str
    method: str
    samples: int
    cap: int
    eflops: float
    seconds: float
    ms_per_token: float
    tokens_per_second: float
    memory: float
    capacity: int
    attention: float
    joules: float | None
    money: float | None
    gamma: int = 0
    speedup: float = 1.0
    accuracy: Interval | None = None

    def __str__(self) -> str:
        drafts = f", drafts of {self.gamma}" if self.gamma else ""
        return f"{self.model} in {self.weights}, {self.method}{drafts}, {self.samples} x {self.cap:,} tokens"


@dataclass(frozen=True)
class Limits:
    """What a plan must keep: bytes, seconds of a question, Tera-eFLOPs of a question, and reach: accuracy."""

    memory: float = math.inf
    seconds: float = math.inf
    eflops: float = math.inf
    accuracy: float | None = None


def plan_of(
    model: Model, how: How, samples: int, cap: int, work: Work, machine: Machine, acceptance: float | None = None
) -> Plan:
    """What it takes. acceptance: of drafts that the model makes for itself by the method, which dense attention then
    verifies; None, no drafts."""
    lengths = [min(length, cap) for length in work.lengths]
    drafter = None
    if acceptance is not None:
        drafter, how = how, Reading()
    sequences = samples * work.batch
    longest, mean = max(lengths), float(np.mean(lengths))
    knots = np.linspace(0, longest, _KNOTS)
    # A pass has the samples that are not done: of each question as many as lengths say.
    running = [max(1 / work.batch, samples * float(np.mean([n > t for n in lengths]))) for t in knots]
    passes = [Pass(work.batch, n, work.prompt, float(t)) for n, t in zip(running, knots, strict=True)]
    times = [machine.pass_seconds(model, how, one) for one in passes]
    decoding = float(np.trapezoid(times, knots))
    terms = replace(TERMS, batch=sequences)
    cost = run_cost(model.shape, how, work.prompt, lengths, samples, terms)
    gamma, tokens, speedup = 0, 1.0, 1.0
    if drafter is not None and acceptance is not None:
        half = Pass(work.batch, samples, work.prompt, mean / 2)
        gamma, tokens, speedup = _best_drafts(model, drafter, machine, half, acceptance)
        sparse = run_cost(model.shape, drafter, work.prompt, lengths, samples, replace(terms, prefill=False))
        cost = drafted(cost, sparse, gamma, tokens)
    seconds = decoding / speedup + work.batch * machine.prefill_seconds(model.shape, work.prompt)
    cache = model.shape.kv_bytes(work.prompt) + samples * (
        model.shape.kv_bytes(work.prompt + longest) - model.shape.kv_bytes(work.prompt)
    )
    watts, intensity = machine.device.watts * machine.devices, machine.device.intensity
    return Plan(
        model=model.name,
        weights=model.weights,
        method=str(how if drafter is None else "dense"),
        samples=samples,
        cap=cap,
        eflops=cost.eflops(intensity) * 1e-12,
        seconds=seconds,
        ms_per_token=1e3 * decoding / speedup / max(longest, 1),
        tokens_per_second=sequences * mean / seconds,
        memory=model.shape.stored_bytes + work.batch * cache,
        capacity=_capacity(machine, model.shape, cache),
        attention=RunCost(Cost(0, 0), cost.attention).eflops(intensity) / cost.eflops(intensity),
        joules=None if math.isnan(watts) else watts * seconds / work.batch,
        money=None if machine.price is None else machine.price * seconds / 3600 / work.batch,
        gamma=gamma,
        speedup=speedup,
    )


def _capacity(machine: Machine, shape: ModelShape, cache: float) -> int:
    room = machine.device.memory * machine.devices - shape.stored_bytes
    return max(0, int(room // cache)) if math.isfinite(room) and cache else 0


def _best_drafts(
    model: Model, drafter: How, machine: Machine, one: Pass, acceptance: float
) -> tuple[int, float, float]:
    """Length of drafts that gains most, tokens of a step, speed-up: 0, 1 and 1 where none gains."""
    plain = machine.pass_seconds(model, Reading(), one)
    draft = machine.pass_seconds(model, drafter, one)
    found = [(0, 1.0, 1.0)]
    for gamma in range(1, MOST_GAMMA + 1):
        tokens = expected_tokens([acceptance] * gamma)
        verify = plain + machine.more_tokens_seconds(model, one, gamma)
        found.append((gamma, tokens, tokens * plain / (gamma * draft + verify)))
    return max(found, key=lambda f: f[2])


def with_accuracy(plan: Plan, traces: Iterable[Trace], judge: str) -> Plan:
    """The same with what traces of its model and method say of so many samples, cut at its cap; as it was if none has
    them. judge: "best", a right answer among the samples; "majority", the most frequent one."""
    for trace in traces:
        if (trace.model, trace.method) == (plan.model, plan.method) and plan.samples <= trace.samples:
            questions = [cut(question, plan.cap) for question in trace.questions]
            if judge == "best":
                return replace(plan, accuracy=coverage_interval(questions, plan.samples))
            return replace(plan, accuracy=majority_interval(questions, plan.samples))
    return plan


def cut(question: Question, cap: int) -> Question:
    """Answers that are longer end there, and are wrong."""
    samples = tuple(
        s if s.length <= cap else replace(s, length=cap, score=0.0, answer=None, ended=False) for s in question.samples
    )
    return replace(question, samples=samples)


@dataclass(frozen=True)
class Ranking:
    """Plans, the best first; why that one, in one sentence."""

    plans: list[Plan]
    why: str


def rank(plans: Sequence[Plan], limits: Limits) -> Ranking:
    """Those within the limits: with a target the cheapest that reaches it, without one the most accurate where traces
    tell, else the cheapest. Raises UsageError that names the nearest plan if none is within the limits."""
    if not plans:
        raise UsageError("there is nothing to choose from")
    fitting = [p for p in plans if not _beyond(p, limits)]
    if not fitting:
        nearest = min(plans, key=lambda p: (len(_beyond(p, limits)), _distance(p, limits)))
        raise UsageError(f"no plan meets this; nearest is {nearest}: {', '.join(_beyond(nearest, limits))}")
    known = [p for p in fitting if p.accuracy is not None]
    of = f"of {len(fitting)} plans within the limits" if len(fitting) < len(plans) else f"of {len(plans)} plans"
    if limits.accuracy is not None:
        ranked = sorted(known, key=lambda p: p.seconds)
        best = ranked[0]
        return Ranking(ranked, f"{of} that reach {limits.accuracy:.2f}, {best} takes the least time{_rival(ranked)}.")
    if known:
        ranked = sorted(known, key=lambda p: (-_mean(p), p.seconds)) + sorted(
            (p for p in fitting if p.accuracy is None), key=lambda p: p.seconds
        )
        best = ranked[0]
        return Ranking(ranked, f"{of}, {best} is right most often ({_mean(best):.3f}).")
    ranked = sorted(fitting, key=lambda p: p.seconds)
    return Ranking(
        ranked, f"{of}, {ranked[0]} takes the least time{_rival(ranked)}; no traces say how often it is right."
    )


def _rival(ranked: Sequence[Plan]) -> str:
    """What it costs, and what the next one does."""
    best = ranked[0]
    why = f": {100 * best.attention:.0f} % of what it costs is attention"
    if len(ranked) < 2:
        return why
    factor = ranked[1].seconds / max(best.seconds, 1e-12)
    return (
        f"{why}, where {ranked[1]} spends {100 * ranked[1].attention:.0f} % on it and takes {factor:.2f} times as long"
    )


def _mean(plan: Plan) -> float:
    return plan.accuracy.mean if plan.accuracy else -1.0


def _beyond(plan: Plan, limits: Limits) -> list[str]:
    """What a plan breaks."""
    found = []
    if plan.memory > limits.memory:
        found.append(f"{plan.memory / 1e9:.1f} GB for {limits.memory / 1e9:.1f}")
    if plan.seconds > limits.seconds:
        found.append(f"{plan.seconds:.3g} s for {limits.seconds:.3g}")
    if plan.eflops > limits.eflops:
        found.append(f"{plan.eflops:.4g} Tera-eFLOPs for {limits.eflops:.4g}")
    if limits.accuracy is not None and not _mean(plan) >= limits.accuracy:
        reached = f"right in {_mean(plan):.3f}" if plan.accuracy else "no traces say how often it is right"
        found.append(f"{reached} for {limits.accuracy:.3f}")
    return found


def _distance(plan: Plan, limits: Limits) -> float:
    """How far a plan is beyond the limits, in factors."""
    parts = [plan.memory / limits.memory, plan.seconds / limits.seconds, plan.eflops / limits.eflops]
    if limits.accuracy is not None:
        parts.append(limits.accuracy / max(_mean(plan), 1e-3))
    return sum(math.log(max(part, 1.0)) for part in parts)
