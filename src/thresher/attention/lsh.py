from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch

from thresher.attention.sparse import Planes, Rank, Shape, SparseMethod, Stated
from thresher.errors import UsageError
from thresher.kernels.hashing import MOST_DIRECTIONS, lsh_codes, lsh_tables, project
from thresher.kernels.linear import PackedLinear, pack_linear

SORTED_TOKENS = 1024  # blocks of fewer tokens keep their codes as they are: buckets would take more than they save
COSINES = 4096  # points of the table of log probabilities
FULLNESS = 4.6  # how much fuller the buckets of queries are than if keys were spread evenly (docs/results.md)
ROUNDING = 1e-5  # of a mean's norm: centred keys shorter than this are taken for zero
TYPICAL_COSINE = 0.12  # where keys of prose lie on average, for the expected cost (docs/results.md)


@dataclass(frozen=True)
class LSH(SparseMethod):
    """Keys that share a bucket with the query in two of L hash tables, weighted by how likely that was; MagicPIG,
    section 4.

    K: bits of a hash. L: tables. Keys are centred for each layer, sequence and KV head. An attention weight is
    divided by the probability u that its key is found, which the cosine of key and query gives (section 4.2; no
    additive floor). certify: an estimated relative error of a head's output above this is answered by dense
    attention instead; 0: never. seed: of the hash functions.
    """

    name: ClassVar[str] = "lsh"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.16179"
    rank: ClassVar[Rank] = Rank.TABLES
    own: ClassVar[bool] = True

    K: int = 9
    L: int = 120
    certify: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.K <= 16:
            raise UsageError(f"lsh, K={self.K}: give 0 to 16 bits")
        if not 2 <= self.L <= 255:
            raise UsageError(f"lsh, L={self.L}: give 2 to 255 tables")
        if self.K * self.L > MOST_DIRECTIONS:
            raise UsageError(f"lsh, K={self.K}, L={self.L}: at most {MOST_DIRECTIONS} bits in all")
        if self.certify < 0:
            raise UsageError(f"lsh, certify={self.certify}: give an error above 0, or 0 for none")

    @property
    def segment(self) -> int:
        return 65536  # ids have 16 bits

    def index_key(self) -> str:
        return f"lsh,K={self.K},L={self.L},seed={self.seed},sinks={self.sinks}"

    def freeze(self, keys: torch.Tensor, queries: Planes, shape: Shape) -> dict[str, torch.Tensor]:
        return {"mean": keys.float().mean(dim=1)}

    def build(
        self, keys: torch.Tensor, values: torch.Tensor, frozen: dict[str, torch.Tensor], shape: Shape
    ) -> dict[str, torch.Tensor]:
        bits, norms, _ = project(keys, frozen["mean"], self._directions(shape))
        # What is left of a key that equals the mean is rounding, without a direction. As zeros it lies in bucket 0 and
        # at cosine 0 to all queries, which is as likely to be found as the closed form says.
        nothing = norms < ROUNDING * frozen["mean"].norm(dim=-1, keepdim=True)
        norms.masked_fill_(nothing, 0)
        bits.masked_fill_(nothing[..., None], 0)
        codes = lsh_codes(bits, self.K, self.L)
        if keys.shape[1] < SORTED_TOKENS:
            return {"codes": codes, "norms": norms}
        heads, ids = lsh_tables(codes, self.K)
        return {"heads": heads, "ids": ids, "norms": norms}

    def frozen_arrays(self, shape: Shape) -> Stated:
        return {"mean": (torch.float32, (shape.heads.head_dim,))}

    def block_arrays(self, n: int, shape: Shape) -> Stated:
        norms: Stated = {"norms": (torch.float32, (n,))}
        if n < SORTED_TOKENS:
            return {"codes": (torch.uint16, (self.L, n))} | norms
        return {"heads": (torch.int32, (self.L, 2**self.K + 1)), "ids": (torch.uint16, (self.L, n))} | norms

    def parameters(self, shape: Shape, frozen: dict[str, torch.Tensor]) -> dict[str, Any]:
        return super().parameters(shape, frozen) | {
            "planes": max(1, self.K * self.L),
            "directions": self._directions(shape).data,
            "bits": self.K,
            "tables": self.L,
            "log_u": log_inclusion_table(self.K, self.L),
            "log_u_count": COSINES,
            "certify": self.certify,
        }

    def _directions(self, shape: Shape) -> PackedLinear:
        return hash_directions(max(1, self.K * self.L), shape.heads.head_dim, self.seed, shape.dtype)

    def rows_read(self, candidates: int, shape: Shape) -> float:
        each = float(inclusion_probability(np.array([TYPICAL_COSINE]), self.K, self.L)[0]) * candidates
        return min(float(candidates), each * (1 + 0.55 * (shape.group - 1)))

    def index_bytes(self, candidates: int, shape: Shape) -> float:
        """Bucket heads (a cache line each), the ids of the buckets, norms."""
        blocks = -(-candidates // self.segment)
        entries = FULLNESS * candidates * self.L / float(2**self.K)
        return shape.group * (blocks * self.L * 128 + 2 * entries) + 4 * candidates


@lru_cache(maxsize=16)
def hash_directions(count: int, dim: int, seed: int, dtype: torch.dtype) -> PackedLinear:
    """Gaussian directions: a hash bit is the side of a random hyperplane (SimHash)."""
    generator = torch.Generator().manual_seed(seed)
    return pack_linear([torch.randn(count, dim, generator=generator)], dtype)


def inclusion_probability(cosine: np.ndarray, K: int, L: int) -> np.ndarray:
    """float64 probability that key and query at these cosines share a bucket in at least 2 of L tables of K bits.

    One bit agrees with probability p = 1 - arccos(cosine) / pi, a table with a = p^K, and u = 1 - (1-a)^L - L a
    (1-a)^(L-1) (section 4.2). Where that difference would lose digits, the sum of the binomial's terms is taken.
    """
    a = (1 - np.arccos(np.clip(cosine, -1, 1)) / np.pi) ** K
    direct = 1 - (1 - a) ** L - L * a * (1 - a) ** (L - 1)
    small = np.zeros_like(a)
    term = 0.5 * L * (L - 1) * a**2  # binomial coefficients times powers of a, without (1 - a)^(L - m)
    for m in range(2, min(L, 14) + 1):
        small += term * (1 - a) ** (L - m)
        term = term * a * (L - m) / (m + 1)
    return np.asarray(np.where(L * a < 0.5, small, direct))


@lru_cache(maxsize=16)
def log_inclusion_table(K: int, L: int) -> torch.Tensor:
    """float32 log2 of the inclusion probability at `COSINES` cosines from -1 to 1; finite at -1, where it is 0."""
    u = inclusion_probability(np.linspace(-1, 1, COSINES), K, L)
    log_u = np.log2(np.maximum(u, 1e-300))
    return torch.from_numpy(np.minimum(log_u, 0.0)).float()
