from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch

from thresher.attention.sparse import BudgetMethod, Planes, Rank, Shape, Stated
from thresher.attention.tail import query_stretch
from thresher.errors import UsageError
from thresher.kernels.hashing import MOST_SIGNS, pack_signs
from thresher.kernels.linear import pack_linear, packed_shape


@dataclass(frozen=True)
class Sign(BudgetMethod):
    """Ranks all keys by one bit a direction against the unrounded query, then reads the best; RaBitQ's estimator.

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
        signs = build_signs(keys, frozen)
        return signs | super().build(keys, values, frozen, shape)

    def frozen_arrays(self, shape: Shape) -> Stated:
        return super().frozen_arrays(shape) | signs_frozen(self.bits, shape)

    def block_arrays(self, n: int, shape: Shape) -> Stated:
        return signs_arrays(self.bits, n) | super().block_arrays(n, shape)

    def parameters(self, shape: Shape, frozen: dict[str, torch.Tensor]) -> dict[str, Any]:
        return super().parameters(shape, frozen) | sign_parameters(self.bits, frozen)

    def index_bytes(self, candidates: int, shape: Shape) -> float:
        return sign_bytes(candidates, self.bits, shape) + super().index_bytes(candidates, shape)


STRETCH = 0.15  # power of the queries' second moment (docs/results.md)
SAMPLE = 4096  # keys that the rotation is fitted to
ITQ_ROUNDS = 15


def check_bits(name: str, bits: int) -> None:
    if not 32 <= bits <= MOST_SIGNS or bits % 32:
        raise UsageError(f"{name}, bits={bits}: give a multiple of 32 from 32 to {MOST_SIGNS}")


def signs_key(bits: int, seed: int) -> str:
    return f"bits={bits},seed={seed}"


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
    """What keys are centred by, `mean` `[planes, head_dim]`, and then multiplied by, `spread` `[planes, head_dim,
    bits]`, before their signs are taken; the `largest` factor `[planes]`; and the packed `directions` that queries
    are projected on: products of queries and keys stay what they are."""
    frozen = {"mean": keys.float().mean(dim=1)}
    stretch = query_stretch(queries, STRETCH)
    sample = keys[:, :: max(1, keys.shape[1] // SAMPLE)].float()
    rotation = fitted_rotation(torch.bmm(sample - frozen["mean"][:, None], stretch), bits, seed)
    shrunk = torch.bmm(query_stretch(queries, -STRETCH), rotation)
    frozen["spread"] = torch.bmm(stretch, rotation)
    frozen["directions"] = torch.stack([pack_linear([plane.T], shape.dtype).data for plane in shrunk])
    _, factors = _signs(keys, frozen)
    return frozen | {"largest": factors.amax(dim=1).clamp(min=1e-30)}


def build_signs(keys: torch.Tensor, frozen: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    signs, factors = _signs(keys, frozen)
    rounded = (factors / frozen["largest"][:, None] * 255).round().clamp(0, 255).to(torch.uint8)
    return {"signs": pack_signs(signs), "factors": rounded}


def signs_frozen(bits: int, shape: Shape) -> Stated:
    """What `freeze_signs` gives."""
    dim = shape.heads.head_dim
    return {
        "mean": (torch.float32, (dim,)),
        "spread": (torch.float32, (dim, bits)),
        "directions": (shape.dtype, packed_shape(bits, dim, shape.dtype)),
        "largest": (torch.float32, ()),
    }


def signs_arrays(bits: int, n: int) -> Stated:
    """What `build_signs` gives."""
    return {"signs": (torch.int32, (n // 16, bits // 32, 16)), "factors": (torch.uint8, (n,))}


def _signs(keys: torch.Tensor, frozen: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    products = torch.bmm(keys.float() - frozen["mean"][:, None], frozen["spread"])
    return products > 0, products.square().sum(-1) / products.abs().sum(-1).clamp(min=1e-30)


def fitted_rotation(keys: torch.Tensor, bits: int, seed: int) -> torch.Tensor:
    """Orthonormal columns `[planes, head_dim, bits]` along which the keys `[planes, n, head_dim]` lie close to
    their signs.

    Up to head_dim bits: the keys' largest principal directions, turned by ITQ (Gong and Lazebnik, CVPR 2011). More
    bits: random orthonormal groups of head_dim.
    """
    planes, _, dim = keys.shape
    random = orthonormal_directions(bits, dim, seed)
    if bits > dim:
        return random.T.expand(planes, -1, -1)
    principal = torch.linalg.eigh(torch.bmm(keys.transpose(1, 2), keys))[1][:, :, -bits:]
    x = torch.bmm(keys / keys.norm(dim=-1, keepdim=True).clamp(min=1e-30), principal)
    turn = orthonormal_directions(bits, bits, seed).T.expand(planes, -1, -1)
    for _ in range(ITQ_ROUNDS):
        u, _, v = torch.linalg.svd(torch.bmm(x.transpose(1, 2), torch.bmm(x, turn).sign()))
        turn = torch.bmm(u, v)
    return torch.bmm(principal, turn)


@lru_cache(maxsize=16)
def orthonormal_directions(count: int, dim: int, seed: int) -> torch.Tensor:
    """float32 `[count, dim]`, orthonormal in groups of dim."""
    generator = torch.Generator().manual_seed(seed)
    groups = [torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0] for _ in range(-(-count // dim))]
    return torch.cat(groups)[:count].contiguous()
