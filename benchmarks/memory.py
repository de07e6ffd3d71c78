"""Peak memory of n samples of one prompt against one sample: the prompt's cache must be stored once.

python benchmarks/memory.py --tokens 6000 --samples 8
"""

import argparse
import json
import subprocess
import sys

CHILD = """
import sys
from thresher import LLM, SamplingParams
from thresher.evaluation.bench import prompt

tokens, samples, new = map(int, sys.argv[1:])
llm = LLM()
params = SamplingParams(max_new_tokens=new, temperature=1.0, n=samples, ignore_eos=True)
llm.generate([prompt(llm, tokens)], params)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) * 1024, llm.runner.layout.bytes_per_token)
"""


def peak(tokens: int, samples: int, new: int) -> tuple[int, int]:
    command = [sys.executable, "-c", CHILD, str(tokens), str(samples), str(new)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    resident, per_token = map(int, out.split())
    return resident, per_token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--new", type=int, default=64)
    options = parser.parse_args()
    short, per_token = peak(64, 1, options.new)
    one, _ = peak(options.tokens, 1, options.new)
    many, _ = peak(options.tokens, options.samples, options.new)
    tails = (options.samples - 1) * options.new * per_token
    print(
        json.dumps(
            {
                "short_prompt_MiB": short / 2**20,
                "one_sample_MiB": one / 2**20,
                "samples": options.samples,
                "all_samples_MiB": many / 2**20,
                "tails_MiB": tails / 2**20,
                "prompt_cache_MiB": options.tokens * per_token / 2**20,
                "ratio_to_one_plus_tails": many / (one + tails),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
