"""Alters the header of a tiny GGUF file at random; anything but ModelError from the check is a fault.

python tests/fuzz/gguf_fuzz.py --count 100000
"""

import argparse
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from models import tiny_gguf
from thresher.errors import ModelError
from thresher.models.gguf_header import check_header

BYTES = [0, 1, 8, 9, 127, 128, 255]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    accepted, worst = 0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
        content = tiny_gguf.write(path).read_bytes()
        end = min(info.begin for info in check_header(path).tensors)
        for _ in range(options.count):
            mutant = bytearray(content)
            for _ in range(draw.randint(1, 4)):
                mutant[draw.randrange(end)] = draw.choice([*BYTES, draw.randrange(256)])
            if draw.random() < 0.1:
                del mutant[draw.randrange(len(mutant)) :]
            path.write_bytes(mutant)
            begin = time.perf_counter()
            try:
                check_header(path)
                accepted += 1
            except ModelError:
                pass
            worst = max(worst, time.perf_counter() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{options.count} files, {accepted} accepted; worst {1000 * worst:.1f} ms; peak memory {peak:.0f} MiB")


if __name__ == "__main__":
    main()
