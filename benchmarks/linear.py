"""How fast packed linear layers are, int8 and bf16 beside each other: python benchmarks/linear.py [--rows
1,16,128,512]"""

import argparse
import statistics
import time

import torch

from thresher.kernels.linear import PackedLinear, pack_linear

SHAPES = ((896, 4864), (1536, 8960), (8960, 1536), (1536, 2048))  # inputs, outputs: of Qwen2.5 0.5B and 1.5B


def seconds(packed: PackedLinear, x: torch.Tensor, runs: int = 7) -> float:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        packed(x)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main(rows: list[int]) -> None:
    torch.manual_seed(0)
    for inputs, outputs in SHAPES:
        weight = torch.randn(outputs, inputs)
        packed = {
            name: pack_linear([weight], dtype) for name, dtype in (("int8", torch.int8), ("bf16", torch.bfloat16))
        }
        for count in rows:
            x = torch.randn(count, inputs).bfloat16()
            said = []
            for name, layer in packed.items():
                took = seconds(layer, x)
                said.append(f"{name} {1e3 * took:.2f} ms, {2e-9 * count * inputs * outputs / took:.0f} GFLOP/s")
            print(f"{inputs} x {outputs}, {count} rows: " + "; ".join(said), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rows", type=lambda s: [int(n) for n in s.split(",")], default=[1, 4, 6, 8, 12, 16, 32, 128, 512]
    )
    main(parser.parse_args().rows)
