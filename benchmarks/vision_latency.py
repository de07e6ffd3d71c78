"""How much of the counted saving is real: ResNet-18 at 224 x 224, decomposed, against itself in the same runtime.

    python benchmarks/vision_latency.py [--threads 2] [--batches 1,8]

Weights are random, which changes no time: there are none trained for ImageNet on PyPI. Both nets are folded; torch runs
channels last; runs take turns, medians. Share real: (1 - time ratio) / (1 - FLOP ratio). Error: mean squared
relative error of the weights of all layers, what ranks driven by time have to lower at the time of equal ratios.
"""

import argparse

import torch

from thresher.vision import Classifier, Compression, Target
from thresher.vision.compress import Compressed, compress, fold, runner
from thresher.vision.latency import RUNTIMES, time_in_turns
from thresher.vision.models import new_classifier

ALIGNED = "equal, multiples of 16"


def whole() -> Classifier:
    classifier = new_classifier("resnet18", tuple(map(str, range(1000))), (3, 224, 224))
    with torch.no_grad():
        for module in classifier.module.modules():
            if isinstance(module, torch.nn.Conv2d):  # a spectrum that falls, as trained weights have
                for dim in (0, 1):
                    size = module.weight.shape[dim]
                    fall = torch.arange(1, size + 1)[torch.randperm(size)] ** -0.5
                    module.weight *= fall.view(-1, *[1] * 3) if dim == 0 else fall.view(1, -1, 1, 1)
    classifier.module.eval()
    return classifier


def error(made: Compressed) -> float:
    open_layers = [r for r in made.layers if r.kind != "kept" or r.reason == "whole is best"]
    return sum(r.error**2 for r in open_layers) / len(open_layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batches", type=lambda s: [int(x) for x in s.split(",")], default=[1, 8])
    parser.add_argument("--seconds", type=float, default=12.0, help="of each comparison")
    parser.add_argument("--shares", type=lambda s: [float(x) for x in s.split(",")], default=[0.5])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    teacher = whole()
    print(f"{given.threads} threads", flush=True)
    for share in given.shares:
        nets = {"whole": fold(teacher)}
        made = {}
        for name, settings in (
            ("equal, multiples of 1", Compression(Target(share), "equal", multiple=1)),
            (ALIGNED, Compression(Target(share), "equal", multiple=16)),
            ("by error, multiples of 16", Compression(Target(share), multiple=16)),
        ):
            made[name] = compress(teacher, settings)
            nets[name] = fold(made[name].classifier)
        for batch in given.batches:
            first = compare(nets, made, batch, given)
            for runtime in RUNTIMES:  # at the time of equal ratios
                driven = compress(
                    teacher, Compression(Target(first[runtime][ALIGNED], "latency", batch, runtime), multiple=16)
                )
                name = f"by time in {runtime}"
                some = {k: nets[k] for k in ("whole", ALIGNED)} | {name: fold(driven.classifier)}
                compare(some, made | {name: driven}, batch, given, (runtime,))


def compare(
    nets: dict[str, Classifier],
    made: dict[str, Compressed],
    batch: int,
    given: argparse.Namespace,
    runtimes: tuple[str, ...] = RUNTIMES,
) -> dict[str, dict[str, float]]:
    """Prints, and returns the time ratios by runtime."""
    ratios: dict[str, dict[str, float]] = {}
    for runtime in runtimes:
        runs = [runner(c, batch, runtime) for c in nets.values()]
        times = dict(zip(nets, time_in_turns(runs, given.seconds), strict=True))
        print(f"{runtime}, batch {batch}: whole {1000 * times['whole']:.1f} ms", flush=True)
        ratios[runtime] = {name: t / times["whole"] for name, t in times.items() if name != "whole"}
        for name, ratio in ratios[runtime].items():
            flops = made[name].shares["flops"]
            real = 100 * (1 - ratio) / (1 - flops)
            said = f"FLOPs {flops:.3f}, time {ratio:.3f}, share real {real:.0f} %, error {error(made[name]):.4f}"
            print(f"  {name}: {said}", flush=True)
    return ratios


if __name__ == "__main__":
    main()
