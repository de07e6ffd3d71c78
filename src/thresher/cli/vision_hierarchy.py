from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from thresher.cli.options import Json, Threads, numbers, shell_word
from thresher.cli.terminal import say, stderr, write_json
from thresher.cli.vision_train import Bars, Data, Lr, Model, Precision, Seed, Source, prepare, read_data
from thresher.errors import UsageError

if TYPE_CHECKING:
    from thresher.vision.hierarchy import Tree
    from thresher.vision.hsd import Hierarchy

Flops = Annotated[float, typer.Option(help="Share of the whole's FLOPs that a sub-network has at most.", min=0, max=1)]
Parameters = Annotated[float, typer.Option(help="The same of parameters.", min=0, max=1)]
Fall = Annotated[
    float, typer.Option(help="Accuracy that pruning may cost within a group before fine-tuning.", min=0, max=1)
]
Method = Annotated[
    str, typer.Option(help="How filters' impact is measured: taylor (fast), ablation (each left out) or activation.")
]
Multiple = Annotated[int, typer.Option(help="Channels are kept in multiples of it, which processors like.", min=1)]


def hierarchy(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="A folder for the tree of sub-networks, its leaves and what was measured.")],
    source: Source = Source(),  # noqa: B008
    taxonomy: Annotated[str, typer.Option(help="wordnet, or none: group by what the network sees alone.")] = "wordnet",
    synsets: Annotated[
        Path | None,
        typer.Option(
            help="A TOML file that says which nouns classes are where their names do not: "
            '"Ankle boot" = "boot.n.01", a line each.',
            show_default=False,
        ),
    ] = None,
    follow: Annotated[
        str,
        typer.Option(
            help="How the network is tuned to the taxonomy first: align (classes' features as alike as the classes), "
            "labels (relatives share probability), levels (a loss for every level), or none."
        ),
    ] = "align",
    weight: Annotated[
        float | None,
        typer.Option(
            help="Of that beside the other losses. Default: 10 of align, 0.2 of labels, 0.5 of levels.",
            min=0,
            show_default=False,
        ),
    ] = None,
    tree: Annotated[
        str,
        typer.Option(
            help="impact (classes that need the same filters), confusion, weights, taxonomy (WordNet's own tree), or a "
            "tree.json to take the network apart along."
        ),
    ] = "impact",
    groups: Annotated[int, typer.Option(help="Leaves that the tree is cut to, or a few more.", min=2)] = 5,
    flops: Flops = 0.5,
    parameters: Parameters = 0.4,
    fall: Fall = 0.01,
    overlap: Annotated[
        float,
        typer.Option(help="Groups part at the first layer where their impact has at most this cosine.", min=0, max=1),
    ] = 0.5,
    method: Method = "taylor",
    multiple: Multiple = 8,
    tune_epochs: Annotated[int, typer.Option(help="Of learning the taxonomy.", min=1)] = 3,
    epochs: Annotated[
        int, typer.Option(help="Of training the tree and its routers; leaves train for twice as many.", min=1)
    ] = 8,
    loss: Annotated[
        str,
        typer.Option(
            help="What the tree learns from: cross-entropy (labels; most accurate), soft (a tenth labels, the rest "
            "what the network as it was answers) or logits (its answers alone)."
        ),
    ] = "cross-entropy",
    batch: Annotated[int, typer.Option(help="Images of a step.", min=2)] = 128,
    lr: Lr = 0.05,
    pad: Annotated[int, typer.Option(help="Pixels that images are moved by at random, and mirrored.", min=0)] = 2,
    batches: Annotated[str, typer.Option(help="Batch sizes to measure time at.")] = "1,32",
    seed: Seed = 0,
    precision: Precision = "float32",
    threads: Threads = None,
    json: Json = None,
) -> None:
    """Take a CNN apart along a tree of its classes: sub-networks for groups of them, and routers between.

    thresher vision hierarchy teacher --taxonomy wordnet --data fashion-animals --out parts

    Every leaf is also a model of its own in parts/leaves. Interrupted, the same command goes on.
    """
    from dataclasses import replace

    from thresher.vision.dissect import Settings
    from thresher.vision.finetune import Settings as Tuning
    from thresher.vision.grouping import read_semantics
    from thresher.vision.hsd import Follow, make_hierarchy
    from thresher.vision.taxonomy import WEIGHTS

    if taxonomy not in ("wordnet", "none"):
        raise UsageError(f"--taxonomy {taxonomy}: wordnet or none")
    if taxonomy == "none" and (synsets or tree == "taxonomy"):
        raise UsageError("--synsets and --tree taxonomy need --taxonomy wordnet")
    sizes = tuple(numbers("batches", batches))
    settings = Settings(fall, flops, parameters, overlap, multiple, method)
    tune = Tuning(loss, epochs, batch, lr, pad=pad, seed=seed, precision=precision)
    learn = replace(tune, objective="soft", epochs=tune_epochs)
    strength = WEIGHTS.get(follow, 1.0) if weight is None else weight
    following = Follow(follow, strength, tune=learn) if follow != "none" and taxonomy == "wordnet" else None
    prepare(threads, out)
    whole = source.load(model)
    semantics = None
    if taxonomy == "wordnet":
        with stderr.status("looking classes up in WordNet"):
            semantics = read_semantics(whole.about.classes, synsets)
    chosen = _tree(tree, whole.about.classes)
    images = read_data(data, whole.about.shape[1], whole.about.shape[0], whole.about.classes)
    with Bars() as bars:
        made = make_hierarchy(
            whole, images, semantics, out, settings, tune, following, chosen, groups, sizes, bars
        )  # fmt: skip
    show(made)
    word = shell_word(out)
    names = ",".join(made.leaves[0].classes[:3]) if made.leaves else ""
    stderr.print(
        f"next: thresher vision report {word}; thresher vision extract {word} --classes {quote(names)} --out few",
        style="dim",
    )
    write_json(json, made.summary())


