"""Train a Memory Mosaic and a transformer to learn automata in context, and measure both on automata they never saw."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from thresher.errors import UsageError
from thresher.evaluation.jsonlines import JsonLines
from thresher.evaluation.plots import load_pyplot, save_figure
from thresher.mosaics.automata import (
    IGNORED,
    VOCABULARY,
    Array,
    Automaton,
    Instance,
    Measures,
    Sizes,
    automata,
    batch,
    bayes,
    chance,
    instance,
    measure,
    ngram,
)

ARCHITECTURES = {"mosaic": "Memory Mosaic", "gpt": "transformer"}
BASELINES: dict[str, Callable[[Instance, Sizes], Array]] = {
    "chance": lambda one, sizes: chance(one),
    "ngram": lambda one, sizes: ngram(one),
    "bayes": bayes,
}
_HELD_OUT, _TRAINING, _EPOCH = range(3)  # what random numbers are for
# Instances that are computed together. On a CPU one is the fastest: nothing is padded, and no tensor is so large that
# its memory goes back to the system.
_PIECE = 1

Progress = Callable[[int, int], None]  # how much is done, and of how much
Bar = Callable[[str], AbstractContextManager[Progress]]  # of something with a name


@dataclass(frozen=True)
class Settings:
    """What changes a result, beside architecture, automata and seed.

    batch: instances of a step; decay: of matrices; held_out: automata that no training has, half of them for
    validation. Raises UsageError.
    """

    epochs: int = 200
    layers: int = 2
    width: int = 128
    heads: int = 8
    lr: float = 5e-4
    batch: int = 32
    dropout: float = 0.05
    decay: float = 0.1
    held_out: int = 500
    sizes: Sizes = field(default_factory=Sizes)

    def __post_init__(self) -> None:
        if min(self.epochs, self.layers, self.heads, self.batch) < 1 or self.held_out < 2:
            raise UsageError("epochs, layers, heads and batch begin at 1, and 2 automata at least are held out")
        if self.width < 1 or self.width % (2 * self.heads):
            raise UsageError(f"a width of {self.width} has no even part for each of {self.heads} heads")
        if not (0 < self.lr < math.inf and 0 <= self.decay < math.inf and 0 <= self.dropout < 1):
            raise UsageError(f"learning rate {self.lr}, decay {self.decay} or dropout {self.dropout} makes no sense")


@dataclass(frozen=True)
class Run:
    """One training. test, validation: on the halves of the automata that were held out; loss: in nats a symbol, the
    mean of the last epoch; tokens: read in training, padding excepted; seconds: of training."""

    architecture: str
    automata: int
    seed: int
    test: Measures
    validation: Measures
    loss: float
    parameters: int
    tokens: int
    seconds: float = field(compare=False)


@dataclass(frozen=True)
class Report:
    """baselines: on the test half, by their names in BASELINES."""

    settings: Settings
    runs: tuple[Run, ...]
    baselines: dict[str, Measures]


class ResultFile(JsonLines):
    """Runs by (architecture, automata, seed), and baselines, in a file that survives a kill; without a path in memory
    only. Raises what JsonLines does."""

    def __init__(self, path: Path | None, settings: Settings) -> None:
        self.runs: dict[tuple[str, int, int], Run] = {}
        self.baselines: dict[str, Measures] = {}
        super().__init__(path, "icl", "a file of automata runs", "--out", asdict(settings), self._read)

    def _read(self, entry: dict[str, Any]) -> None:
        if "baseline" in entry:
            self.baselines[entry["baseline"]] = Measures(**entry["test"])
        else:
            halves = {half: Measures(**entry[half]) for half in ("test", "validation")}
            run = Run(**(entry | halves))
            self.runs[run.architecture, run.automata, run.seed] = run

    def add(self, run: Run) -> None:
        """It is in the file when this returns. Raises StorageError."""
        self.runs[run.architecture, run.automata, run.seed] = run
        self.append(asdict(run))

    def add_baseline(self, name: str, test: Measures) -> None:
        self.baselines[name] = test
        self.append({"baseline": name, "test": asdict(test)})


def held_out(settings: Settings) -> tuple[list[Instance], list[Instance]]:
    """Test and validation: an instance of each automaton. The same for every run."""
    rng = _generator(0, _HELD_OUT, 0)
    made = [instance(a, rng, settings.sizes) for a in automata(settings.held_out, rng, settings.sizes)]
    return made[: len(made) // 2], made[len(made) // 2 :]


def training_automata(settings: Settings, count: int, seed: int) -> list[Automaton]:
    """None of them is held out. A larger count adds to those of a smaller one."""
    never = {one.automaton for half in held_out(settings) for one in half}
    return automata(count, _generator(seed, _TRAINING, 0), settings.sizes, never)


def epoch_batches(known: Sequence[Automaton], settings: Settings, seed: int, epoch: int) -> list[list[Instance]]:
    """A new instance of each automaton, in random order."""
    rng = _generator(seed, _EPOCH, epoch)
    made = [instance(known[i], rng, settings.sizes) for i in rng.permutation(len(known))]
    return [made[i : i + settings.batch] for i in range(0, len(made), settings.batch)]


def _generator(seed: int, purpose: int, number: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(purpose, number)))


def build(architecture: str, settings: Settings) -> torch.nn.Module:
    """A model with random weights, of torch's seed. Raises UsageError if there is no such architecture."""
    shape: dict[str, Any] = {"vocab_size": VOCABULARY, "use_cache": False, "bos_token_id": None, "eos_token_id": None}
    if architecture == "mosaic":
        from thresher.models.mosaic import MemoryMosaicConfig, MemoryMosaicForCausalLM

        return MemoryMosaicForCausalLM(
            MemoryMosaicConfig(
                **shape,
                hidden_size=settings.width,
                num_hidden_layers=settings.layers,
                num_attention_heads=settings.heads,
                persistent_size=7 * settings.width // 2,
                dropout=settings.dropout,
            )
        )
    if architecture == "gpt":
        from transformers import GPT2Config, GPT2LMHeadModel

        model: Any = GPT2LMHeadModel(
            GPT2Config(
                **shape,
                n_embd=settings.width,
                n_layer=settings.layers,
                n_head=settings.heads,
                n_positions=settings.sizes.longest,
                resid_pdrop=settings.dropout,
                embd_pdrop=settings.dropout,
                attn_pdrop=settings.dropout,
            )
        )
        model.loss_type = "ForCausalLM"  # the default, which transformers would remark on
        gpt: torch.nn.Module = model
        return gpt
    raise UsageError(f"architecture '{architecture}': choose from {', '.join(ARCHITECTURES)}")


