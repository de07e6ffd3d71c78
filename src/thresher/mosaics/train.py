"""Train a Memory Mosaic, or a GPT-2 of the same size beside it, on text with transformers' Trainer."""

import csv
import io
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch.utils.data import Dataset, SequentialSampler
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from thresher.errors import ModelError, StorageError, UsageError
from thresher.evaluation.plots import load_pyplot, save_figure
from thresher.files import replaced_text
from thresher.models.mosaic import MemoryMosaicConfig, MemoryMosaicForCausalLM, decay_groups
from thresher.mosaics.corpus import Corpus

ARCHITECTURES = ("mosaic", "mosaic-v2", "gpt")
CHECKPOINTS, CURVE, SUMMARY = "checkpoints", "loss.csv", "training.json"
VALIDATION_BLOCKS = 64  # of the validation text, spread evenly over it

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Settings:
    """What decides the result of a training, beside its text and tokenizer.

    block: tokens of a sequence; batch: sequences of a step, of each device; lr: highest learning rate, reached after
    `warmup` of the steps and left on a cosine down to a tenth. precision: float32 or bf16 (mixed). Raises UsageError.
    """

    arch: str = "mosaic"
    layers: int = 2
    width: int = 128
    heads: int = 4
    block: int = 256
    batch: int = 16
    steps: int = 1000
    lr: float = 1e-3
    warmup: float = 0.1
    decay: float = 0.1
    dropout: float = 0.05
    precision: str = "float32"
    seed: int = 0
    evaluate_every: int = 100

    def __post_init__(self) -> None:
        if self.arch not in ARCHITECTURES:
            raise UsageError(f"--arch {self.arch}: choose one of {', '.join(ARCHITECTURES)}")
        if self.precision not in ("float32", "bf16"):
            raise UsageError(f"--precision {self.precision}: choose float32 or bf16")
        if min(self.layers, self.heads, self.batch, self.steps, self.evaluate_every) < 1 or self.block < 2:
            raise UsageError("layers, heads, batch and steps begin at 1, and a block at 2 tokens")
        if self.width < 1 or self.width % (2 * self.heads):
            raise UsageError(f"a width of {self.width} has no even part for each of {self.heads} heads")
        if not (
            0 < self.lr < math.inf and 0 <= self.decay < math.inf and 0 <= self.dropout < 1 and 0 <= self.warmup < 1
        ):
            raise UsageError("learning rate, decay, dropout or warm-up makes no sense")


# small: nanoGPT's preset for characters. gpt2-small: the paper's.
PRESETS = {
    "tiny": Settings(lr=2e-3),
    "small": Settings(
        layers=6, width=384, heads=6, batch=64, steps=5000, lr=1e-3, warmup=0.02, dropout=0.2, evaluate_every=250
    ),
    "gpt2-small": Settings(
        layers=12, width=768, heads=12, block=512, batch=512, steps=80000, lr=5e-3, warmup=0.025, evaluate_every=500
    ),
}


@dataclass(frozen=True)
class Point:
    """Of the loss curve, nats a token: training, the mean since the point before; validation, on fixed blocks."""

    step: int
    tokens: int
    training: float
    validation: float
    seconds: float


@dataclass(frozen=True)
class Result:
    """A training that is done. tokens_per_second: of training, without evaluations."""

    settings: Settings
    parameters: int
    curve: list[Point]
    tokens_per_second: float

    @property
    def validation(self) -> float:
        """The last validation loss, nats a token."""
        return self.curve[-1].validation


class Blocks(Dataset[dict[str, torch.Tensor]]):
    """Random blocks of a text: block i depends on the seed and i alone, so that a training that goes on after a cut
    sees what it would have seen."""

    def __init__(self, ids: torch.Tensor, block: int, count: int, seed: int) -> None:
        self.ids, self.block, self.count, self.seed = ids, block, count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        at = int(np.random.default_rng([self.seed, i]).integers(len(self.ids) - self.block + 1))
        ids = self.ids[at : at + self.block].long()
        return {"input_ids": ids, "labels": ids}


