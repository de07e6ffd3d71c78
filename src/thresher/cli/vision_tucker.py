import json as json_format
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thresher.cli.options import Json, Threads, numbers, shell_word
from thresher.cli.terminal import say, stderr, write_json
from thresher.cli.vision_train import Bars, DataOrNot, Lr, Model, Precision, Seed, Source, prepare, read_data
from thresher.errors import UsageError

if TYPE_CHECKING:
    from thresher.vision.pipeline import Outcome

Share = Annotated[
    float | None, typer.Option(help="Share of the whole model's that is to be left, as 0.5.", show_default=False)
]


def tucker(
    model: Model,
    out: Annotated[Path, typer.Option(help="A folder for the result: weights, ONNX, torch.export, what was measured.")],
    data: DataOrNot = None,
    source: Source = Source(),  # noqa: B008
    target_flops: Share = None,
    target_parameters: Share = None,
    target_latency: Annotated[
        float | None,
        typer.Option(help="The same of the time on this machine, measured layer by layer.", show_default=False),
    ] = None,
    runtime: Annotated[str, typer.Option(help="Of --target-latency: torch or onnxruntime.")] = "torch",
    ranks: Annotated[
        str,
        typer.Option(
            help="sensitivity (where it hurts least under the target), equal (one ratio), vbmf (what stands out of "
            "noise; no target), or a JSON file with two ranks for each layer by name, of outputs and of inputs."
        ),
    ] = "sensitivity",
    weakening: Annotated[float, typer.Option(help="Of vbmf: 1 takes its ranks, 0 full ones.", min=0, max=1)] = 1.0,
    multiple: Annotated[int, typer.Option(help="Ranks are multiples of it, which processors like.", min=1)] = 8,
    weighted: Annotated[
        bool, typer.Option("--weighted", help="Keep the outputs near on images of --data, not the weights.")
    ] = False,
    first: Annotated[bool, typer.Option("--first", help="Decompose the first layer, too.")] = False,
    leave: Annotated[
        list[str] | None,
        typer.Option(
            help="A layer, a part of the model, or a pattern as '*.shortcut.*', to leave alone.", show_default=False
        ),
    ] = None,
    distill: Annotated[bool, typer.Option("--distill", help="Fine-tune on --data, with the model as teacher.")] = False,
    teacher: Annotated[
        str | None, typer.Option(help="Another teacher of the same classes. Default: the model.", show_default=False)
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            help="cross-entropy (no teacher), logits, soft, hint, attention, similarity, relation, mixed, ard or rslad "
            "(against attacks). Default: attention, or soft from another teacher, whose layers may be others.",
            show_default=False,
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Of fine-tuning.", min=1)] = 3,
    batch: Annotated[int, typer.Option(help="Images of a step.", min=2)] = 128,
    lr: Lr = 0.01,
    pad: Annotated[int, typer.Option(help="Pixels that images are moved by at random, and mirrored.", min=0)] = 2,
    epsilon: Annotated[float, typer.Option(help="Of attacks in training (ard, rslad).", min=0, max=1)] = 0.1,
    fold: Annotated[bool, typer.Option(help="Make batch norms part of the convolutions at the end.")] = True,
    batches: Annotated[str, typer.Option(help="Batch sizes to measure time at.")] = "1,32",
    seed: Seed = 0,
    precision: Precision = "float32",
    threads: Threads = None,
    json: Json = None,
) -> None:
    """Decompose a CNN's convolutions, fine-tune it from itself, and write it as plain layers.

    thresher vision tucker teacher --data fashion-mnist --target-flops 0.5 --distill --out smaller

    Interrupted, the same command goes on.
    """
    from thresher.vision.compress import METHODS
    from thresher.vision.compress import Settings as Compression
    from thresher.vision.finetune import Settings
    from thresher.vision.pipeline import tucker as run
    from thresher.vision.ranks import Target

    given = {"flops": target_flops, "parameters": target_parameters, "latency": target_latency}
    chosen = [(share, cost) for cost, share in given.items() if share is not None]
    by_hand = {} if ranks in METHODS else _by_hand(Path(ranks))
    if len(chosen) > 1:
        raise UsageError("give one target: of FLOPs, of parameters or of latency")
    if chosen and (by_hand or ranks == "vbmf"):
        raise UsageError("ranks by hand and by vbmf take no target")
    sizes = tuple(numbers("batches", batches))
    share, cost = chosen[0] if chosen else (0.5, "flops")
    settings = Compression(
        target=None if by_hand or ranks == "vbmf" else Target(share, cost, sizes[0], runtime),
        method=ranks if not by_hand else "vbmf",
        weakening=weakening,
        by_hand=by_hand,
        multiple=multiple,
        weighted=weighted,
        first=first,
        leave=tuple(leave or ()),
    )
    loss = loss or ("soft" if teacher else "attention")
    learn = Settings(loss, epochs, batch, lr, pad=pad, epsilon=epsilon, seed=seed, precision=precision)
    if distill and data is None:
        raise UsageError("--distill needs --data")
    prepare(threads, out)
    whole = source.load(model)
    tutor = source.load(teacher, other=True) if teacher else None
    images = read_data(data, whole.about.shape[1], whole.about.shape[0], whole.about.classes) if data else None
    with Bars() as bars:
        outcome = run(whole, settings, out, images, learn if distill else None, tutor, fold, sizes, bars)
    if not outcome.exports:  # one of several processes, and not the first
        return
    _show(outcome)
    say(f"written to {out}: {', '.join(('model.safetensors', *outcome.exports))}, whose logits differ by at most "
        f"{max(outcome.exports.values()):.0e} of the largest")  # fmt: skip
    if data:
        word, trust = shell_word(out), f" --trust {quote(model)}" if whole.about.source == model else ""
        stderr.print(
            f"next: thresher vision attack {word} --data {quote(data)} --against {quote(model)}{trust}; "
            f"thresher vision report {word}",
            style="dim",
        )
    write_json(json, outcome.summary())


def _by_hand(path: Path) -> dict[str, tuple[int, int]]:
    try:
        said: Any = json_format.loads(path.read_text())
        return {str(name): (int(pair[0]), int(pair[1])) for name, pair in said.items()}
    except (OSError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        raise UsageError(
            f'--ranks {path}: neither sensitivity, equal or vbmf, nor a JSON file {{"layer": [8, 8]}}'
        ) from error


def _show(outcome: "Outcome") -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("layer", "channels", "ranks", "error", "FLOPs left"):
        table.add_column(name, justify="left" if name == "layer" else "right", no_wrap=True)
    for r in outcome.layers:
        left = f"{100 * r.macs[1] / r.macs[0]:.0f} %"
        pair = f"{r.ranks[0]}, {r.ranks[1]}" if r.kind == "tucker" else str(r.ranks[0]) if r.kind == "svd" else r.reason
        table.add_row(r.name, f"{r.channels[0]}, {r.channels[1]}", pair, f"{r.error:.3f}" if r.error else "", left)
    stderr.print(table)
    for name, (before, after) in outcome.costs.items():
        say(f"{name}: {before:,} to {after:,}, {100 * after / before:.1f} %")
    for size, (whole, less) in outcome.seconds.items():
        say(f"time of {size}: {1000 * whole:.2f} to {1000 * less:.2f} ms, {100 * less / whole:.0f} % (both folded)")
    if outcome.accuracy:
        say("accuracy: " + ", ".join(f"{name} {100 * share:.2f} %" for name, share in outcome.accuracy.items()))
