from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from thresher.cli.options import Json, Threads, numbers, shell_word
from thresher.cli.terminal import progress_bar, say, stderr, write_json
from thresher.errors import StorageError, UsageError

Data = Annotated[
    Path | None,
    typer.Option(help="A text file, or a folder with .txt files. Default: Shakespeare's plays.", show_default=False),
]
Words = Annotated[
    str, typer.Option(help="bytes, chars (the characters of the text), or a folder or hub id with a tokenizer.")
]
Precision = Annotated[str, typer.Option(help="float32, or bf16 (mixed, where the machine is faster so).")]


def train(
    out: Annotated[Path, typer.Option(help="A folder for the model, its loss curve and checkpoints.")],
    data: Data = None,
    preset: Annotated[
        str,
        typer.Option(help="tiny (minutes on a CPU), small (nanoGPT's for characters) or gpt2-small (the paper's)."),
    ] = "tiny",
    arch: Annotated[
        str, typer.Option(help="mosaic, mosaic-v2 or gpt: a GPT-2 of the same size to compare with.")
    ] = "mosaic",
    tokenizer: Words = "bytes",
    layers: Annotated[int | None, typer.Option(help="In place of the preset's.", min=1, show_default=False)] = None,
    width: Annotated[int | None, typer.Option(help="The same.", min=2, show_default=False)] = None,
    heads: Annotated[int | None, typer.Option(help="The same.", min=1, show_default=False)] = None,
    block: Annotated[
        int | None, typer.Option(help="Tokens of a sequence in training.", min=2, show_default=False)
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences of a step.", min=1, show_default=False)] = None,
    steps: Annotated[int | None, typer.Option(help="Of training.", min=1, show_default=False)] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate.", show_default=False)] = None,
    dropout: Annotated[float | None, typer.Option(help="Of pairs, scores and outputs.", show_default=False)] = None,
    precision: Precision = "float32",
    seed: Annotated[int, typer.Option(help="Of the weights and of what is drawn.", min=0)] = 0,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew; what is in --out is lost.")] = False,
    threads: Threads = None,
    json: Json = None,
) -> None:
    """Train a Memory Mosaic on text, or a transformer of the same size.

    thresher mosaic train --out mosaic --preset tiny && thresher generate --model mosaic "ROMEO:"

    Interrupted, the same command goes on behind its last checkpoint. On several devices or machines: torchrun
    --nproc_per_node 2 -m thresher mosaic train ... (or accelerate launch); --batch is then of each.
    """
    from dataclasses import asdict

    from thresher.mosaics.train import CURVE, PRESETS, plot_curve
    from thresher.mosaics.train import train as run

    if preset not in PRESETS:
        raise UsageError(f"--preset {preset}: choose one of {', '.join(PRESETS)}")
    given: dict[str, Any] = {
        "layers": layers,
        "width": width,
        "heads": heads,
        "block": block,
        "batch": batch,
        "steps": steps,
    }
    given |= {"lr": lr, "dropout": dropout}
    chosen = {name: value for name, value in given.items() if value is not None}
    settings = replace(PRESETS[preset], arch=arch, precision=precision, seed=seed, **chosen)
    prepare(threads, out)
    corpus, words = read(data, tokenizer, settings.block)
    say(f"{len(corpus.training):,} tokens to train on, {len(corpus.validation):,} to validate, {len(words)} kinds")
    with progress_bar(arch, "steps") as bar:
        result = run(settings, corpus, words, out, resume=not restart, progress=bar)
    plot_curve({arch: result.curve}, out / "loss.png")
    say(
        f"{result.parameters:,} parameters, validation loss {result.validation:.3f} nats a token, "
        f"{result.tokens_per_second:,.0f} tokens/s; curve: {out / CURVE} and loss.png"
    )
    stderr.print(f'next: thresher generate --model {shell_word(out)} "..."', style="dim")
    write_json(json, asdict(result))


def text(
    out: Annotated[Path, typer.Option(help="A folder for the models, one each, and the plot as text.png.")],
    data: Data = None,
    other: Annotated[
        Path | None,
        typer.Option(help="Text of another kind to try them on. Default: Paradise Lost.", show_default=False),
    ] = None,
    arch: Annotated[str, typer.Option(help="Separated by commas: mosaic, mosaic-v2, gpt.")] = "mosaic,gpt",
    layers: Annotated[str, typer.Option(help="Depths, separated by commas.")] = "1,2",
    seeds: Annotated[int, typer.Option(help="Trainings of each, with seeds 0, 1 and so on.", min=1)] = 3,
    tokenizer: Words = "bytes",
    width: Annotated[int, typer.Option(help="Of all.", min=2)] = 128,
    heads: Annotated[int, typer.Option(help="Of all.", min=1)] = 4,
    block: Annotated[int, typer.Option(help="Tokens of a sequence.", min=16)] = 256,
    batch: Annotated[int, typer.Option(help="Sequences of a step.", min=1)] = 16,
    steps: Annotated[int, typer.Option(help="Of training.", min=1)] = 600,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 2e-3,
    precision: Precision = "float32",
    threads: Threads = None,
    json: Json = None,
) -> None:
    """Compare a Memory Mosaic with a transformer of the same size on the same text, by depth.

    thresher mosaic text --out text --layers 1,2 --seeds 3

    Interrupted, the same command goes on; what is trained is not trained again.
    """
    from dataclasses import asdict
    from functools import partial

    from thresher.evaluation.texts import public_text
    from thresher.mosaics.corpus import read_texts, token_ids
    from thresher.mosaics.text import plot
    from thresher.mosaics.text import run as compare
    from thresher.mosaics.train import Settings

    settings = Settings(
        width=width, heads=heads, block=block, batch=batch, steps=steps, lr=lr, precision=precision,
        evaluate_every=max(1, steps // 6),
    )  # fmt: skip
    depths, kinds = numbers("layers", layers), [a.strip() for a in arch.split(",") if a.strip()]
    for kind in kinds:
        replace(settings, arch=kind)  # whether it is known, before anything takes long
    prepare(threads, out)
    corpus, words = read(data, tokenizer, block)
    strange = token_ids(words, "".join(read_texts(other)) if other else public_text("paradise_lost"))
    if len(strange) <= block:
        raise UsageError(f"--other has {len(strange)} tokens: give more than a block of {block}")
    bar = partial(progress_bar, unit="steps")
    rows = compare(settings, kinds, depths, range(seeds), corpus, strange, words, out, bar)
    for depth in depths:
        for kind in kinds:
            own = [r for r in rows if (r.arch, r.layers) == (kind, depth)]
            say(
                f"{depth} layers, {kind}: validation {_spread([r.validation for r in own])}, other text "
                f"{_spread([r.other for r in own])}, {own[0].parameters:,} parameters, "
                f"{_spread([r.tokens_per_second for r in own], 0)} tokens/s"
            )
    plot(rows, block, out / "text.png")
    say(f"{out / 'text.png'} written")
    write_json(json, {"settings": asdict(settings), "models": [asdict(r) for r in rows]})


def prepare(threads: int | None, out: Path) -> None:
    """Threads, the folder, and no bars but ours."""
    import torch
    from transformers.utils import logging

    from thresher.evaluation.plots import load_pyplot

    load_pyplot()  # whether it is there, before anything takes long
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if threads:
        torch.set_num_threads(threads)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{out}: cannot be a folder: {error.strerror}") from error


def read(data: Path | None, tokenizer: str, block: int) -> tuple[Any, Any]:
    """The text in two parts, and its tokenizer."""
    from thresher.evaluation.texts import public_text
    from thresher.mosaics.corpus import corpus, make_tokenizer, read_texts

    texts = read_texts(data) if data else [public_text("plays")]
    words = make_tokenizer(tokenizer, texts)
    return corpus(texts, words, block), words


def _spread(values: list[float], digits: int = 3) -> str:
    """The mean, and of several values the lowest and highest."""
    mean = f"{sum(values) / len(values):,.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"
