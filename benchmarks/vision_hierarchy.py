"""Networks taken apart by meaning: do classes follow WordNet, before and after tuning, and what do the parts cost?

python benchmarks/vision_hierarchy.py --out trees [--data fashion-animals,fashion-mnist] [--nets resnet] [--seeds 0,1,2]

For each data set, net and seed: a teacher; the teacher tuned to WordNet in each way, and to a WordNet whose classes
changed places (which must not help); how groups of each network, by impact, follow WordNet at several counts; then the
network taken apart as it is and as it is tuned, and three classes extracted. Every step is kept as it ends (a line of
results.jsonl, checkpoints beside it), and the same command goes on; several processes may share a folder if their
seeds, nets or data differ. At the end a table.
"""

import argparse
import json
import shutil
import statistics
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import mannwhitneyu

from thresher.vision import Finetuning, load_classifier, load_splits
from thresher.vision.data import Splits, select
from thresher.vision.extraction import extract
from thresher.vision.finetune import PRECISIONS, accuracy, predict
from thresher.vision.grouping import Semantics, coherence, read_semantics
from thresher.vision.hierarchy import random_tree
from thresher.vision.hsd import DISSECTED, TUNE_TREE, TUNING, Follow, follow_taxonomy, make_hierarchy, visual_tree
from thresher.vision.impact import measure_impact
from thresher.vision.models import DESCRIPTION, Classifier, new_classifier
from thresher.vision.pipeline import train
from thresher.vision.prune import channel_groups, find_head, masked

FOLLOWS = {"none": 0.0, "align": 10.0, "labels": 0.2, "levels": 0.5, "align to a random tree": 10.0}
COUNTS = (3, 4, 5, 6, 8)
EXTRACTED = {"fashion-animals": ("Sneaker", "dog", "Bag"), "fashion-mnist": ("Sneaker", "Dress", "Bag")}


def shuffled(semantics: Semantics, seed: int) -> Semantics:
    """The same tree and similarities, of classes that changed places."""
    tree = random_tree(semantics.tree, np.random.default_rng(seed))
    order = np.random.default_rng(seed).permutation(semantics.tree.classes)  # as random_tree draws it
    place = np.argsort(order)
    return replace(semantics, tree=tree, wu_palmer=semantics.wu_palmer[np.ix_(place, place)])


def tuned(
    teacher: Classifier, data: Splits, semantics: Semantics, name: str, learn: Finetuning, folder: Path
) -> Classifier:
    if name == "none":
        return teacher
    meaning = shuffled(semantics, learn.seed) if "random" in name else semantics
    method = name.split()[0]
    return follow_taxonomy(teacher, data, meaning, Follow(method, FOLLOWS[name], tune=learn), folder)


def rank_test(classifier: Classifier, data: Splits, share: float = 0.1) -> dict[str, float]:
    """How much each class loses when the filters with the most impact on a class are masked: its own loss against the
    others' (Mann-Whitney, one-sided)."""
    module, count = classifier.module, len(classifier.about.classes)
    groups, _ = channel_groups(module, classifier.example, find_head(module, classifier.example, count))
    impact = measure_impact(module, groups, select(data.train, range(count), 100))
    labels = data.validation.labels

    def right() -> torch.Tensor:
        good = (predict(module, data.validation).argmax(1) == labels).double()
        return torch.stack([good[labels == c].mean() for c in range(count)])

    whole = right()
    own, others = [], []
    for c in range(count):
        kept = {}
        for g in groups:
            least = impact.vectors(g.name)[c].argsort()
            kept[g.name] = least[: g.channels - max(1, round(share * g.channels))].sort().values
        with masked(module, groups, kept):
            lost = whole - right()
        own.append(float(lost[c]))
        others += [float(x) for i, x in enumerate(lost) if i != c]
    p = mannwhitneyu(own, others, alternative="greater").pvalue
    return {"own": statistics.mean(own), "others": statistics.mean(others), "p": float(p)}


def run(arguments: argparse.Namespace) -> None:
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    known = (json.loads(line)["run"] for line in results.read_text().splitlines()) if results.exists() else ()
    done = {json.dumps(name) for name in known}

    def missing(name: dict) -> bool:
        return json.dumps(name) not in done

    def note(name: dict, found: dict) -> None:
        with results.open("a") as file:
            file.write(json.dumps({"run": name, **found}) + "\n")
        print(json.dumps({"run": name, **found})[:400], flush=True)

    for source in arguments.data:
        data = load_splits(source)
        semantics = read_semantics(data.train.classes)
        for net in arguments.nets:
            for seed in arguments.seeds:
                folder = out / f"{source}-{net}-{seed}"
                base = {"data": source, "net": net, "seed": seed}
                learn = Finetuning("soft", 3, lr=0.05, seed=seed, precision=arguments.precision)
                fresh = new_classifier(net, data.train.classes, (1, 28, 28), seed)
                if missing(base | {"step": "impact, untrained"}):
                    note(base | {"step": "impact, untrained"}, rank_test(fresh, data))
                if not (folder / DESCRIPTION).is_file():
                    train(
                        fresh, data, replace(learn, objective="cross-entropy", epochs=arguments.epochs, lr=0.1), folder
                    )
                teacher = load_classifier(str(folder))
                if missing(base | {"step": "impact"}):
                    note(base | {"step": "impact"}, rank_test(teacher, data))
                for name in arguments.follows:
                    if not missing(base | {"step": name}):
                        continue
                    model = tuned(teacher, data, semantics, name, learn, folder / name)
                    tree = visual_tree(model, data.train, data.validation)
                    counts = {str(k): asdict(coherence(tree, semantics, k)) for k in COUNTS}
                    own = {str(k): asdict(coherence(semantics.tree, semantics, k)) for k in COUNTS}
                    right = accuracy(model.module, data.test)
                    note(base | {"step": name}, {"accuracy": right, "groups": counts, "wordnet": own})
                for name in arguments.trees:
                    follow = Follow(name, FOLLOWS[name], tune=learn) if name != "none" else None
                    trees = [folder / f"tree-{name}-{loss}" for loss in arguments.losses]
                    for loss, made in zip(arguments.losses, trees, strict=True):
                        if not missing(base | {"step": f"tree, {name}, {loss}"}):
                            continue
                        if (folder / name).is_dir():  # tuned in the same way above
                            shutil.copytree(folder / name, made / TUNING, dirs_exist_ok=True)
                        if made != trees[0] and (trees[0] / DISSECTED).is_dir():
                            shutil.copytree(trees[0] / DISSECTED, made / DISSECTED, dirs_exist_ok=True)
                        tune = replace(learn, objective=loss, epochs=arguments.tuning)
                        found = make_hierarchy(teacher, data, semantics, made, tune=tune, follow=follow, groups=5)
                        note(base | {"step": f"tree, {name}, {loss}"}, found.summary())
                    if missing(base | {"step": f"extract, {name}"}):
                        few = folder / f"few-{name}"
                        _, leaf = extract(trees[0], EXTRACTED[source], few, data, tune=replace(learn, epochs=8))
                        assert leaf is not None
                        note(base | {"step": f"extract, {name}"}, asdict(leaf))


