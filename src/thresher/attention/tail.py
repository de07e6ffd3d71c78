"""Centroids of a block of keys: what answers for the rows that are not read, and what `clusters` ranks by."""

import torch
import torch.nn.functional as F

ROUNDS = 8  # of Lloyd's algorithm
SAMPLE_PER_CENTROID = 32  # keys, about, that centroids are found with
TOKENS_PER_CENTROID = 64  # at least, so that small blocks do not have as many centroids as large ones


def cluster_count(wanted: int, tokens: int) -> int:
    return max(1, min(wanted, tokens // TOKENS_PER_CENTROID))


def cluster_rows(
    keys: torch.Tensor, values: torch.Tensor, clusters: int, stretch: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """k-means of the keys `[planes, n, head_dim]`, started from evenly spaced ones.

    stretch `[planes, head_dim, head_dim]`: multiplies keys for the distances, see `query_stretch`. Returns `means`
    `[planes, clusters, 2, head_dim]` of the keys and values of each cluster in their dtype, int32 `counts`
    `[planes, clusters]`, and uint16 `assigned` `[planes, n]`.
    """
    x = keys.float() if stretch is None else torch.bmm(keys.float(), stretch)
    planes, n, dim = x.shape
    assigned = torch.zeros(planes, n, dtype=torch.int64)
    if clusters > 1:
        # A part of the keys is enough to find the centroids.
        sample = x[:, :: max(1, n // (SAMPLE_PER_CENTROID * clusters))]
        centroids = sample[:, torch.linspace(0, sample.shape[1] - 1, clusters).round().long()]
        for _ in range(ROUNDS):
            member = F.one_hot(_nearest(sample, centroids), clusters).float()
            sizes = member.sum(1)[..., None]
            mean = torch.bmm(member.transpose(1, 2), sample) / sizes.clamp(min=1)
            centroids = torch.where(sizes > 0, mean, centroids)
        assigned = _nearest(x, centroids)
    flat = (assigned + torch.arange(planes)[:, None] * clusters).flatten()
    counts = torch.bincount(flat, minlength=planes * clusters)
    both = torch.stack([keys, values], dim=2).float().reshape(-1, 2 * dim)
    sums = torch.zeros(planes * clusters, 2 * dim).index_add_(0, flat, both)
    return {
        "means": (sums / counts.clamp(min=1)[:, None]).view(planes, clusters, 2, dim).to(keys.dtype),
        "counts": counts.view(planes, clusters).int(),
        "assigned": assigned.to(torch.uint16),
    }


def _nearest(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """The nearest centroid of each row: |x - c|^2 less the same |x|^2."""
    bias = -0.5 * centroids.square().sum(-1)[:, None]
    return torch.baddbmm(bias, x, centroids.transpose(1, 2)).argmax(dim=-1)


def query_stretch(queries: torch.Tensor, power: float) -> torch.Tensor:
    """Symmetric `[planes, head_dim, head_dim]`, the second moment of the queries `[planes, m, head_dim]` to the
    given power.

    What matters of an error in a key is its product with queries: with power 1/2, distances of stretched keys are
    the mean squared differences of their scores.
    """
    q = queries.float()
    moment = torch.bmm(q.transpose(1, 2), q) / q.shape[1]
    size, basis = torch.linalg.eigh(moment)
    size = torch.maximum(size, 1e-3 * size[:, -1:]).clamp(min=1e-12)
    return torch.bmm(basis * size.pow(power)[:, None], basis.transpose(1, 2))
