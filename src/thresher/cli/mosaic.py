import typer

from thresher.cli.mosaic_icl import icl
from thresher.cli.mosaic_inspect import inspect
from thresher.cli.mosaic_moons import moons
from thresher.cli.mosaic_train import text, train
from thresher.cli.options import with_options

mosaic = typer.Typer(help="Memory Mosaics: train networks of associative memories, and see what they do.")

for command in (train, inspect, moons, icl, text):
    mosaic.command()(with_options(command))
