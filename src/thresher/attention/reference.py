"""What one step of sparse attention is to choose and to compute, in float64, from the arrays of an index.

Nothing runs on this: tests hold the kernels against it.
"""

from dataclasses import dataclass

import numpy as np
import torch

from thresher.attention.index import Index
from thresher.attention.lsh import COSINES, LSH, log_inclusion_table
from thresher.attention.sparse import Rank, SparseMethod
from thresher.kernels.hashing import reference_codes
from thresher.kernels.native import PANEL


@dataclass(frozen=True)
class Centroids:
    """Rows that stand for `counts` rows each: keys and values `[kv_heads, clusters, head_dim]`, counts `[kv_heads,
    clusters]`; where a count is 0, none."""

    keys: torch.Tensor
    values: torch.Tensor
    counts: torch.Tensor


def reference_sparse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weighed: torch.Tensor,
    scale: float,
    log_weights: torch.Tensor | None = None,
    centroids: Centroids | None = None,
) -> torch.Tensor:
    """The output `[q_heads, head_dim]` of queries `[q_heads, head_dim]` that weigh some of the rows `[kv_heads, n,
    head_dim]`: those of the bool `[q_heads, n]`.

    log_weights `[q_heads, n]` (natural logarithms) are added to logits, as are the logarithms of centroids' counts.
    """
    group = q.shape[0] // k.shape[0]
    keys, values = (t.double().repeat_interleave(group, dim=0) for t in (k, v))
    logits = torch.einsum("hd,hnd->hn", q.double(), keys) * scale
    if log_weights is not None:
        logits = logits + log_weights
    logits = logits.masked_fill(~weighed, -torch.inf)
    if centroids is not None:
        mean_keys, mean_values = (
            t.double().repeat_interleave(group, dim=0) for t in (centroids.keys, centroids.values)
        )
        counts = centroids.counts.double().repeat_interleave(group, dim=0)
        logits = torch.cat([logits, torch.einsum("hd,hcd->hc", q.double(), mean_keys) * scale + counts.log()], dim=1)
        values = torch.cat([values, mean_values], dim=1)
    return torch.einsum("hn,hnd->hd", logits.softmax(dim=-1), values)


def reference_centroids(
    index: Index, layer: int, keys: torch.Tensor, values: torch.Tensor, read: torch.Tensor
) -> Centroids:
    """The tail: means of whole clusters, counted as often as rows of theirs are not read.

    keys, values `[kv_heads, n, head_dim]` and read bool `[kv_heads, n]` of all rows of the sequence.
    """
    planes = _planes(index, layer)
    parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for block in index.blocks:
        assigned = block.arrays["assigned"][planes].long()
        clusters = block.arrays["counts"].shape[1]
        member = torch.nn.functional.one_hot(assigned, clusters).double().transpose(1, 2)  # [kv_heads, clusters, n]
        sizes = member.sum(-1, keepdim=True).clamp(min=1)
        here = slice(block.begin, block.end)
        left = member @ (~read[:, here, None]).double()
        parts.append((member @ keys[:, here].double() / sizes, member @ values[:, here].double() / sizes, left[..., 0]))
    return Centroids(*(torch.cat(t, dim=1) for t in zip(*parts, strict=True)))


def reference_scores(index: Index, layer: int, q: torch.Tensor, keys: torch.Tensor, end: int) -> torch.Tensor:
    """What candidates are ranked by: float64 `[choosers, units]` for exact keys, signs, ranked rows and clusters.

    q `[q_heads, head_dim]`, keys `[kv_heads, n, head_dim]` of all rows, end: position after the last candidate. A
    chooser is a query head, or a KV head if its query heads choose together. Scores of signs are whole numbers, as
    the kernel has them.
    """
    method, group = index.method, index.shape.group
    planes = _planes(index, layer)
    grouped = q.double().view(-1, group, q.shape[1])  # [kv_heads, group, head_dim]
    if method.rank == Rank.KEYS:
        scores = torch.einsum("hgd,hnd->hgn", grouped, keys[:, method.sinks : end].double())
    elif method.rank == Rank.SIGNS:
        directions = unpack_directions(index.frozen["directions"][planes])
        x = torch.einsum("hgd,hbd->hgb", grouped, directions.double())
        scores = torch.cat([_sign_scores(x, b.arrays, planes) for b in index.blocks], dim=-1)
    else:
        rows = torch.cat([b.arrays["rows"][planes] for b in index.blocks], dim=1).double()
        if rows.shape[-1] == 2 * q.shape[-1]:  # the least and the greatest of each channel
            least, greatest = (t[:, None] for t in rows.chunk(2, dim=-1))
            x = grouped[:, :, None]
            scores = torch.maximum(x * least, x * greatest).sum(-1)
        else:
            scores = torch.einsum("hgd,hnd->hgn", grouped, rows)
    return scores.sum(1) if method.shared else scores.flatten(0, 1)


