import typer

from thresher.cli.options import with_options
from thresher.cli.vision_attack import attack
from thresher.cli.vision_extract import extract
from thresher.cli.vision_hierarchy import hierarchy
from thresher.cli.vision_report import report
from thresher.cli.vision_train import train
from thresher.cli.vision_tucker import tucker

vision = typer.Typer(
    help="Compress image classifiers or take them apart, and prove what is left: accuracy, robustness, time."
)

for command in (train, tucker, hierarchy, extract, attack, report):
    vision.command()(with_options(command))