def make_model(settings: Settings, vocab_size: int, eos_token_id: int | None = None) -> Any:
    """A fresh model; the seed decides its weights."""
    torch.manual_seed(settings.seed)
    if settings.arch == "gpt":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocab_size,
                n_positions=settings.block,
                n_embd=settings.width,
                n_layer=settings.layers,
                n_head=settings.heads,
                resid_pdrop=settings.dropout,
                embd_pdrop=settings.dropout,
                attn_pdrop=settings.dropout,
                bos_token_id=eos_token_id,
                eos_token_id=eos_token_id,
                loss_type="ForCausalLM",
            )
        )
    make = MemoryMosaicConfig if settings.arch == "mosaic" else MemoryMosaicConfig.v2
    return MemoryMosaicForCausalLM(
        make(
            vocab_size=vocab_size,
            hidden_size=settings.width,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            dropout=settings.dropout,
            trained_length=settings.block,
            eos_token_id=eos_token_id,
        )
    )


@torch.no_grad()
def mean_loss(model: Any, ids: torch.Tensor, block: int, blocks: int = VALIDATION_BLOCKS) -> float:
    """Nats a token over up to `blocks` blocks spread evenly over a text."""
    count = min(blocks, max(1, len(ids) // block))
    starts = [i * (len(ids) - block) // max(1, count - 1) if count > 1 else 0 for i in range(count)]
    was_training = model.training
    model.eval()
    losses: list[float] = []
    for piece in torch.split(torch.tensor(starts), 8):
        batch = torch.stack([ids[at : at + block] for at in piece.tolist()]).long()
        losses.append(model(input_ids=batch, labels=batch, use_cache=False).loss.item() * len(piece))
    model.train(was_training)
    return sum(losses) / count


class _Curve(TrainerCallback):  # type: ignore[misc]
    """Evaluates now and then, notes the curve beside the model, and says how far it is."""

    def __init__(
        self, settings: Settings, corpus: Corpus, folder: Path, points: list[Point], progress: Progress
    ) -> None:
        self.settings, self.corpus, self.folder, self.points, self.progress = settings, corpus, folder, points, progress
        self.losses: list[float] = []
        self.begun = time.perf_counter()
        self.before = points[-1].seconds if points else 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.progress(state.global_step, self.settings.steps)
        if state.global_step % self.settings.evaluate_every and state.global_step < self.settings.steps:
            return
        seconds = self.before + time.perf_counter() - self.begun
        validation = mean_loss(model, self.corpus.validation, self.settings.block)
        tokens = state.global_step * self.settings.batch * self.settings.block * args.world_size
        training = sum(self.losses) / max(1, len(self.losses))
        self.points.append(Point(state.global_step, tokens, training, validation, seconds))
        self.losses.clear()
        if state.is_world_process_zero:
            write_curve(self.points, self.folder / CURVE)
        self.before, self.begun = seconds, time.perf_counter()  # evaluations do not count
        control.should_save = True


class _Trainer(Trainer):  # type: ignore[misc]
    """Blocks in their order, decay on matrices only, and an end with a word where the loss is no number."""

    curve: _Curve
    optimizer: Any

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return SequentialSampler(self.train_dataset)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        if self.optimizer is None:
            groups = decay_groups(self.model, self.args.weight_decay)
            self.optimizer = torch.optim.AdamW(groups, lr=self.args.learning_rate, betas=(0.9, 0.95))
        return self.optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            kept = get_last_checkpoint(self.args.output_dir)
            where = f"the last good state is in {kept}" if kept else "there is no good state yet"
            raise ModelError(f"the loss is no number at step {self.state.global_step + 1}: {where}; try a lower --lr")
        self.curve.losses.append(loss.item())
        return loss


def train(
    settings: Settings,
    corpus: Corpus,
    tokenizer: Any,
    out: Path,
    resume: bool = True,
    progress: Progress = lambda done, total: None,
) -> Result:
    """Train, and leave a model that transformers and Thresher load in the folder `out`, its loss curve as CSV and its
    settings as JSON. One that was cut goes on behind its last checkpoint, with the losses it would have had.

    Raises UsageError if `out` holds another training, ModelError if the loss becomes no number.
    """
    model = make_model(settings, len(tokenizer), tokenizer.eos_token_id)
    points = _prepare(out, settings, corpus, len(tokenizer), resume)
    checkpoint = get_last_checkpoint(str(out / CHECKPOINTS)) if resume else None
    done = int(Path(checkpoint).name.rpartition("-")[2]) if checkpoint else 0
    points = [p for p in points if p.step <= done]
    if done >= settings.steps and (out / SUMMARY).exists():
        return load_result(out)
    arguments = TrainingArguments(
        output_dir=str(out / CHECKPOINTS),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        learning_rate=settings.lr,
        weight_decay=settings.decay,
        max_grad_norm=1.0,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=round(settings.warmup * settings.steps),
        bf16=settings.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        seed=settings.seed,
        data_seed=settings.seed,
        save_strategy="no",  # the curve asks for it, where it has evaluated
        save_total_limit=2,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
    )
    count = settings.steps * settings.batch * arguments.world_size
    data = Blocks(corpus.training, settings.block, count, settings.seed)
    curve = _Curve(settings, corpus, out, points, progress)
    trainer = _Trainer(model=model, args=arguments, train_dataset=data, callbacks=[curve])
    trainer.curve = curve
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=checkpoint)
    spent = points[-1].seconds
    speed = points[-1].tokens / spent if spent else 0.0
    result = Result(settings, sum(p.numel() for p in model.parameters()), points, speed)
    if trainer.is_world_process_zero():
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        replaced_text(out / SUMMARY, json.dumps(asdict(result), indent=1))
    return result


def load_result(out: Path) -> Result:
    """What `train` noted of a training that is done."""
    found = json.loads((out / SUMMARY).read_text(encoding="utf-8"))
    curve = [Point(**point) for point in found["curve"]]
    return Result(Settings(**found["settings"]), found["parameters"], curve, found["tokens_per_second"])


def write_curve(points: list[Point], path: Path) -> None:
    """The loss curve as CSV, whole or not at all."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(asdict(points[0]))
    writer.writerows(asdict(p).values() for p in points)
    replaced_text(path, text.getvalue())


def plot_curve(curves: dict[str, list[Point]], path: Path) -> None:
    """Training (dotted) and validation loss against tokens, of each training."""
    pyplot = load_pyplot()
    figure, axis = pyplot.subplots(figsize=(7, 4.5))
    for i, (name, points) in enumerate(curves.items()):
        tokens = [p.tokens for p in points]
        axis.plot(tokens, [p.training for p in points], color=f"C{i}", ls=":", label=f"{name}, training")
        axis.plot(tokens, [p.validation for p in points], color=f"C{i}", label=f"{name}, validation")
    axis.set(xlabel="tokens of training", ylabel="loss, nats a token")
    axis.grid(alpha=0.3)
    axis.legend()
    save_figure(pyplot, figure, path)


def read_curve(path: Path) -> list[Point]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [
        Point(int(r["step"]), int(r["tokens"]), float(r["training"]), float(r["validation"]), float(r["seconds"]))
        for r in rows
    ]


def _prepare(out: Path, settings: Settings, corpus: Corpus, vocabulary: int, resume: bool) -> list[Point]:
    """Make the folder, or see that what is there is this training. Returns its curve so far."""
    noted = out / CHECKPOINTS / "settings.json"
    text = xxhash.xxh3_64(corpus.training.numpy().tobytes() + corpus.validation.numpy().tobytes()).hexdigest()
    present = asdict(settings) | {"vocabulary": vocabulary, "text": text}
    if not resume and (out / CHECKPOINTS).exists():
        shutil.rmtree(out / CHECKPOINTS)
    try:
        noted.parent.mkdir(parents=True, exist_ok=True)
        if noted.exists():
            earlier = json.loads(noted.read_text(encoding="utf-8"))
            other = [f"{name} {value}" for name, value in earlier.items() if present.get(name) != value]
            if other:
                raise UsageError(f"{out} holds another training ({', '.join(other)}): give another --out, or --restart")
        replaced_text(noted, json.dumps(present))
    except OSError as error:
        raise StorageError(f"{out}: cannot be written: {error.strerror}") from error
    return read_curve(out / CURVE) if resume and (out / CURVE).exists() else []
