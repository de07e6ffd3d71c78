"""Traces as a page with sliders: frontier, accuracy by samples, cost split, iso-cost contours; also as PNG and CSV."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from thresher.errors import UsageError
from thresher.evaluation.plots import load_pyplot, save_figure
from thresher.kinetics.analysis import Accuracy
from thresher.kinetics.frontier import costs_between, oracle
from thresher.kinetics.grid import Grid
from thresher.kinetics.planner import cut
from thresher.kinetics.traces import Trace
from thresher.machine.shapes import DECODERS

MOST_CURVES = 12  # of more only the dense ones are drawn
FAMILY = ("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b", "qwen3-14b", "qwen3-32b")


@dataclass(frozen=True)
class Curve:
    """Accuracy by the number of samples, of one model and method."""

    label: str
    accuracies: list[Accuracy]


def caps_of(trace: Trace, count: int = 4) -> list[Trace]:
    """The trace, and what it would be with answers cut at the half, a quarter and so on of its cap."""
    found = []
    for i in range(count):
        cap = trace.cap >> i
        if cap:
            found.append(replace(trace, cap=cap, questions=tuple(cut(q, cap) for q in trace.questions)))
    return found


def page(grid: Grid, curves: Sequence[Curve], intensity: float, prompt: float, about: str) -> str:
    """One HTML page that needs no network. grid: its memory is in Tera-eFLOPs at `intensity`. Raises UsageError if
    plotly is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UsageError("reports are drawn with plotly; install it with: pip install 'thresher[scale]'") from None
    family = []
    for name in FAMILY:
        decoder = DECODERS[name]
        shape = decoder.shape()
        query = 4 * shape.layers * shape.q_heads * shape.head_dim
        family.append({"name": name, "parameters": decoder.parameters, "kv": shape.kv_bytes_per_token, "query": query})
    data: dict[str, Any] = {
        "about": about,
        "intensity": intensity,
        "prompt": prompt,
        "questions": len(grid.questions),
        "models": grid.models,
        "configs": [
            {"model": c.model, "method": c.method, "budget": c.budget, "samples": c.samples, "cap": c.cap}
            for c in grid.configs
        ],
        "accuracy": _rounded(grid.accuracy),
        "flops": _rounded(grid.compute),
        "bytes": _rounded(grid.memory / intensity),
        "length": _rounded(grid.length),
        "coverage": [_curve(c) for c in curves],
        "family": family,
    }
    text = json.dumps(data, allow_nan=False).replace("</", "<\\/")
    template = files("thresher.kinetics").joinpath("report.html").read_text(encoding="utf-8")
    return template.replace("/*PLOTLY*/", get_plotlyjs()).replace("/*DATA*/null", text)


def _rounded(values: Any) -> list[list[float]]:
    """To six digits: as much as a plot shows."""
    return [[float(f"{x:.6g}") for x in row] for row in values.tolist()]


def _curve(curve: Curve) -> dict[str, Any]:
    found = curve.accuracies
    majority = [a.majority.mean for a in found if a.majority]
    return {
        "label": curve.label,
        "k": [a.samples for a in found],
        "mean": [a.coverage.mean for a in found],
        "low": [a.coverage.low for a in found],
        "high": [a.coverage.high for a in found],
        "majority": majority if len(majority) == len(found) else None,
    }


def table(grid: Grid) -> str:
    """Every configuration with its means over questions, as CSV."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["model", "method", "budget", "samples", "cap", "accuracy", "compute", "memory", "total", "tokens"])
    for i, c in enumerate(grid.configs):
        means = (
            float(a[i].mean()) for a in (grid.accuracy, grid.compute, grid.memory, grid.cost("eflops"), grid.length)
        )
        writer.writerow([c.model, c.method, c.budget or "", c.samples, c.cap, *(f"{x:.6g}" for x in means)])
    return out.getvalue()


def picture(grid: Grid, curves: Sequence[Curve], path: Path) -> None:
    """Frontier and accuracy by samples side by side. Raises UsageError if matplotlib is not installed."""
    pyplot = load_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5))
    price = grid.cost("eflops")
    low, high = float(price.min()), float(price.max())
    costs = costs_between(low, high * 1.0001 if high > low else low * 10)
    for name, dense in (("dense", True), ("sparse", False)):
        part = grid.where(lambda c, dense=dense: (c.budget is None) == dense)  # type: ignore[misc]
        if part.configs:
            left.plot(costs, oracle(part, costs), label=f"{name}, best model", lw=2)
    for model in grid.models:
        left.plot(costs, oracle(grid.where(lambda c, m=model: c.model == m), costs), lw=0.9, label=model)  # type: ignore[misc]
    left.set_xscale("log")
    left.set_xlabel("Tera-eFLOPs of a question")
    left.set_ylabel("accuracy (oracle by question)")
    left.legend(fontsize=7)
    few = curves if len(curves) <= MOST_CURVES else [c for c in curves if c.label.endswith(" dense")]
    for curve in few:
        ks = np.array([a.samples for a in curve.accuracies])
        mean = [a.coverage.mean for a in curve.accuracies]
        (line,) = right.plot(ks, mean, marker="o", ms=3, label=curve.label)
        bounds = ([a.coverage.low for a in curve.accuracies], [a.coverage.high for a in curve.accuracies])
        right.fill_between(ks, *bounds, alpha=0.1, color=line.get_color())
    right.set_xscale("log", base=2)
    right.set_xlabel("samples")
    right.set_ylabel("a right one among them")
    right.legend(fontsize=7)
    save_figure(pyplot, figure, path)