def table(results: Path) -> None:
    groups: dict[tuple, list[dict]] = {}
    for row in map(json.loads, results.read_text().splitlines()):
        groups.setdefault((row["run"]["data"], row["run"]["net"], row["run"]["step"]), []).append(row)

    def spread(values: list[float], scale: float = 1.0, digits: int = 3) -> str:
        numbers = [scale * v for v in values]
        return f"{statistics.mean(numbers):.{digits}f} ({min(numbers):.{digits}f} to {max(numbers):.{digits}f})"

    for (source, net, step), rows in sorted(groups.items()):
        said = f"{source}, {net}, {step}, {len(rows)} seeds: "
        if step.startswith("impact"):
            print(
                said + "; ".join(f"{key} {spread([r[key] for r in rows], digits=4)}" for key in ("own", "others", "p"))
            )
        elif step.startswith("tree"):
            uses = []
            for use in rows[0]["accuracy"]:
                right = [r["accuracy"][use]["mean"] for r in rows]
                less = statistics.mean(r - row["accuracy"]["whole"]["mean"] for r, row in zip(right, rows, strict=True))
                uses.append(f"{use} {spread(right, 100, 2)}, {100 * less:+.2f}")
                if use in rows[0]["costs"]["macs"]:
                    shares = [r["costs"]["macs"][use] / r["costs"]["macs"]["whole"] for r in rows]
                    uses[-1] += f", at {spread(shares, 100, 1)} % of the FLOPs"
            print(said + "; ".join(uses))
            for row in rows:
                for leaf in row["leaves"]:
                    print(f"  seed {row['run']['seed']} {leaf_line(leaf)}")
        elif step.startswith("extract"):
            for row in rows:
                print(f"{said} seed {row['run']['seed']} {leaf_line(row)}")
        else:
            print(said + f"accuracy {spread([r['accuracy'] for r in rows], 100, 2)}; cophenetic "
                  f"{spread([r['groups']['5']['cophenetic'] for r in rows])}")  # fmt: skip
            for k in map(str, COUNTS):
                cells = []
                for measure in ("wu_palmer", "lin"):
                    found = [r["groups"][k][measure] for r in rows]
                    own = rows[0]["wordnet"][k][measure]["value"]
                    worst = max(f["p"] for f in found)
                    cells.append(
                        f"{measure} {spread([f['value'] for f in found])}, WordNet {own:.3f}, p up to {worst:.2g}"
                    )
                print(f"  {k} groups: " + "; ".join(cells))


def leaf_line(leaf: dict) -> str:
    times = ", ".join(f"{100 * less / whole:.0f} % of the time of {b}" for b, (whole, less) in leaf["seconds"].items())
    return (
        f"{leaf['name']} ({', '.join(leaf['classes'])}): {100 * leaf['accuracy']['mean']:.2f}, whole "
        f"{100 * leaf['whole']['mean']:.2f}; {100 * leaf['flops']:.0f} % of FLOPs, {100 * leaf['parameters']:.0f} % of "
        f"parameters, {times}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=lambda s: s.split(","), default=["fashion-animals", "fashion-mnist"])
    parser.add_argument("--nets", type=lambda s: s.split(","), default=["resnet"])
    parser.add_argument("--seeds", type=lambda s: [int(i) for i in s.split(",")], default=[0, 1, 2])
    parser.add_argument("--trees", type=lambda s: s.split(","), default=["none", "align"])
    parser.add_argument("--follows", type=lambda s: s.split(","), default=list(FOLLOWS), help="ways to tune")
    parser.add_argument("--epochs", type=int, default=12, help="of the teacher")
    parser.add_argument(
        "--tuning", type=int, default=8, help="epochs of the tree and its routers; leaves: twice as many"
    )
    parser.add_argument(
        "--losses", type=lambda s: s.split(","), default=[TUNE_TREE.objective], help="that trees learn from"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--table", action="store_true", help="print what there is, and run nothing")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if not given.table:
        run(given)
    table(given.out / "results.jsonl")
