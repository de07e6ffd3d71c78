"""Attention-output error and bytes of the preset at 6,000 real tokens and at 32,768 synthetic ones drawn like them.

python benchmarks/synthetic_error.py
"""

import argparse

from thresher import LLM
from thresher.attention.registry import parse_method
from thresher.evaluation.bench import prompt, synthetic_cache
from thresher.evaluation.fidelity import ERROR_TOKENS, layer_errors, reading
from thresher.evaluation.teacher import prefill
from thresher.evaluation.texts import public_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--attention", nargs="*", default=["auto", "lsh:K=9,L=120", "lsh:K=10,L=150", "sign:budget=160"]
    )
    parser.add_argument("--tokens", type=int, nargs=2, default=[6000, 32768])
    options = parser.parse_args()
    real, long = options.tokens
    llm = LLM(allow_extrapolation=True)
    ids = prompt(llm, real + ERROR_TOKENS, public_text("paradise_lost"))
    base = prefill(llm, ids[:real])
    for text in options.attention:
        method = parse_method(text)
        for sequence in (base, synthetic_cache(base, long)):
            fork = sequence.fork()
            errors = layer_errors(llm, fork, ids[real:], method)
            read = reading(fork.index, method, llm, sequence.length)
            print(
                f"{text:24} {sequence.length:6} tokens: output error {100 * sum(errors) / len(errors):5.2f} %, "
                f"bytes {100 * read.bytes / read.whole:5.2f} % of dense, rows {read.rows:.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
