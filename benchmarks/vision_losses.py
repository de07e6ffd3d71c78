"""Which loss brings a decomposed CNN back: Fashion-MNIST, two nets, shares of the FLOPs, losses, seeds.

    python benchmarks/vision_losses.py --out losses [--nets resnet,vgg] [--seeds 0,1,2] [--shares 0.5,0.3] ...

Every run is kept as it ends (a line of results.jsonl, checkpoints beside it), and the same command goes on; several
processes may share a folder if their seeds or nets differ. At the end: accuracy of all 10,000 test images and robust
accuracy of 500 under PGD-20 from one start, mean and range over seeds, of the teacher, after decomposition, and after
each loss; and how far each is from plain cross-entropy. `--autoattack 200` afterwards attacks the same networks with
AutoAttack's standard set.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from thresher.vision import Compression, Finetuning, Target, load_classifier, load_splits
from thresher.vision.attacks import ATTACKS, Attack, evaluate
from thresher.vision.compress import compress
from thresher.vision.data import Splits
from thresher.vision.finetune import PRECISIONS, accuracy, finetune
from thresher.vision.layers import count_macs, count_parameters
from thresher.vision.losses import OBJECTIVES
from thresher.vision.models import DESCRIPTION, Classifier, new_classifier, save_classifier
from thresher.vision.pipeline import train

LOSSES = ("cross-entropy", "logits", "soft", "hint", "attention", "similarity", "relation", "mixed")
EPSILONS = (0.02, 0.05)
PGD = Attack("pgd20 once", "pgd", 20, 1)
Named = tuple[dict[str, Any], Classifier, dict[str, Any]]  # of a run: its name, the network, what else there is to say


def measure(classifier: Classifier, data: Splits, images: int) -> dict[str, float]:
    """Accuracy and PGD-20; with `images`, AutoAttack on so many instead, at the lesser epsilon."""
    test = data.test
    step = len(test) // images if images else 20
    pixels, labels = test.pixels[::step].float() / 255, test.labels[::step]
    if images:
        found = evaluate(classifier.module, pixels, labels, [ATTACKS["autoattack"]], EPSILONS[:1], batch=250)
        return {f"autoattack {o.epsilon}": o.accuracy.mean for o in found.outcomes}
    found = evaluate(classifier.module, pixels, labels, [PGD], EPSILONS, batch=250)
    return {"accuracy": accuracy(classifier.module, test)} | {
        f"pgd {o.epsilon}": o.accuracy.mean for o in found.outcomes
    }


def networks(arguments: argparse.Namespace, data: Splits, wanted: Callable[[dict], bool]) -> Iterator[Named]:
    """Each that is wanted, made or (if it was made before) read."""
    for seed in arguments.seeds:
        for net in arguments.nets:
            folder = arguments.out / f"{net}-{seed}"
            if not (folder / DESCRIPTION).is_file():
                fresh = new_classifier(net, data.train.classes, (1, 28, 28), seed)
                learn = Finetuning("cross-entropy", arguments.epochs, lr=0.1, seed=seed, precision=arguments.precision)
                train(fresh, data, learn, folder)
            teacher = load_classifier(str(folder))
            name = {"net": net, "seed": seed, "share": 1.0, "loss": "teacher", "lr": 0.0}
            if wanted(name):
                yield name, teacher, {}
            for share in arguments.shares:
                kept = folder / f"{share}-none"
                if not (kept / DESCRIPTION).is_file():
                    save_classifier(compress(teacher, Compression(Target(share)), data.train).classifier, kept)
                made = load_classifier(str(kept))
                name = {"net": net, "seed": seed, "share": share, "loss": "none", "lr": 0.0}
                if wanted(name):
                    yield name, made, {"shares": shares(teacher, made)}
                for loss in arguments.losses:
                    for lr in arguments.lrs:
                        name = {"net": net, "seed": seed, "share": share, "loss": loss, "lr": lr}
                        if not wanted(name):
                            continue
                        student = load_classifier(str(kept))
                        settings = Finetuning(loss, arguments.tuning, lr=lr, seed=seed, precision=arguments.precision)
                        curve = finetune(
                            student.module,
                            data.train,
                            data.validation,
                            settings,
                            teacher.module,
                            list(made.about.ranks),
                            folder / f"{share}-{loss}-{lr}",
                        )
                        yield name, student, {"seconds": curve[-1].seconds}


def shares(whole: Classifier, made: Classifier) -> dict[str, float]:
    """Of the whole's FLOPs and parameters, what is left."""
    return {
        "flops": count_macs(made.module, made.example) / count_macs(whole.module, whole.example),
        "parameters": count_parameters(made.module) / count_parameters(whole.module),
    }


def run(arguments: argparse.Namespace, results: Path) -> None:
    data = load_splits("fashion-mnist")
    arguments.out.mkdir(parents=True, exist_ok=True)
    known = [json.loads(line)["run"] for line in results.read_text().splitlines()] if results.exists() else []
    for name, classifier, more in networks(arguments, data, lambda name: name not in known):
        found = {"run": name, **measure(classifier, data, arguments.autoattack), **more}
        with results.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(json.dumps(found), flush=True)


def table(results: Path) -> None:
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        r = row["run"]
        groups.setdefault((r["net"], r["share"], r["loss"], r["lr"]), []).append(row)
    columns = [name for name in rows[0] if name not in ("run", "shares", "seconds")]
    print("net, share, loss, lr, seeds: mean (range) of " + ", ".join(columns) + "; difference from cross-entropy")
    for (net, share, loss, lr), own in sorted(groups.items(), key=lambda g: (g[0][0], -g[0][1])):
        plain = {r["run"]["seed"]: r for r in groups.get((net, share, "cross-entropy", lr), [])}
        cells = []
        for column in columns:
            values = [100 * r[column] for r in own]
            text = f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"
            pairs = [100 * (r[column] - plain[r["run"]["seed"]][column]) for r in own if r["run"]["seed"] in plain]
            if pairs and loss not in ("teacher", "none", "cross-entropy"):
                text += f" {statistics.mean(pairs):+.2f}"
            cells.append(text)
        print(f"{net}, {share}, {loss}, {lr}, {len(own)}: " + "; ".join(cells))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--nets", type=lambda s: s.split(","), default=["resnet", "vgg"])
    parser.add_argument("--seeds", type=lambda s: [int(i) for i in s.split(",")], default=[0, 1, 2])
    parser.add_argument("--shares", type=lambda s: [float(x) for x in s.split(",")], default=[0.5, 0.3])
    parser.add_argument("--losses", type=lambda s: s.split(","), default=list(LOSSES))
    parser.add_argument("--lrs", type=lambda s: [float(x) for x in s.split(",")], default=[0.01])
    parser.add_argument("--epochs", type=int, default=8, help="of the teacher")
    parser.add_argument("--tuning", type=int, default=2, help="epochs of a student")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--autoattack", type=int, default=0, metavar="IMAGES", help="on so many, instead of PGD-20")
    parser.add_argument("--table", action="store_true", help="print what there is, and run nothing")
    given = parser.parse_args()
    unknown = set(given.losses) - set(OBJECTIVES)
    if unknown:
        parser.error(f"unknown losses: {', '.join(unknown)}")
    torch.set_num_threads(given.threads)
    kept = given.out / ("autoattack.jsonl" if given.autoattack else "results.jsonl")
    if not given.table:
        run(given, kept)
    table(kept)
