from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch

from thresher.attention.sparse import BudgetMethod, Rank, Shape
from thresher.errors import UsageError
from thresher.kernels.hashing import MOST_SIGNS, interleave_signs, project
from thresher.kernels.linear import PackedLinear, pack_linear


@dataclass(frozen=True)
class Sign(BudgetMethod):
    """Ranks all keys by one bit a direction against the unrounded query, then reads the best; RaBitQ's estimator, section 3.

    A key, centred, is kept as the signs of its products with orthonormal directions and one factor |k|^2 / sum |products|:
    8 bytes and one for 64 bits, read in order. bits: directions, a multiple of 32.
    """

    name: ClassVar[str] = "sign"
    paper: ClassVar[str] = "https://arxiv.org/abs/2405.12497"
    rank: ClassVar[Rank] = Rank.SIGNS

    bits: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self.name, self.bits)

    def index_key(self) -> str:
        return f"{signs_key(self.bits, self.seed)},{super().index_key()}"

    def freeze(self, keys: torch.Tensor, shape: Shape) -> dict[str, torch.Tensor]:
        return freeze_signs(keys, self.bits, self.seed, shape)

    def build(
        self, keys: torch.Tensor, values: torch.Tensor, frozen: dict[str, torch.Tensor], shape: Shape
    ) -> dict[str, torch.Tensor]:
        signs = build_signs(keys, frozen, self.bits, self.seed, shape)
        return signs | super().build(keys, values, frozen, shape)

    def parameters(self, shape: Shape) -> dict[str, Any]:
        return super().parameters(shape) | sign_parameters(self.bits, self.seed, shape)

    def index_bytes(self, candidates: int, shape: Shape) -> float:
        return candidates * (self.bits / 8 + 1) + super().index_bytes(candidates, shape)


def check_bits(name: str, bits: int) -> None:
    if not 32 <= bits <= MOST_SIGNS or bits % 32:
        raise UsageError(f"{name}, bits={bits}: give a multiple of 32 from 32 to {MOST_SIGNS}")


def signs_key(bits: int, seed: int) -> str:
    return f"bits={bits},seed={seed}"


@lru_cache(maxsize=16)
def orthonormal_directions(count: int, dim: int, seed: int) -> torch.Tensor:
    """float32 `[count, dim]`, orthonormal in groups of dim."""
    generator = torch.Generator().manual_seed(seed)
    groups = [torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0] for _ in range(-(-count // dim))]
    return torch.cat(groups)[:count].contiguous()


@lru_cache(maxsize=16)
def packed_directions(count: int, dim: int, seed: int, dtype: torch.dtype) -> PackedLinear:
    return pack_linear([orthonormal_directions(count, dim, seed)], dtype)


def sign_parameters(bits: int, seed: int, shape: Shape) -> dict[str, Any]:
    directions = packed_directions(bits, shape.heads.head_dim, seed, shape.dtype)
    return {"planes": bits, "directions": directions.data}


def freeze_signs(keys: torch.Tensor, bits: int, seed: int, shape: Shape) -> dict[str, torch.Tensor]:
    """The mean that keys are centred by, and the largest factor, `[planes, head_dim]` and `[planes]`."""
    mean = keys.float().mean(dim=1)
    _, factors = _signs(keys, mean, bits, seed, shape)
    return {"mean": mean, "largest": factors.amax(dim=1).clamp(min=1e-30)}


def build_signs(
    keys: torch.Tensor, frozen: dict[str, torch.Tensor], bits: int, seed: int, shape: Shape
) -> dict[str, torch.Tensor]:
    signs, factors = _signs(keys, frozen["mean"], bits, seed, shape)
    rounded = (factors / frozen["largest"][:, None] * 255).round().clamp(0, 255).to(torch.uint8)
    return {"signs": interleave_signs(signs, bits), "factors": rounded}


def _signs(
    keys: torch.Tensor, mean: torch.Tensor, bits: int, seed: int, shape: Shape
) -> tuple[torch.Tensor, torch.Tensor]:
    directions = packed_directions(bits, shape.heads.head_dim, seed, shape.dtype)
    signs, norms, absolute = project(keys, mean, directions)
    return signs, norms.square() / absolute.clamp(min=1e-30)
