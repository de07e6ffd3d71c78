"""Tucker-2 and SVD of convolution weights: the tensors only.

W [O, I, kh, kw] ~ G x_0 U_o x_1 U_i, with a core G [Ro, Ri, kh, kw] and orthonormal U_o [O, Ro], U_i [I, Ri] (Kim et
al. 2016, 3.1): a 1x1 convolution I -> Ri, the kernel on Ri -> Ro channels, a 1x1 convolution Ro -> O. Everything is
computed in float64. tensorly's partial_tucker is the reference in tests; here the bases nest, so that one decomposition
serves all ranks that are tried, and the Gram matrices of O and I channels are small where its SVDs are not.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from thresher.errors import UsageError

SHRINKAGE = 0.1  # of moments towards inputs that are alike in all directions


@dataclass(frozen=True)
class Factors:
    """core [Ro, Ri, kh, kw], outer [O, Ro], inner [I, Ri]; error: |W - its reconstruction| / |W|, in the norm that was
    minimised."""

    core: torch.Tensor
    outer: torch.Tensor
    inner: torch.Tensor
    error: float

    def weight(self) -> torch.Tensor:
        """The weight that these stand for, [O, I, kh, kw]."""
        return torch.einsum("abhw,oa,ib->oihw", self.core, self.outer, self.inner)


@dataclass(frozen=True)
class Bases:
    """The eigenvectors of both channel modes (HOSVD), best first, and what each carries of |W|^2: once for all ranks.

    outer [O, O], inner [I, I]; energies [O], [I]; root, unroot [I, I]: of the inputs' moments, or None.
    """

    weight: torch.Tensor
    outer: torch.Tensor
    inner: torch.Tensor
    outer_energy: torch.Tensor
    inner_energy: torch.Tensor
    root: torch.Tensor | None = None
    unroot: torch.Tensor | None = None

    def expected_error(self, outer: int, inner: int) -> float:
        """An upper bound of the relative error at these ranks: what both modes lose."""
        lost = self.outer_energy[outer:].sum() + self.inner_energy[inner:].sum()
        return math.sqrt(min(1.0, max(0.0, float(lost / self.outer_energy.sum().clamp(min=1e-300)))))


def find_bases(weight: torch.Tensor, moments: torch.Tensor | None = None) -> Bases:
    """weight [O, I, kh, kw]; moments [I, I]: second moments of the input channels, if the error of the *outputs* is to
    be least (of inputs that are alike at all positions of the kernel). Raises UsageError for a weight that is not
    finite."""
    if weight.dim() != 4 or not torch.isfinite(weight).all():
        raise UsageError("a weight to decompose is [outputs, inputs, kh, kw], of finite numbers")
    w = weight.detach().double()
    root = unroot = None
    if moments is not None:
        root, unroot = _roots(moments.double())
        w = torch.einsum("oihw,ij->ojhw", w, root)
    outer_energy, outer = _principal(w.flatten(1))
    inner_energy, inner = _principal(w.transpose(0, 1).flatten(1))
    return Bases(w, outer, inner, outer_energy, inner_energy, root, unroot)


def _principal(unfolded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues and eigenvectors of X X^T, the largest first."""
    values, vectors = torch.linalg.eigh(unfolded @ unfolded.T)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def _roots(moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, vectors = torch.linalg.eigh((moments + moments.T) / 2)
    # Directions that the calibration images hardly use count a little: other images use them.
    roots = (values.clamp(min=0) + SHRINKAGE * values.clamp(min=0).mean() + 1e-30).sqrt()
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T


def tucker2(bases: Bases, outer: int, inner: int, rounds: int = 10, tolerance: float = 1e-6) -> Factors:
    """Truncated HOSVD, refined by up to `rounds` of HOOI (De Lathauwer 2000) until the error changes by less than
    `tolerance`.

    Raises UsageError for ranks out of bounds.
    """
    w = bases.weight
    outputs, inputs = w.shape[:2]
    if not (1 <= outer <= outputs and 1 <= inner <= inputs):
        raise UsageError(f"ranks {outer}, {inner} are not within the {outputs} and {inputs} channels")
    norm = float(w.square().sum())
    u_o, u_i = bases.outer[:, :outer], bases.inner[:, :inner]
    error = _relative_error(w, u_o, u_i, norm)
    for _ in range(rounds if error > tolerance else 0):
        next_o = _principal(torch.einsum("oihw,ib->obhw", w, u_i).flatten(1))[1][:, :outer]
        next_i = _principal(torch.einsum("oihw,oa->iahw", w, next_o).flatten(1))[1][:, :inner]
        refined = _relative_error(w, next_o, next_i, norm)
        if refined > error:
            break
        u_o, u_i, change, error = next_o, next_i, error - refined, refined
        if change < tolerance:
            break
    core = torch.einsum("oihw,oa,ib->abhw", w, u_o, u_i)
    if bases.unroot is not None:
        u_i = bases.unroot @ u_i
    return Factors(core, u_o, u_i, error)


def _relative_error(w: torch.Tensor, u_o: torch.Tensor, u_i: torch.Tensor, norm: float) -> float:
    kept = float(torch.einsum("oihw,oa,ib->abhw", w, u_o, u_i).square().sum())
    return math.sqrt(max(0.0, 1 - kept / norm)) if norm > 0 else 0.0


def svd(bases: Bases, rank: int) -> Factors:
    """Of a 1x1 convolution: outer [O, rank] and inner [I, rank] with a core of ones, W ~ outer inner^T, each taking
    half of the singular values. Raises UsageError for a rank out of bounds."""
    w = bases.weight.flatten(1)
    if not 1 <= rank <= min(w.shape):
        raise UsageError(f"a rank of {rank} is not within the {w.shape[0]} and {w.shape[1]} channels")
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    norm = float(s.square().sum())
    error = math.sqrt(max(0.0, float(s[rank:].square().sum()) / norm)) if norm > 0 else 0.0
    half = s[:rank].sqrt()
    inner = v[:rank].T * half
    if bases.unroot is not None:
        inner = bases.unroot @ inner
    core = torch.eye(rank, dtype=w.dtype)[:, :, None, None]
    return Factors(core, u[:, :rank] * half, inner, error)


def vbmf_rank(unfolded: torch.Tensor) -> int:
    """How many components of [L, M] stand out of noise: the global analytic solution of variational Bayesian matrix
    factorisation, its noise estimated too (Nakajima et al. 2013, theorems 2 and 3, corollary 1)."""
    matrix = unfolded.double()
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    rows, columns = matrix.shape
    values = torch.linalg.svdvals(matrix)
    square = values.square()
    total = float(square.sum())
    if total == 0:
        return 0
    alpha = rows / columns
    tau_bar = 2.5129 * math.sqrt(alpha)
    x_bar = (1 + tau_bar) * (1 + alpha / tau_bar)
    most = min(max(math.ceil(rows / (1 + alpha)) - 1, 0), rows - 1)  # components that may stand out
    high = total / (rows * columns)
    low = max(float(square[most]) / (columns * x_bar), float(square[most:].mean()) / columns)
    low = min(max(low, high * 1e-12), high)
    noise = _least(lambda s: _vbmf_objective(s, square, columns, alpha, x_bar), low, high)
    return int((square > columns * noise * x_bar).sum())


def _vbmf_objective(noise: float, square: torch.Tensor, columns: int, alpha: float, x_bar: float) -> float:
    x = square / (columns * noise)
    above, below = x[x > x_bar], x[x <= x_bar].clamp(min=1e-300)
    shifted = above - (1 + alpha)
    tau = (shifted + (shifted.square() - 4 * alpha).clamp(min=0).sqrt()) / 2
    signal = above - tau + torch.log((tau + 1) / above) + alpha * torch.log(tau / alpha + 1)
    return float(signal.sum() + (below - below.log()).sum())


def _least(objective: Callable[[float], float], low: float, high: float) -> float:
    """Where it is least between two bounds: a grid on a logarithmic scale, then golden sections around the best of
    it."""
    grid: list[float] = [low * (high / low) ** (i / 63) for i in range(64)]
    best = min(range(len(grid)), key=lambda i: objective(grid[i]))
    a, b = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(60):
        left, right = b - golden * (b - a), a + golden * (b - a)
        if objective(left) < objective(right):
            b = right
        else:
            a = left
    return (a + b) / 2
