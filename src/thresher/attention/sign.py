from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch

from thresher.attention.sparse import BudgetMethod, Planes, Rank, Shape
from thresher.attention.tail import query_stretch
from thresher.errors import UsageError
from thresher.kernels.hashing import MOST_SIGNS, interleave_signs, project
from thresher.kernels.linear import PackedLinear, pack_linear


@dataclass(frozen=True)
class Sign(BudgetMethod):
    """Ranks all keys by one bit a direction against the unrounded query, then reads the best; RaBitQ's estimator,
    section 3.

    A key, centred and stretched along the directions that queries have, is kept as the signs of its products with
    orthonormal directions and one factor |k|^2 / sum |products|: 8 bytes and one for 64 bits, read in order. The
    query is shrunk as the keys are stretched. bits: directions, a multiple of 32.
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

    def freeze(self, keys: torch.Tensor, queries: Planes, shape: Shape) -> dict[str, torch.Tensor]:
        return super().freeze(keys, queries, shape) | freeze_signs(keys, queries(), self.bits, self.seed, shape)

    def build(
        self, keys: torch.Tensor, values: torch.Tensor, frozen: dict[str, torch.Tensor], shape: Shape
    ) -> dict[str, torch.Tensor]:
        signs = build_signs(keys, frozen, self.bits, self.seed)
        return signs | super().build(keys, values, frozen, shape)

    def parameters(self, shape: Shape, frozen: dict[str, torch.Tensor]) -> dict[str, Any]:
        return super().parameters(shape, frozen) | sign_parameters(self.bits, frozen)

    def index_bytes(self, candidates: int, shape: Shape) -> float:
        return sign_bytes(candidates, self.bits, shape) + super().index_bytes(candidates, shape)


STRETCH = 0.15  # power of the queries' second moment (docs/results.md)


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


def sign_parameters(bits: int, frozen: dict[str, torch.Tensor]) -> dict[str, Any]:
    if "directions" not in frozen:
        return {"planes": bits}
    directions = frozen["directions"]
    return {"planes": bits, "directions": directions, "directions_stride": directions[0].numel() * directions.itemsize}


def sign_bytes(candidates: int, bits: int, shape: Shape) -> float:
    """Signs and factors, and the directions of the queries."""
    return candidates * (bits / 8 + 1) + bits * shape.heads.head_dim * shape.dtype.itemsize


def freeze_signs(
    keys: torch.Tensor, queries: torch.Tensor, bits: int, seed: int, shape: Shape
) -> dict[str, torch.Tensor]:
    """What keys are centred by, `mean` `[planes, head_dim]`, stretched by, `sign_stretch` `[planes, head_dim,
    head_dim]`, the `largest` factor `[planes]`, and the packed `directions` that the shrunk query is projected on."""
    rotation = orthonormal_directions(bits, shape.heads.head_dim, seed)
    stretch = query_stretch(queries, STRETCH)
    shrink = query_stretch(queries, -STRETCH)
    directions = [pack_linear([rotation @ plane], shape.dtype).data for plane in shrink]
    frozen = {"mean": keys.float().mean(dim=1), "sign_stretch": stretch}
    _, factors = _signs(keys, frozen, bits, seed)
    return frozen | {"largest": factors.amax(dim=1).clamp(min=1e-30), "directions": torch.stack(directions)}


def build_signs(keys: torch.Tensor, frozen: dict[str, torch.Tensor], bits: int, seed: int) -> dict[str, torch.Tensor]:
    signs, factors = _signs(keys, frozen, bits, seed)
    rounded = (factors / frozen["largest"][:, None] * 255).round().clamp(0, 255).to(torch.uint8)
    return {"signs": interleave_signs(signs, bits), "factors": rounded}


def _signs(
    keys: torch.Tensor, frozen: dict[str, torch.Tensor], bits: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    stretched = torch.bmm(keys.float() - frozen["mean"][:, None], frozen["sign_stretch"]).to(keys.dtype)
    directions = packed_directions(bits, keys.shape[2], seed, keys.dtype)
    signs, norms, absolute = project(stretched, torch.zeros(keys.shape[0], keys.shape[2]), directions)
    return signs, norms.square() / absolute.clamp(min=1e-30)
