"""Predicted times of passes on this machine, and what a run of the model says of them."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from thresher.attention.base import AttentionMethod
from thresher.attention.dense import Dense
from thresher.evaluation.bench import bench_decode
from thresher.evaluation.calibrate import Calibration
from thresher.kinetics.law import step_cost
from thresher.kinetics.planner import How, Machine, Model, Pass, PassSeconds
from thresher.machine.cost import bounded_cost

_STEPS = 25  # tokens that are decoded, five a turn
_READ = 6000  # tokens that are read; longer contexts are filled with rows drawn like those


def measured_seconds(found: Mapping[Model, Calibration]) -> PassSeconds:
    """The time of a pass by what was timed."""

    def seconds(model: Model, how: How, one: Pass) -> float:
        known, shape, context = found[model], model.shape, one.prompt + one.produced
        sequences = one.questions * one.samples
        step = step_cost(shape, how, one.prompt, one.produced, one.samples, one.questions).attention
        bounded = bounded_cost(shape, context).bytes
        name = str(how) if isinstance(how, AttentionMethod) else "dense"
        taken = known.pass_seconds(sequences)
        if shape.layers:
            taken += known.attention_seconds(name, context, step.bytes / sequences - bounded, sequences)
        return taken + (known.attention_seconds("dense", 0, bounded, sequences) if bounded else 0.0)

    return seconds


@dataclass(frozen=True)
class Check:
    """One pass, predicted and measured."""

    model: str
    weights: str
    method: str
    context: int
    batch: int
    predicted_ms: float
    measured_ms: float

    @property
    def error(self) -> float:
        """How much longer it was predicted, as a share."""
        return self.predicted_ms / self.measured_ms - 1


def check_passes(
    model: Model,
    readings: Sequence[How],
    contexts: Sequence[int],
    batches: Sequence[int],
    machine: Machine,
    progress: Callable[[str], None],
) -> Iterator[Check]:
    """Decode with the model itself, sequences that share nothing. Raises what loading a model does."""
    from thresher.engine.llm import LLM
    from thresher.evaluation.texts import paradise_lost

    methods = [how if isinstance(how, AttentionMethod) else Dense() for how in readings]
    llm = LLM(model.name, weights=model.weights, progress=progress)
    text = paradise_lost() if any(not m.exact for m in methods) else None
    timings = bench_decode(llm, contexts, batches, methods, {}, _STEPS // 5, progress, text, _READ)
    by_name = {f"thresher {model.weights} {m}": (m, how) for m, how in zip(methods, readings, strict=True)}
    for timing, _ in timings:
        method, how = by_name[timing.engine]
        predicted = machine.pass_seconds(model, how, Pass(timing.batch, 1, timing.context, _STEPS / 2))
        yield Check(
            model.name, model.weights, str(method), timing.context, timing.batch, 1e3 * predicted, timing.median_ms
        )


def median_error(checks: Sequence[Check]) -> float:
    """As a share of what was measured, in either direction."""
    return statistics.median(abs(c.error) for c in checks)
