"""Peak memory of n samples of one prompt against one sample: the prompt's cache must be stored once.

python benchmarks/memory.py --tokens 6000 --samples 8
"""

import argparse
import json
import subprocess
import sys

# The peak that loading leaves is forgotten before the run is measured.
CHILD = """
import sys
from thresher import LLM, SamplingParams
from thresher.evaluation.bench import prompt

def status(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024

tokens, samples, new = map(int, sys.argv[1:])
llm = LLM()
llm.generate("warm up", SamplingParams(max_new_tokens=2))
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
params = SamplingParams(max_new_tokens=new, temperature=1.0, n=samples, ignore_eos=True)
llm.generate([prompt(llm, tokens)], params)
print(before, status("VmHWM"), llm.runner.layout.bytes_per_token)
"""


def measure(tokens: int, samples: int, new: int) -> tuple[int, int, int]:
    """Bytes resident once the model is loaded, bytes at the peak of the run, bytes of one cached token."""
    command = [sys.executable, "-c", CHILD, str(tokens), str(samples), str(new)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    loaded, peak, per_token = map(int, out.split())
    return loaded, peak, per_token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--new", type=int, default=64)
    options = parser.parse_args()
    loaded, one, per_token = measure(options.tokens, 1, options.new)
    loaded_too, many, _ = measure(options.tokens, options.samples, options.new)
    tails = (options.samples - 1) * options.new * per_token
    result = {
        "samples": options.samples,
        "prompt_cache_MiB": options.tokens * per_token / 2**20,
        "tails_MiB": tails / 2**20,
        "one_sample": {"loaded_MiB": loaded / 2**20, "peak_MiB": one / 2**20},
        "all_samples": {"loaded_MiB": loaded_too / 2**20, "peak_MiB": many / 2**20},
        "peak_ratio": many / (one + tails),
        "ratio_of_what_the_run_added": (many - loaded_too) / (one - loaded + tails),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