def rate(step: int, steps: int) -> float:
    """Of the learning rate: up in a line in the first tenth of the steps, then down along a cosine to a tenth."""
    rise = max(1, steps // 10)
    if step < rise:
        return (step + 1) / rise
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - 1 - rise)))


def gradients(model: torch.nn.Module, instances: Sequence[Instance]) -> float:
    """The mean loss of all positions, in nats; its gradients are added to the parameters'. Computed in pieces."""
    ordered = sorted(instances, key=lambda one: len(one.tokens))
    pieces = [batch(ordered[i : i + _PIECE]) for i in range(0, len(ordered), _PIECE)]
    positions = [int((labels[:, 1:] != IGNORED).sum()) for _, labels in pieces]
    total = 0.0
    for (tokens, labels), own in zip(pieces, positions, strict=True):
        loss = model(input_ids=torch.from_numpy(tokens), labels=torch.from_numpy(labels)).loss
        (loss * (own / sum(positions))).backward()
        total += float(loss.detach()) * own / sum(positions)
    return total


def train(
    architecture: str,
    known: Sequence[Automaton],
    settings: Settings,
    seed: int,
    progress: Progress = lambda done, total: None,
) -> tuple[torch.nn.Module, float, int]:
    """The trained model, its mean loss in the last epoch, and the tokens it has read. progress: instances read, and of
    how many. Random numbers of the caller are left as they are. Raises UsageError if the loss is no number any more."""
    from thresher.models.mosaic import decay_groups

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(architecture, settings).train()
        optimizer = torch.optim.AdamW(decay_groups(model, settings.decay), lr=settings.lr)
        steps = settings.epochs * math.ceil(len(known) / settings.batch)
        step, done, read, losses = 0, 0, 0, [0.0]
        for epoch in range(settings.epochs):
            losses = []
            for instances in epoch_batches(known, settings, seed, epoch):
                for group in optimizer.param_groups:
                    group["lr"] = settings.lr * rate(step, steps)
                optimizer.zero_grad()
                losses.append(gradients(model, instances))
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                if not math.isfinite(losses[-1] + float(norm)):
                    raise UsageError(f"{architecture}: the loss is no number after {step} steps; give a smaller --lr")
                optimizer.step()
                step, done, read = step + 1, done + len(instances), read + sum(len(i.tokens) for i in instances)
                progress(done, settings.epochs * len(known))
    return model.eval(), sum(losses) / len(losses), read


