"""Memory Mosaic and transformer on the same text, by depth: validation loss, and loss on text of another kind."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from thresher.evaluation.plots import load_pyplot, save_figure
from thresher.mosaics.corpus import Corpus
from thresher.mosaics.train import Progress, Result, Settings, train

PARTS = 8  # of a block, by position
_BLOCKS = 64  # of a text that losses are taken of

Bar = Callable[[str], AbstractContextManager[Progress]]


@dataclass(frozen=True)
class Trained:
    """One model. validation, other: nats a token over whole blocks of the validation text, and of text of another
    kind; by_part: the same of each eighth of a block, so that what a longer context gives is seen."""

    arch: str
    layers: int
    seed: int
    parameters: int
    tokens: int
    tokens_per_second: float
    validation: float
    validation_by_part: list[float]
    other: float
    other_by_part: list[float]


@torch.no_grad()
def losses_by_part(model: Any, ids: torch.Tensor, block: int, parts: int = PARTS) -> list[float]:
    """Mean nats a token in each part of a block, over blocks spread evenly over a text."""
    count = min(_BLOCKS, (len(ids) - 1) // block)
    starts = [i * (len(ids) - 1 - block) // max(1, count - 1) for i in range(count)]
    total = torch.zeros(block)
    model.eval()
    for piece in torch.split(torch.tensor(starts), 8):
        batch = torch.stack([ids[at : at + block + 1] for at in piece.tolist()]).long()
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits.float()
        total += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none").view(-1, block).sum(0)
    return [part.mean().item() for part in (total / count).tensor_split(parts)]


def run(
    settings: Settings,
    architectures: Sequence[str],
    layers: Sequence[int],
    seeds: Sequence[int],
    corpus: Corpus,
    other: torch.Tensor,
    tokenizer: Any,
    out: Path,
    bar: Bar,
) -> list[Trained]:
    """Train each combination in a folder of its own below `out`, those that are done not again, and measure all."""
    from transformers import AutoModelForCausalLM

    found = []
    for depth in layers:
        for seed in seeds:
            for arch in architectures:
                folder = out / f"{arch}-{depth}-{seed}"
                chosen = replace(settings, arch=arch, layers=depth, seed=seed)
                with bar(f"{arch}, {depth} layers, seed {seed}") as progress:
                    result: Result = train(chosen, corpus, tokenizer, folder, progress=progress)
                model = AutoModelForCausalLM.from_pretrained(folder).eval()
                own, strange = (losses_by_part(model, ids, settings.block) for ids in (corpus.validation, other))
                found.append(
                    Trained(
                        arch,
                        depth,
                        seed,
                        result.parameters,
                        result.curve[-1].tokens,
                        result.tokens_per_second,
                        sum(own) / len(own),
                        own,
                        sum(strange) / len(strange),
                        strange,
                    )
                )
    return found


def plot(rows: Sequence[Trained], block: int, path: Path) -> None:
    """Left: validation loss by depth. Right: loss by place in the block, on both texts, of the deepest models."""
    pyplot = load_pyplot()
    figure, (by_depth, *by_place) = pyplot.subplots(1, 3, figsize=(16, 4.5))
    depths = sorted({row.layers for row in rows})
    places = [(i + 0.5) * block / PARTS for i in range(PARTS)]
    for i, arch in enumerate(dict.fromkeys(row.arch for row in rows)):
        own = [row for row in rows if row.arch == arch]
        means = [_mean([r.validation for r in own if r.layers == depth]) for depth in depths]
        by_depth.plot(depths, means, color=f"C{i}", marker="o", label=arch)
        by_depth.scatter([r.layers for r in own], [r.validation for r in own], color=f"C{i}", s=12, alpha=0.5)
        deepest = [r for r in own if r.layers == depths[-1]]
        for axis, name in zip(by_place, ("validation_by_part", "other_by_part"), strict=True):
            curves = [getattr(r, name) for r in deepest]
            axis.plot(
                places, [_mean(list(c)) for c in zip(*curves, strict=True)], color=f"C{i}", marker="o", label=arch
            )
    by_depth.set(xlabel="layers", ylabel="validation loss, nats a token", xticks=depths)
    for axis, title in zip(by_place, ("validation text", "text of another kind"), strict=True):
        axis.set(xlabel="tokens of context", ylabel="loss, nats a token", title=f"{title}, {depths[-1]} layers")
    for axis in (by_depth, *by_place):
        axis.grid(alpha=0.3)
        axis.legend()
    save_figure(pyplot, figure, path)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
