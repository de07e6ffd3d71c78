"""Compressed CNNs: Tucker decomposition tuned by distillation, held against adversarial attacks; and CNNs taken apart
along a tree of their classes.

`tucker` makes a smaller model, `attack` says how it stands up, `write_report` puts both on a page; `make_hierarchy`
makes a tree of sub-networks, `extract` one for a few classes, `write_tree_report` their page. Models come from
`load_classifier`, images from `load_splits`. Images are [N, C, H, W] in [0, 1] everywhere.
"""

from thresher.vision.compress import Settings as Compression
from thresher.vision.data import Images, Splits, images_of, load_splits
from thresher.vision.dissect import Settings as Dissection
from thresher.vision.dissected import load_dissected
from thresher.vision.extraction import extract
from thresher.vision.finetune import Settings as Finetuning
from thresher.vision.grouping import read_semantics
from thresher.vision.hsd import Follow, make_hierarchy
from thresher.vision.models import Classifier, load_classifier, save_classifier
from thresher.vision.pipeline import tucker
from thresher.vision.ranks import Target
from thresher.vision.report import write_report
from thresher.vision.robustness import attack
from thresher.vision.tree_report import write_tree_report

__all__ = [
    "Classifier",
    "Compression",
    "Dissection",
    "Finetuning",
    "Follow",
    "Images",
    "Splits",
    "Target",
    "attack",
    "extract",
    "images_of",
    "load_classifier",
    "load_dissected",
    "load_splits",
    "make_hierarchy",
    "read_semantics",
    "save_classifier",
    "tucker",
    "write_report",
    "write_tree_report",
]