def _sign_scores(x: torch.Tensor, arrays: dict[str, torch.Tensor], planes: slice) -> torch.Tensor:
    """Every four directions' sum of +-x is rounded to 127 steps of the largest such sum; a key's sum of those times
    its factor is cut to 16 bits."""
    signs = unpack_signs(arrays["signs"][planes])
    factors = arrays["factors"][planes].double()
    bits = signs.shape[-1]
    top = x.abs().view(*x.shape[:-1], -1, 4).sum(-1).amax(-1)
    steps = torch.where(top > 0, 127 / top, 0.0)
    signed = torch.where(signs[:, None], 1.0, -1.0) * x[:, :, None]  # [kv_heads, group, n, bits]
    sums = signed.view(*signed.shape[:-1], -1, 4).sum(-1) * steps[..., None, None]
    rounded = (sums + 0.5 * sums.sign()).trunc().sum(-1)
    shift = sign_shift(bits)
    return torch.floor(rounded * factors[:, None] / 2**shift)


def sign_shift(bits: int) -> int:
    """Bits that scores of signs lose, so that they fit into 16."""
    shift = 0
    while (127 * 255 * (bits // 4)) >> shift > 32767:
        shift += 1
    return shift


def unpack_signs(packed: torch.Tensor) -> torch.Tensor:
    """The opposite of `pack_signs`: bool `[planes, n, count]`."""
    planes, groups, words, _ = packed.shape
    rows = packed.transpose(2, 3).reshape(planes, groups * 16, words)
    return (rows[..., None] >> torch.arange(32, dtype=torch.int32) & 1).flatten(-2).bool()


def unpack_directions(data: torch.Tensor) -> torch.Tensor:
    """Packed `[..., panels, in / pack, 32, pack]` -> `[..., panels * 32, in]`."""
    return data.transpose(-2, -3).flatten(-2).flatten(-3, -2).view(*data.shape[:-4], data.shape[-4] * PANEL, -1)


def cluster_tokens(index: Index, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of all blocks: which cluster each candidate belongs to `[kv_heads, candidates]`, and the sizes `[kv_heads,
    clusters]`."""
    planes = _planes(index, layer)
    assigned, before = [], 0
    for block in index.blocks:
        assigned.append(block.arrays["assigned"][planes].long() + before)
        before += block.arrays["counts"].shape[1]
    return torch.cat(assigned, dim=1), torch.cat([b.arrays["counts"][planes] for b in index.blocks], dim=1)


def kept_marks(index: Index, layer: int) -> torch.Tensor:
    """bool `[kv_heads, candidates]` of a choice made when blocks were built."""
    words = torch.cat([b.arrays["keep"][_planes(index, layer)] for b in index.blocks], dim=1)
    return (words[..., None] >> torch.arange(64) & 1).flatten(-2).bool()


def reference_collisions(
    index: Index, layer: int, q: torch.Tensor, directions: torch.Tensor, tolerance: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidates that share a bucket with a query in two tables or more, bool `[q_heads, candidates]` twice: surely,
    and if projections nearer to 0 than the tolerance fall as they may."""
    method = index.method
    assert isinstance(method, LSH)
    planes, tables = _planes(index, layer), method.L
    products = q.double() @ directions.double().T
    codes = reference_codes((products > 0)[:, None, : method.K * tables], method.K, tables)  # [q_heads, tables, 1]
    certain = (products.abs() > tolerance)[:, : method.K * tables].view(-1, tables, method.K).all(-1)[..., None]
    keys = torch.cat([_codes(b.arrays, planes, method.K) for b in index.blocks], dim=-1)
    equal = keys.repeat_interleave(index.shape.group, dim=0) == codes
    return (equal & certain).sum(1) >= 2, (equal | ~certain).sum(1) >= 2


def _codes(arrays: dict[str, torch.Tensor], planes: slice, bits: int) -> torch.Tensor:
    """int64 codes `[kv_heads, tables, n]`, from the codes of a small block or the buckets of a large one."""
    if "codes" in arrays:
        return arrays["codes"][planes].long()
    heads, ids = arrays["heads"][planes].long(), arrays["ids"][planes].long()
    codes = torch.empty_like(ids)
    for plane in range(ids.shape[0]):
        for table in range(ids.shape[1]):
            bucket = torch.repeat_interleave(torch.arange(2**bits), heads[plane, table].diff())
            codes[plane, table, ids[plane, table]] = bucket
    return codes


def reference_log_inclusion(index: Index, layer: int, q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Natural logarithm of the probability that LSH finds each of the rows `[kv_heads, n, head_dim]`, `[q_heads,
    n]`."""
    method = index.method
    assert isinstance(method, LSH)
    centred = keys.double() - index.frozen["mean"][_planes(index, layer)].double()[:, None]
    unit = centred / centred.norm(dim=-1, keepdim=True).clamp(min=1e-300)
    cosine = torch.einsum("hd,hnd->hn", q.double(), unit.repeat_interleave(index.shape.group, dim=0))
    cosine = cosine / q.double().norm(dim=-1, keepdim=True).clamp(min=1e-300)
    table = log_inclusion_table(method.K, method.L).double().numpy()
    log_u = np.interp(cosine.numpy(), np.linspace(-1, 1, COSINES), table)
    return torch.from_numpy(log_u) * float(np.log(2))


def chosen_units(method: SparseMethod, budget: int) -> int:
    """Units that a chooser takes: whole pages or blocks."""
    unit = int(getattr(method, "page", getattr(method, "block", 1)))
    return -(-budget // unit)


def _planes(index: Index, layer: int) -> slice:
    slot, kv_heads = index.layers.index(layer), index.shape.heads.kv_heads
    return slice(slot * kv_heads, (slot + 1) * kv_heads)


class RandomStream:
    """Uniform numbers of one (seed, position, layer, head), as the kernels draw them: splitmix64."""

    def __init__(self, seed: int, position: int, layer: int, head: int) -> None:
        self._state = _mixed((_mixed((seed + position) % 2**64) + layer * 0x10001 + head) % 2**64)

    def uniform(self) -> float:
        self._state = (self._state + 0x9E3779B97F4A7C15) % 2**64
        return float(_mixed(self._state) >> 11) * 2.0**-53


def _mixed(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def reference_sample(random: RandomStream, read: torch.Tensor, count: int) -> torch.Tensor:
    """`count` candidates drawn uniformly, with replacement, from those that are not read (bool `[candidates]`)."""
    n, taken = read.shape[0], read.tolist()
    drawn: list[int] = []
    while len(drawn) < count:
        c = int(random.uniform() * n)
        if not taken[c]:
            drawn.append(c)
    return torch.tensor(drawn, dtype=torch.int64)


def reference_sample_size(
    logits: torch.Tensor, values: torch.Tensor, exact: torch.Tensor, pilot: torch.Tensor, rest: int, confidence: float
) -> float:
    """Draws that numerator and denominator of a group's outputs need for the stated error (vAttention, section 4.2).

    logits `[group, n]`, values `[n, head_dim]`, exact: bool `[n]` of rows that are weighed anyway; pilot: drawn rows
    of the `rest` others.
    """
    weights = (logits - logits.amax(1, keepdim=True)).exp()
    wanted = 0.0
    for w in weights:
        light, count = w[pilot], len(pilot)
        total = float(w[exact].sum()) + rest * float(light.mean())
        spread = float(light.var())
        products = light[:, None] * values[pilot]
        sums = (w[exact, None] * values[exact]).sum(0) + rest * products.mean(0)
        spread_products = float((products - products.mean(0)).square().sum()) / (count - 1)
        wanted = max(wanted, rest**2 * confidence * spread / total**2)
        wanted = max(wanted, rest**2 * confidence * spread_products / float(sums.square().sum()))
    return wanted
