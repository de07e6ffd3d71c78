"""Alters the header of a tiny GGUF file at random; anything but ThresherError from reading it is a fault.

python tests/fuzz/gguf_fuzz.py --count 100000
python tests/fuzz/gguf_fuzz.py --count 500 --convert
"""

import argparse
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
from models import tiny_gguf
from thresher.errors import ModelError, ThresherError
from thresher.models.gguf_header import check_header
from thresher.models.gguf_import import import_gguf

BYTES = [0, 1, 8, 9, 127, 128, 255]
NUMBERS = [0, 1, 2, 31, 255, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 63, (1 << 64) - 1]


@dataclass(frozen=True)
class Result:
    """`grown_bytes`: of the memory of the process, at its peak, over what it was before."""

    files: int
    accepted: int
    worst_seconds: float
    grown_bytes: int
    file_bytes: int


def mutant(content, end, draw):
    """`content` with one to four changes before `end`: bytes, numbers of eight bytes, spans that move or go, a cut."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at, kind = draw.randrange(end), draw.random()
        if kind < 0.5:
            changed[at] = draw.choice([*BYTES, draw.randrange(256)])
        elif kind < 0.8:
            changed[at : at + 8] = struct.pack("<Q", draw.choice(NUMBERS))
        elif kind < 0.9:
            span = changed[at : at + draw.randint(1, 64)]
            changed[draw.randrange(end) :][: len(span)] = span
        else:
            del changed[at : at + draw.randint(1, 16)]
    if draw.random() < 0.1:
        del changed[draw.randrange(len(changed)) :]
    return changed


def run(folder, count, seconds, seed=0, convert=False):
    """`count` files or as many as `seconds` allow; with `convert` those whose header is accepted are converted too,
    and `accepted` are the ones that become a model."""
    draw = random.Random(seed)
    path = Path(folder) / "x.gguf"
    content = tiny_gguf.write(path).read_bytes()
    end = min(info.begin for info in check_header(path).tensors)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    stop = time.perf_counter() + seconds
    files, accepted, worst = 0, 0, 0.0
    while files < count and time.perf_counter() < stop:
        path.write_bytes(mutant(content, end, draw))
        files += 1
        begin = time.perf_counter()
        try:
            check_header(path)
            worst = max(worst, time.perf_counter() - begin)
            if convert:
                import_gguf(path, "x", Path(folder) / "cache", lambda message: None)
            accepted += 1
        except ModelError:
            pass
        except ThresherError:
            if not convert:
                raise
        worst = max(worst, 0.0 if convert else time.perf_counter() - begin)
        shutil.rmtree(Path(folder) / "cache", ignore_errors=True)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return Result(files, accepted, worst, 1024 * grown, len(content))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--convert", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run(folder, options.count, options.seconds, options.seed, options.convert)
    print(
        f"{found.files} files of {found.file_bytes} bytes, {found.accepted} accepted; "
        f"worst {1000 * found.worst_seconds:.1f} ms; memory grew by {found.grown_bytes / 2**20:.1f} MiB"
    )


if __name__ == "__main__":
    main()
