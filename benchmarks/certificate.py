"""How often an output is further from dense attention than the certificate of `lsh` allowed, on a real text.

python benchmarks/certificate.py
"""

import argparse

import torch

from thresher import LLM
from thresher.attention.registry import parse_method
from thresher.decoding.runner import Work
from thresher.evaluation.bench import prompt
from thresher.evaluation.teacher import prefill
from thresher.evaluation.texts import public_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", default="lsh:K=9,L=120")
    parser.add_argument("--certify", nargs="*", type=float, default=[0.05, 0.1, 0.2, 0.5])
    parser.add_argument("--text", default="paradise_lost")
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--steps", type=int, default=16)
    options = parser.parse_args()
    llm = LLM()
    ids = prompt(llm, options.tokens + options.steps, public_text(options.text))
    base = prefill(llm, ids[: options.tokens])
    for limit in options.certify:
        method = parse_method(f"{options.method},certify={limit}")
        fork, errors = base.fork(), []
        for token in ids[options.tokens :]:
            _, captured = llm.runner.run_captured([Work(fork, [token], False, method)])
            exact = captured.dense.float()
            errors.append((captured.outputs.float() - exact).norm(dim=-1) / exact.norm(dim=-1))
        index = llm.runner.prepare(fork, method)
        assert index is not None
        read = index.readings()
        certified = torch.stack(errors)[:, index.layers]
        above = int((certified > limit).sum()) / (read.checked - read.escalated)
        print(
            f"certify {limit}: {100 * read.escalated / read.checked:5.1f} % of {read.checked} outputs dense, "
            f"of the others {100 * above:4.1f} % further off, at most {certified.max():.2f}; "
            f"mean error {100 * certified.mean():.1f} %",
            flush=True,
        )


if __name__ == "__main__":
    main()
