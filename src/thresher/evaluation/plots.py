"""Static plots: quality against bytes read, time against context."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thresher.errors import StorageError, UsageError
from thresher.files import replaced

if TYPE_CHECKING:
    from thresher.evaluation.bench import Timing
    from thresher.evaluation.fidelity import Fidelity

# Told apart without colour, too.
_MARKERS = "osD^vP*X<>hp"


def plot_fidelity(rows: "Sequence[Fidelity]", path: Path) -> None:
    """KL to dense against the share of the KV cache's bytes that a step reads, one line a method's name, a panel a
    text."""
    pyplot = load_pyplot()
    panels = list(dict.fromkeys((row.text, row.context) for row in rows))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6.5 * len(panels), 5), squeeze=False, sharey=True)
    names = list(dict.fromkeys(_family(row.method) for row in rows if row.method != "dense"))
    colours = pyplot.get_cmap("tab20").colors
    for axis, (text, context) in zip(axes[0], panels, strict=True):
        for i, name in enumerate(names):
            points = sorted(
                (100 * r.kv_read, max(r.kl.mean, 1e-6))
                for r in rows
                if (r.text, r.context) == (text, context) and _family(r.method) == name
            )
            if points:
                x, y = zip(*points, strict=True)
                axis.plot(
                    x, y, marker=_MARKERS[i % len(_MARKERS)], label=name, color=colours[2 * i % 20 + i // 10], lw=1.2
                )
        axis.set(xscale="log", yscale="log", title=f"{text}, {context:,} tokens")
        axis.set_xlabel("bytes read, % of the dense KV cache")
        axis.grid(alpha=0.3, which="both")
    axes[0][0].set_ylabel("KL to dense, nats a token")
    axes[0][-1].legend(fontsize=8)
    save_figure(pyplot, figure, path)


def _family(method: str) -> str:
    """Methods whose points belong on one line: the same name, with and without a tail apart."""
    name, _, parameters = method.partition(":")
    return f"{name}+tail" if "tail=" in parameters and name != "auto" else name


def plot_timings(rows: "Sequence[Timing]", path: Path) -> None:
    """Time of a token against context, one line an engine, and each one's floor dashed; a panel a batch size."""
    pyplot = load_pyplot()
    batches = sorted({row.batch for row in rows})
    figure, axes = pyplot.subplots(1, len(batches), figsize=(6.5 * len(batches), 5), squeeze=False)
    engines = list(dict.fromkeys(row.engine for row in rows))
    for axis, batch in zip(axes[0], batches, strict=True):
        for i, engine in enumerate(engines):
            own = sorted((r for r in rows if r.engine == engine and r.batch == batch), key=lambda r: r.context)
            if not own:
                continue
            contexts = [r.context for r in own]
            color, marker = f"C{i % 10}", _MARKERS[i % len(_MARKERS)]
            axis.plot(contexts, [r.median_ms for r in own], marker=marker, label=engine, color=color)
            axis.plot(contexts, [r.floor_ms for r in own], ls="--", lw=0.8, color=color)
        axis.set(xscale="log", yscale="log", xlabel="tokens in the cache", ylabel="ms a pass", title=f"batch {batch}")
        axis.set_xticks(sorted({r.context for r in rows}), [f"{c:,}" for c in sorted({r.context for r in rows})])
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3, which="both")
    axes[0][-1].legend(fontsize=8, title="dashed: floor")
    save_figure(pyplot, figure, path)


def plot_speedups(speedups: dict[tuple[int, int], float], title: str, path: Path) -> None:
    """Speed-up by (batch, context): a map, each field with its number."""
    pyplot = load_pyplot()
    batches, contexts = (sorted({key[i] for key in speedups}) for i in (0, 1))
    values = [[speedups[b, n] for n in contexts] for b in batches]
    figure, axis = pyplot.subplots(figsize=(1.5 + 1.1 * len(contexts), 1.5 + 0.6 * len(batches)))
    axis.imshow(values, aspect="auto", origin="lower", cmap="viridis", vmin=1)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            light = value < 1 + 0.6 * (max(map(max, values)) - 1)
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if light else "black")
    axis.set_xticks(range(len(contexts)), [f"{n:,}" for n in contexts])
    axis.set_yticks(range(len(batches)), [str(b) for b in batches])
    axis.set(xlabel="tokens in the cache", ylabel="sequences", title=title)
    save_figure(pyplot, figure, path)


def load_pyplot() -> Any:
    """Without a screen. Raises UsageError if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError("plots need matplotlib, which is not installed; pip install 'thresher[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_figure(pyplot: Any, figure: Any, path: Path) -> None:
    """Whole or not at all, and let the figure go. Raises StorageError."""
    kind = path.suffix[1:] or "png"
    try:
        replaced(path, lambda part: figure.savefig(part, format=kind, dpi=150, bbox_inches="tight"))
    except (OSError, ValueError) as error:
        raise StorageError(f"{path}: cannot be written: {error}") from error
    finally:
        pyplot.close(figure)
