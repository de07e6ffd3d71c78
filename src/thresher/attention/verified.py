from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, ClassVar

import torch

from thresher.attention.sign import (
    build_signs,
    check_bits,
    freeze_signs,
    sign_bytes,
    sign_parameters,
    signs_arrays,
    signs_frozen,
    signs_key,
)
from thresher.attention.sparse import Planes, Rank, Shape, SparseMethod, Stated, Take, amount_tokens, check_amount
from thresher.errors import UsageError


@dataclass(frozen=True)
class Verified(SparseMethod):
    """The best rows by sign bits, and of the rest a uniform sample as large as a stated error asks for; vAttention.

    heavy: tokens a query head chooses (all are weighed by the whole group), or a share of the context below 1.
    epsilon, delta: the output's relative error exceeds epsilon with probability at most delta, by the central limit
    theorem. pilot: the share of the rest that estimates its spread. bits: as in `sign`. A sample of half the rest
    or more reads all of it instead.
    """

    name: ClassVar[str] = "verified"
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.05688"
    rank: ClassVar[Rank] = Rank.SIGNS

    heavy: float = 0.05
    epsilon: float = 0.25
    delta: float = 0.25
    pilot: float = 0.02
    bits: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self.name, self.bits)
        check_amount(self.name, "heavy", self.heavy)
        for name in ("epsilon", "delta", "pilot"):
            if not 0 < getattr(self, name) < 1:
                raise UsageError(f"verified, {name}={getattr(self, name)}: give a number between 0 and 1")

    def index_key(self) -> str:
        return f"{signs_key(self.bits, self.seed)},verified,sinks={self.sinks},tail=0"

    def budget_tokens(self, context: int) -> int:
        return amount_tokens(self.heavy, context)

    def freeze(self, keys: torch.Tensor, queries: Planes, shape: Shape) -> dict[str, torch.Tensor]:
        return freeze_signs(keys, queries(), self.bits, self.seed, shape)

    def build(
        self, keys: torch.Tensor, values: torch.Tensor, frozen: dict[str, torch.Tensor], shape: Shape
    ) -> dict[str, torch.Tensor]:
        return build_signs(keys, frozen)

    def frozen_arrays(self, shape: Shape) -> Stated:
        return signs_frozen(self.bits, shape)

    def block_arrays(self, n: int, shape: Shape) -> Stated:
        return signs_arrays(self.bits, n)

    def parameters(self, shape: Shape, frozen: dict[str, torch.Tensor]) -> dict[str, Any]:
        # P(|N^ - N| > e |N|) < d and P(|D^ - D| > e D) < d give P(|o^ - o| > 4 e |o|) < 2 d for e < 1/2.
        quantile = NormalDist().inv_cdf(1 - self.delta / 4)
        return (
            super().parameters(shape, frozen)
            | sign_parameters(self.bits, frozen)
            | {
                "take": Take.VERIFY,
                "confidence": (quantile / (self.epsilon / 4)) ** 2,
                "pilot": self.pilot,
                "seed": self.seed,
            }
        )

    def index_bytes(self, candidates: int, shape: Shape) -> float:
        return sign_bytes(candidates, self.bits, shape)
