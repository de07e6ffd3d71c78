"""What rounding the weights does to the next token: KL to float32 on Paradise Lost, teacher-forced.

python benchmarks/weights_quality.py
"""

import sys
from pathlib import Path

import torch

from thresher.cache.sequence import KVSequence
from thresher.decoding.runner import Runner, Work
from thresher.models.load import load
from thresher.models.resolve import resolve

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from paradise_lost import paradise_lost

CONTEXT, SCORED = 2048, 64


def log_probabilities(weights: str) -> torch.Tensor:
    """Log-probabilities `[SCORED, vocab]` after each scored token."""
    model = load(resolve(), weights)
    runner = Runner(model)
    ids = model.tokenizer.encode(paradise_lost()[:12_000])[: CONTEXT + SCORED]
    sequence = KVSequence(runner.layout)
    runner.run([Work(sequence, ids[:CONTEXT], False)])
    return torch.stack([runner.run([Work(sequence, [t], True)])[0].log_softmax(0) for t in ids[CONTEXT:]])


def main() -> None:
    exact = log_probabilities("float32")
    for weights in ("bf16", "int8"):
        rounded = log_probabilities(weights)
        divergence = (exact.exp() * (exact - rounded)).sum(1)
        agreement = (exact.argmax(1) == rounded.argmax(1)).float().mean()
        print(f"{weights}: mean KL {divergence.mean():.4f}, largest {divergence.max():.4f}, same first {agreement:.1%}")


if __name__ == "__main__":
    main()