@torch.inference_mode()
def predictions(model: torch.nn.Module, instances: Sequence[Instance]) -> Iterator[Array]:
    """Distributions `[tokens, VOCABULARY]` of the next token, an instance after the other."""
    for first in range(0, len(instances), _PIECE):
        part = instances[first : first + _PIECE]
        logits = model(input_ids=torch.from_numpy(batch(part)[0])).logits
        for one, rows in zip(part, logits, strict=True):
            yield rows[: len(one.tokens)].double().softmax(-1).numpy()


def run(
    architectures: Sequence[str],
    counts: Sequence[int],
    seeds: Sequence[int],
    settings: Settings,
    path: Path | None = None,
    bar: Bar = lambda label: nullcontext(lambda done, total: None),
) -> Report:
    """Every architecture on every number of automata with every seed, those in the file excepted. bar: shows the
    instances read. Raises UsageError and what JsonLines does."""
    if unknown := [a for a in architectures if a not in ARCHITECTURES]:
        raise UsageError(f"architecture '{unknown[0]}': choose from {', '.join(ARCHITECTURES)}")
    keys = [(a, n, s) for n in counts for s in seeds for a in architectures]
    with ResultFile(path, settings) as file:
        test, validation = held_out(settings)
        for name, predict in BASELINES.items():
            if name not in file.baselines:
                with bar(name) as progress:
                    file.add_baseline(name, measure(_predicted(predict, test, settings.sizes, progress), test))
        for key in keys:
            if key not in file.runs:
                with bar(f"{ARCHITECTURES[key[0]]}, {key[1]} automata, seed {key[2]}") as progress:
                    file.add(_trained(*key, settings, test, validation, progress))
        return Report(settings, tuple(file.runs[key] for key in keys), dict(file.baselines))


def _predicted(
    predict: Callable[[Instance, Sizes], Array], instances: Sequence[Instance], sizes: Sizes, progress: Progress
) -> Iterator[Array]:
    for done, one in enumerate(instances):
        progress(done, len(instances))
        yield predict(one, sizes)


def _trained(
    architecture: str,
    count: int,
    seed: int,
    settings: Settings,
    test: Sequence[Instance],
    validation: Sequence[Instance],
    progress: Progress,
) -> Run:
    known = training_automata(settings, count, seed)
    begin = time.perf_counter()
    model, loss, tokens = train(architecture, known, settings, seed, progress)
    seconds = time.perf_counter() - begin
    return Run(
        architecture,
        count,
        seed,
        measure(predictions(model, test), test),
        measure(predictions(model, validation), validation),
        loss,
        sum(p.numel() for p in model.parameters()),
        tokens,
        seconds,
    )


def plot(report: Report, path: Path) -> None:
    """Accuracy and TVD by the number of automata: the mean over seeds with the range around it; baselines dashed.
    Raises UsageError if matplotlib is not installed, StorageError."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5))
    counts = sorted({one.automata for one in report.runs})
    for axis, name in zip(axes, ("accuracy", "tvd"), strict=True):
        for i, architecture in enumerate(dict.fromkeys(one.architecture for one in report.runs)):
            points = sorted(of_seeds(report, architecture, name).items())
            x = [count for count, _ in points]
            axis.plot(x, [sum(v) / len(v) for _, v in points], "os"[i], ls="-", label=ARCHITECTURES[architecture])
            axis.fill_between(x, [min(v) for _, v in points], [max(v) for _, v in points], alpha=0.2)
        for i, (baseline, values) in enumerate(report.baselines.items()):
            axis.axhline(getattr(values, name), color="grey", ls=("-.", "--", ":")[i], lw=1, label=baseline)
        axis.set(xscale="log", ylim=(0, 1), xlabel="automata in training", ylabel=name.replace("tvd", "TVD"))
        axis.set_xticks(counts, [f"{count:,}" for count in counts])
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=8)
    save_figure(pyplot, figure, path)


def of_seeds(report: Report, architecture: str, name: str) -> dict[int, list[float]]:
    """A measure on the test half of every seed, by the number of automata."""
    found: dict[int, list[float]] = {}
    for one in report.runs:
        if one.architecture == architecture:
            found.setdefault(one.automata, []).append(getattr(one.test, name))
    return found
