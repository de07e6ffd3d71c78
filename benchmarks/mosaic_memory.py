"""How well `lsh` reads a Memory Mosaic's memory: unit keys, by bandwidth beta, with and without centring.

    python benchmarks/mosaic_memory.py [pairs]

Keys are leaky averages of random vectors for the symbols of a Markov chain, normalised, as a Mosaic makes them; the
value of a pair is a vector for the symbol that came next. Error: mean |answer - exact| / |exact| over 64 queries.
"""

import statistics
import sys
from dataclasses import dataclass
from typing import ClassVar

import torch

from thresher.attention.index import Index
from thresher.attention.lsh import LSH
from thresher.attention.registry import METHODS, parse_method
from thresher.attention.sparse import Shape
from thresher.cache.sequence import KVLayout, KVSequence
from thresher.kernels import _native
from thresher.kernels.attention import AttentionPlan, Heads

HEADS, QUERIES = Heads(4, 4, 64), 64
BETAS = (7, 50, 150)
METHODS_TRIED = ("lsh:K=8,L=60", "lsh:K=9,L=120", "lsh:K=10,L=150", "topk:budget=300", "auto")


@dataclass(frozen=True)
class Uncentred(LSH):
    """`lsh` around zero, where the keys of a Mosaic lie anyhow."""

    name: ClassVar[str] = "lsh0"

    def freeze(self, keys: torch.Tensor, queries: object, shape: Shape) -> dict[str, torch.Tensor]:
        return {"mean": torch.zeros(keys.shape[0], keys.shape[2])}


def memory(pairs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit keys, values `[kv_heads, pairs, head_dim]` and queries `[QUERIES, kv_heads, head_dim]`, float32."""
    generator = torch.Generator().manual_seed(seed)
    symbols = 60
    chain = torch.distributions.Dirichlet(torch.full((symbols,), 0.05)).sample((symbols,))
    state, text = 0, []
    for u in torch.rand(pairs + 1, generator=generator).tolist():
        state = int((chain[state].cumsum(0) < u).sum().clamp(max=symbols - 1))
        text.append(state)
    ids = torch.tensor(text)
    keys, values, queries = [], [], []
    for head in range(HEADS.kv_heads):
        decay = 0.6 * 0.5**head
        raw = torch.randn(symbols, HEADS.head_dim, generator=generator)[ids]
        average, rows = torch.zeros(HEADS.head_dim), []
        for x in raw[:-1]:
            average = x + decay * average
            rows.append(average)
        unit = torch.nn.functional.normalize(torch.stack(rows), dim=-1)
        keys.append(unit)
        values.append(torch.randn(symbols, HEADS.head_dim, generator=generator)[ids[1:]])
        near = torch.randint(pairs, (QUERIES,), generator=generator)
        queries.append(torch.nn.functional.normalize(unit[near] + 0.02 * torch.randn(QUERIES, HEADS.head_dim), dim=-1))
    return torch.stack(keys), torch.stack(values), torch.stack(queries, dim=1)


def main() -> None:
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 32768
    keys, values, queries = memory(pairs)
    print(f"{pairs} pairs, {HEADS.kv_heads} heads of {HEADS.head_dim}; error, and share of the pairs that are read")
    for beta in BETAS:
        sequence = KVSequence(KVLayout(1, HEADS.kv_heads, HEADS.head_dim, torch.float32))
        sequence.append([0] * pairs, torch.stack([keys * beta**0.5, values])[None])
        sequence.reserve(1)
        nothing = torch.zeros(1, HEADS.kv_heads, HEADS.head_dim)
        nothing[..., 0] = -(beta**0.5)  # the row of the query itself; the same for all
        workspace = _native.Workspace()

        def answer(q: torch.Tensor, index: Index | None) -> torch.Tensor:
            plan = AttentionPlan(HEADS, torch.float32, workspace)  # noqa: B023
            plan.add(1, pairs, sequence.incoming(1), None, index.reading(pairs) if index else None)  # noqa: B023
            return plan.attend(0, q[None] * beta**0.5, nothing, nothing, 1.0)[0]  # noqa: B023

        exact = [answer(q, None) for q in queries]
        for text in METHODS_TRIED:
            name, _, parameters = text.partition(":")
            kinds = [METHODS[name]] + ([Uncentred] if name == "lsh" else [])
            for kind in kinds:
                made = parse_method(
                    f"{name}:dense_layers=none,dense_below=0" + (f",{parameters}" if parameters else "")
                )
                method = made if kind is METHODS[name] else Uncentred(**vars(made))
                index = Index(method, Shape(HEADS, torch.float32), 1)
                index.extend(sequence, lambda n: queries[None, -n:])
                errors = [
                    float(((answer(q, index) - e).norm(dim=-1) / e.norm(dim=-1)).mean())
                    for q, e in zip(queries, exact, strict=True)
                ]
                read = index.readings()
                print(
                    f"beta {beta:4}  {text:16} {'' if kind is METHODS[name] else 'not centred':12} "
                    f"{statistics.mean(errors):6.3f}  {100 * read.rows / read.readings / pairs:5.1f} %",
                    flush=True,
                )


if __name__ == "__main__":
    main()