def _tree(name: str, classes: tuple[str, ...]) -> "Tree | str":
    from thresher.vision.grouping import KINDS
    from thresher.vision.hierarchy import read_tree

    if name in (*KINDS, "taxonomy"):
        return name
    if not Path(name).is_file():
        raise UsageError(f"--tree {name}: neither {', '.join(KINDS)} or taxonomy, nor a file")
    return read_tree(Path(name), classes)


def show(made: "Hierarchy") -> None:
    """Leaves, accuracy, costs and what the groups have to do with WordNet."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("leaf", "classes", "right", "the whole", "FLOPs", "parameters", "time of 1"):
        table.add_column(name, justify="left" if name in ("leaf", "classes") else "right", no_wrap=name != "classes")
    for leaf in made.leaves:
        first = next(iter(leaf.seconds.values()), (1.0, 1.0))
        table.add_row(
            leaf.name,
            ", ".join(leaf.classes),
            f"{100 * leaf.accuracy.mean:.2f} %",
            f"{100 * leaf.whole.mean:.2f} %",
            f"{100 * leaf.flops:.0f} %",
            f"{100 * leaf.parameters:.0f} %",
            f"{100 * first[1] / first[0]:.0f} %",
        )
    stderr.print(table)
    say("accuracy: " + ", ".join(f"{name} {100 * share.mean:.2f} %" for name, share in made.accuracy.items()))
    macs = made.costs["macs"]
    say(f"FLOPs of the whole's: all branches {100 * macs['all'] / macs['whole']:.0f} %, "
        f"leaves with a chance of 2 % {100 * macs['likely'] / macs['whole']:.0f} %, "
        f"the likeliest alone {100 * macs['hard'] / macs['whole']:.0f} %")  # fmt: skip
    for name, found in made.coherence.items():
        say(f"groups by {_named(name)}: Wu-Palmer {found.wu_palmer.value:.3f} (random {found.wu_palmer.mean:.3f}, "
            f"p {found.wu_palmer.p:.2g}), Lin {found.lin.value:.3f} (p {found.lin.p:.2g})")  # fmt: skip


def _named(name: str) -> str:
    return {"taxonomy": "WordNet itself", "before": "impact, before tuning"}.get(name, name)
