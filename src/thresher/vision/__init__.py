"""Compressed CNNs: Tucker decomposition tuned by distillation, held against adversarial attacks.

`tucker` makes a smaller model, `attack` says how it stands up, `write_report` puts both on a page; models come from
`load_classifier`, images from `load_splits`. Images are [N, C, H, W] in [0, 1] everywhere.
"""

from thresher.vision.compress import Settings as Compression
from thresher.vision.data import Images, Splits, images_of, load_splits
from thresher.vision.finetune import Settings as Finetuning
from thresher.vision.models import Classifier, load_classifier, save_classifier
from thresher.vision.pipeline import tucker
from thresher.vision.ranks import Target
from thresher.vision.report import write_report
from thresher.vision.robustness import attack

__all__ = [
    "Classifier",
    "Compression",
    "Finetuning",
    "Images",
    "Splits",
    "Target",
    "attack",
    "images_of",
    "load_classifier",
    "load_splits",
    "save_classifier",
    "tucker",
    "write_report",
]
