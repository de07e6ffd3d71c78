"""What the three moons showed, as one picture."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from thresher.evaluation.plots import load_pyplot, save_figure
from thresher.mosaics.moons import MAPS, Errors, Experiment, Moons, Mosaic, Net, attention, orbits, split

SYMBOLS = {"key": "$|W_\\varphi|$", "value": "$|W_\\psi|$", "output": "$|W_z|$"}
HEADS = {1: "one head", 3: "three heads"}
SPLITS: dict[str, Callable[[Net], Errors]] = {"train": lambda n: n.train, "held-out": lambda n: n.held_out}


def plot_moons(experiment: Experiment, path: Path) -> None:
    """Errors against context, |W| and attention. Raises UsageError if matplotlib is not installed, StorageError."""
    pyplot = load_pyplot()
    figure = pyplot.figure(figsize=(14, 16))
    grid = figure.add_gridspec(4, 12, height_ratios=(4, 4, 2, 3), hspace=0.35, wspace=1.6)
    kinds = {"train": experiment.train, "held-out": experiment.held_out}
    for column, (name, errors_of) in enumerate(SPLITS.items()):
        moons = kinds[name]
        half = slice(6 * column, 6 * column + 6)
        top, below = figure.add_subplot(grid[0, half]), figure.add_subplot(grid[1, half])
        length = len(experiment.nets[0].train.prediction)
        _curves(top, experiment.nets, range(1, length + 1), lambda n, of=errors_of: of(n).prediction)  # type: ignore[misc]
        _curves(below, experiment.nets, experiment.contexts, lambda n, of=errors_of: of(n).generation)  # type: ignore[misc]
        top.set_title(f"{name} periods: {', '.join(f'{p:.0f}' for p in moons.periods)} steps")
        if column == 0:
            top.set_ylabel("error of the next step")
            below.set_ylabel(f"error of {experiment.generated} generated steps")
        for axis in (top, below):
            _mark(axis, moons)
            axis.set(xlabel="steps seen", ylim=(0, None))
            axis.grid(alpha=0.3)
    shown = [_best(experiment.nets, heads) for heads in HEADS if any(n.heads == heads for n in experiment.nets)]
    panels = [(net, name) for net in shown for name in MAPS]
    for i, (net, name) in enumerate(panels):
        axis = figure.add_subplot(grid[2, 2 * i : 2 * i + 2])
        image = axis.imshow(net.maps[name], cmap="viridis", vmin=0)
        figure.colorbar(image, ax=axis, shrink=0.6)
        axis.set(xticks=range(3), yticks=range(3))
        axis.set_title(f"{SYMBOLS[name]}, {HEADS[net.heads]}", fontsize=10)
    i = 0
    for net in shown:
        for head, weights in enumerate(attention_of(experiment, net)):
            axis = figure.add_subplot(grid[3, 3 * i : 3 * i + 3])
            axis.imshow(weights.sqrt().numpy(), cmap="magma")  # roots, as late weights are shared by several turns
            for period in (*experiment.held_out.periods, experiment.held_out.common):
                axis.axhline(period, color="white", lw=0.6, ls="--")
            of = f", head {head + 1}" if net.heads > 1 else ""
            axis.set(xlabel="pair", ylabel="steps seen" if i == 0 else None)
            axis.set_title(f"attention, {HEADS[net.heads]}{of}", fontsize=10)
            i += 1
    save_figure(pyplot, figure, path)


def attention_of(experiment: Experiment, net: Net) -> torch.Tensor:
    """Weights [heads, T, T] in one held-out sequence, a little longer than the common period."""
    steps = int(1.5 * experiment.held_out.common)
    x = orbits(torch.tensor([split()[1]]), torch.zeros(1), steps, experiment.settings.pace)[0]
    return attention(Mosaic(net.heads, torch.tensor(net.weights)), x)


def _curves(axis: Any, nets: Sequence[Net], contexts: Sequence[int], values: Callable[[Net], list[float]]) -> None:
    """A line for each net, in one colour for the number of heads."""
    named = set()
    for net in nets:
        label = None if net.heads in named else HEADS[net.heads]
        named.add(net.heads)
        axis.plot(contexts, values(net), color="C0" if net.heads == 3 else "C1", lw=1, alpha=0.8, label=label)
    axis.legend(loc="upper right")


def _mark(axis: Any, moons: Moons) -> None:
    for period in moons.periods:
        axis.axvline(period, color="grey", ls="--", lw=0.8)
    axis.axvline(moons.common, color="red", lw=0.8)
    axis.annotate("common period", (moons.common, 0.5), xycoords=("data", "axes fraction"), rotation=90, color="red")


def _best(nets: Sequence[Net], heads: int) -> Net:
    """By the loss in training."""
    return min((n for n in nets if n.heads == heads), key=lambda n: n.loss)
