"""One step of sparse attention without a model, and what it weighed: found by asking, not by trusting the index."""

from copy import copy

import torch

from thresher.attention.index import Index
from thresher.attention.reference import (
    RandomStream,
    chosen_units,
    cluster_tokens,
    kept_marks,
    reference_centroids,
    reference_collisions,
    reference_log_inclusion,
    reference_sample,
    reference_sample_size,
    reference_scores,
    reference_sparse,
    sign_shift,
    unpack_directions,
)
from thresher.attention.registry import parse_method
from thresher.attention.sparse import Rank, Shape
from thresher.cache.sequence import KVLayout, KVSequence
from thresher.kernels import _native
from thresher.kernels.attention import AttentionPlan, Visibility, reference_attention

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text_like(n, heads, layers, seed):
    """Keys and values with means that are not 0, keys with directions that are longer than others, as in models."""
    kv = normal(layers, 2, heads.kv_heads, n, heads.head_dim, seed=seed)
    channel = torch.linspace(0.3, 1.7, heads.head_dim)
    kv[:, 0] = kv[:, 0] * channel + 2 * normal(layers, heads.kv_heads, 1, heads.head_dim, seed=seed + 1)
    kv[:, 1] += 1
    return kv


class Case:
    """A cached sequence, the method that reads it, and the queries, keys and values of its next tokens.

    pieces: lengths of the separate runs of memory that hold the cached rows. Without a method it is read densely.
    """

    def __init__(self, spec, heads, n, dtype=torch.float32, *, seed=0, pieces=(), kv=None, layers=1, new=1, index=True):
        self.heads, self.dtype, self.layers, self.layer, self.new = heads, dtype, layers, layers - 1, new
        self.seed = seed
        self.method = parse_method(spec) if spec else None
        self.sequence = KVSequence(KVLayout(layers, heads.kv_heads, heads.head_dim, dtype))
        kv = (text_like(n, heads, layers, seed) if kv is None else kv).to(dtype)
        at = 0
        for length in pieces or (n,):
            self.sequence.append([0] * length, kv[:, :, :, at : at + length])
            at += length
            if pieces:
                self.sequence = self.sequence.fork()  # what comes next lies elsewhere
        assert at == n
        self.index = None
        if self.method and index:
            self.index = Index(self.method, Shape(heads, dtype), layers)
            self.sequence.index = self.index
            self.extend()
        self.next_token(seed + 1000)

    def next_token(self, seed):
        heads = self.heads
        qkv = normal(self.new, heads.q_heads + 2 * heads.kv_heads, heads.head_dim, seed=seed).to(self.dtype)
        self.q, self.k, self.v = qkv.split([heads.q_heads, heads.kv_heads, heads.kv_heads], dim=1)
        self.scale = heads.head_dim**-0.5

    def extend(self):
        if self.index:
            self.index.extend(self.sequence, self.queries)

    def queries(self, n):
        """Those of the last n tokens."""
        n = min(n, self.sequence.length)
        return normal(self.layers, n, self.heads.q_heads, self.heads.head_dim, seed=self.seed + 2).to(self.dtype)

    def fork(self):
        other = copy(self)
        other.sequence = self.sequence.fork()
        other.index = other.sequence.index
        return other

    @property
    def reading(self):
        return self.index.reading(self.sequence.length) if self.index else None

    def rows(self):
        """Keys and values of all rows, with those of the new tokens: `[2, kv_heads, n, head_dim]`."""
        past = self.sequence.rows(0, self.sequence.length)
        new = torch.stack([self.k, self.v]).transpose(1, 2)
        return torch.cat([past[self.layer], new], dim=2) if past.shape[3] else new

    def attend(self):
        return attend([self])[0]

    def advance(self):
        """The new token that was attended to joins the cache."""
        self.sequence.advance([0])

    def dense(self):
        keys, values = self.rows()
        return reference_attention(self.q, keys, values, self.scale)

    def weights(self):
        """The part that each row has of each query head's output, `[q_heads, n]`: the same step over values that are
        unit vectors, head_dim rows at a time. What centroids answer is left out."""
        (keys, _), dim = self.rows(), self.heads.head_dim
        n = keys.shape[1]
        means = [b.arrays["means"] for b in self.index.blocks if "means" in b.arrays]
        saved = [m.clone() for m in means]
        for m in means:
            m[:, :, 1] = 0
        sequence = KVSequence(self.sequence.layout)
        kv = torch.zeros(self.layers, 2, self.heads.kv_heads, n - 1, dim, dtype=self.dtype)
        kv[self.layer, 0] = keys[:, :-1]
        sequence.append([0] * (n - 1), kv)
        sequence.reserve(1)
        data = sequence.incoming(1)
        assert len(data) <= 2  # the new row may lie in a run of its own
        workspace, reading, out = _native.Workspace(), self.reading, []
        unit = torch.eye(dim, dtype=self.dtype)
        for at in range(0, n, dim):
            data[0][0][self.layer, 1, :, max(0, at - dim) : at] = 0
            end = min(at + dim, n - 1)
            data[0][0][self.layer, 1, :, at:end] = unit[: end - at]
            last = torch.zeros_like(self.v)
            if at <= n - 1 < at + dim:
                last[:, :, n - 1 - at] = 1
            plan = AttentionPlan(self.heads, self.dtype, workspace)
            plan.add(1, n - 1, data, None, reading)
            out.append(plan.attend(self.layer, self.q, self.k, last, self.scale)[0])
        for m, s in zip(means, saved, strict=True):
            m.copy_(s)
        return torch.cat(out, dim=1)[:, :n].double()


def attend(cases, layer_window=0, workspace=None):
    """One pass over all; the output of each."""
    first = cases[0]
    plan = AttentionPlan(first.heads, first.dtype, workspace or _native.Workspace())
    for c in cases:
        c.sequence.reserve(c.new)
        visibility = c.method.visibility() if c.method and not c.index else None
        plan.add(c.new, c.sequence.length, c.sequence.incoming(c.new), visibility, c.reading if c.new == 1 else None)
    q, k, v = (torch.cat([getattr(c, name) for c in cases]) for name in "qkv")
    out = plan.attend(first.layer, q, k, v, first.scale, layer_window)
    return list(out.split([c.new for c in cases]))


def close(out, reference, dtype):
    assert torch.isfinite(out).all()
    error = (out.double() - reference).abs().max()
    assert error < TOLERANCE[dtype] * (1 + reference.abs().max()), float(error)


def check_step(case):
    """One step of the case against its reference: which rows were weighed, by what, the output, and the counters."""
    method = case.method
    if case.reading is None:
        visibility = None
        if case.index is None and method and method.visibility():
            visibility = Visibility(method.window, method.sinks)
        out = case.attend()
        close(out, reference_attention(case.q, *case.rows(), case.scale, 0, visibility), case.dtype)
        return out
    case.index.clear_readings()
    out = case.attend()
    counted = case.index.readings()
    (keys, values), q, end = case.rows(), case.q[0], case.reading.end
    if method.name == "verified":  # how much it reads depends on the values, so they must stay what they are
        weighed, log_weights = sampled(case, q, keys, values, end, counted)
        close(out, reference_sparse(q, keys, values, weighed, case.scale, log_weights)[None], case.dtype)
        return out
    weights = case.weights()
    weighed = weights > 0
    group, begin = case.index.shape.group, method.sinks
    # Sinks, window and what is not indexed yet are weighed in any case, by every query head.
    assert end <= max(begin, case.sequence.length - method.window)
    assert weighed[:, :begin].all()
    assert weighed[:, end:].all()
    log_weights = None
    if method.name == "lsh":
        log_weights = -reference_log_inclusion(case.index, case.layer, q, keys)
        log_weights[:, :begin] = log_weights[:, end:] = 0
        check_collisions(case, q, weighed[:, begin:end])
    elif method.name == "sample":
        log_weights = drawn(case, q, keys, weights, begin, end)
    elif method.name == "streaming":
        assert not weighed[:, begin:end].any()
    else:
        check_choice(case, q, keys, weighed[:, begin:end], end)
    read = weighed.view(-1, group, weighed.shape[1]).any(1)
    centroids = None
    if getattr(method, "tail", 0) or method.name == "clusters":
        centroids = reference_centroids(case.index, case.layer, keys, values, read)
    close(out, reference_sparse(q, keys, values, weighed, case.scale, log_weights, centroids)[None], case.dtype)
    assert counted.readings == case.heads.kv_heads
    assert counted.rows == int(read.sum())
    assert counted.head_rows == int(weighed.sum())
    return out


def check_choice(case, q, keys, weighed, end):
    """Whether the candidates that are weighed, bool `[q_heads, candidates]`, are those that the method is to choose.
    Scores so close that rounding decides may fall either way."""
    index, method, layer, budget = case.index, case.method, case.layer, case.reading.budget
    group = index.shape.group
    own = not getattr(method, "union", 1) and not method.shared
    of_group = weighed.view(-1, group, weighed.shape[1])
    if not own:
        assert (of_group == of_group[:, :1]).all()  # all heads of a group weigh what it reads
        weighed = of_group[:, 0]
    if method.rank == Rank.FIXED:
        assert torch.equal(weighed, kept_marks(index, layer))
        return
    scores = reference_scores(index, layer, q, keys, end)
    if method.rank == Rank.CLUSTERS:
        check_clusters(case, scores, weighed, budget)
        return
    tolerance = 1e-5 * (1 + float(scores.abs().max()))
    if method.rank == Rank.SIGNS:  # a few sums that lie between two numbers
        tolerance = 2.0 + (4 * 255 >> sign_shift(method.bits))
    k = min(chosen_units(method, budget), scores.shape[1])
    threshold = scores.topk(k, dim=1).values[:, -1:]
    unit = weighed.shape[1] // scores.shape[1]
    sure, maybe = scores > threshold + tolerance, scores >= threshold - tolerance
    sure, maybe = (t.repeat_interleave(unit, dim=1) for t in (sure, maybe))
    if own or method.shared:
        assert (weighed.sum(1) == k * unit).all()
    else:
        sure, maybe = (t.view(-1, group, t.shape[1]).any(1) for t in (sure, maybe))
        assert (weighed.sum(1) >= k * unit).all()
        assert (weighed.sum(1) <= group * k * unit).all()
    assert (sure <= weighed).all()
    assert (weighed <= maybe).all()


def check_clusters(case, scores, read, budget):
    """Each query head takes its best clusters as long as they hold at most `budget` tokens, or just the best; a group
    reads what any of its heads takes."""
    assigned, sizes = cluster_tokens(case.index, case.layer)
    group = case.index.shape.group
    tolerance = 1e-5 * (1 + float(scores.abs().max()))
    sure, maybe = torch.zeros_like(scores, dtype=torch.bool), torch.zeros_like(scores, dtype=torch.bool)
    for head, s in enumerate(scores):
        size = sizes[head // group]
        # Clusters of equal scores are taken together or not at all.
        held = torch.tensor([int(size[s >= t - tolerance].sum()) for t in s])
        fewest = torch.tensor([int(size[s > t + tolerance].sum()) for t in s])
        sure[head] = (held <= budget) | (s > s.max() - tolerance)
        maybe[head] = (fewest + size <= budget) | (s >= s.max() - tolerance)
    sure, maybe = (t.view(-1, group, t.shape[1]).any(1).gather(1, assigned) for t in (sure, maybe))
    assert (sure <= read).all()
    assert (read <= maybe).all()


def check_collisions(case, q, weighed):
    """Each query head weighs the keys that share a bucket with it in two tables or more."""
    directions = unpack_directions(case.method._directions(case.index.shape).data)
    sure, maybe = reference_collisions(case.index, case.layer, q, directions, 1e-4)
    assert (weighed <= maybe).all()
    assert (sure <= weighed).all()


def logits_of(case, q, keys):
    return (
        torch.einsum("hd,hnd->hn", q.double(), keys.double().repeat_interleave(case.index.shape.group, 0)) * case.scale
    )


def drawn(case, q, keys, weights, begin, end):
    """Natural logarithms of what draws put in place of exp(logit), less the logit. All draws together weigh as much as
    all candidates, so each row's part of the output says how often it was drawn."""
    draws, logits = case.reading.budget, logits_of(case, q, keys)
    total, all_rows = logits[:, begin:end].exp().sum(1, keepdim=True), logits.exp().sum(1, keepdim=True)
    counts = weights[:, begin:end] * draws * all_rows / total
    near = 1e-2 if case.dtype == torch.float32 else 0.3
    assert ((counts - counts.round()).abs() < near).all()
    counts = counts.round()
    assert (counts.sum(1) == draws).all()
    log_weights = torch.zeros_like(logits)
    log_weights[:, begin:end] = (counts / draws * total).log() - logits[:, begin:end]
    log_weights[weights == 0] = 0
    return log_weights


def sampled(case, q, keys, values, end, counted):
    """What a uniform sample weighs, bool `[q_heads, n]`, and the natural logarithms of how often each of its rows
    counts. The choice of the best rows is that of `sign`."""
    method, index, group = case.method, case.index, case.index.shape.group
    best = copy(case)  # of the same sequence, with another index
    best.method = parse_method(
        f"sign:budget={method.heavy},bits={method.bits},sinks={method.sinks},window={method.window},"
        f"dense_layers={method.dense_layers}"
    )
    best.index = Index(best.method, index.shape, case.layers)
    best.index.frozen, best.index.blocks = index.frozen, index.blocks
    best.index._hand_over()
    weighed = best.weights() > 0
    check_choice(best, q, keys, weighed[:, method.sinks : end], end)
    confidence = method.parameters(index.shape, index.frozen)["confidence"]
    log_weights, logits = torch.zeros_like(weighed, dtype=torch.float64), logits_of(case, q, keys)
    fewest, rows = 0, 0
    for kv_head in range(case.heads.kv_heads):
        heads = slice(kv_head * group, (kv_head + 1) * group)
        exact = weighed[heads][0].clone()
        read = exact[method.sinks : end]
        rest = int((~read).sum())
        rows += int(exact.sum())
        if not rest:
            continue
        pilot = max(32, int(method.pilot * rest) + 1)
        wanted = float(rest)
        if 4 * pilot < rest:
            random = RandomStream(method.seed, case.sequence.length, case.layer, kv_head)
            drawn_rows = reference_sample(random, read, pilot) + method.sinks
            wanted = reference_sample_size(logits[heads], values[kv_head].double(), exact, drawn_rows, rest, confidence)
            rows += pilot
        if wanted >= rest / 2:
            weighed[heads] = True
            rows += rest
            fewest += 1
            continue
        size = max(int(wanted) + 1, pilot)
        rows += size - pilot
        more = reference_sample(random, read, size - pilot) + method.sinks
        found, times = torch.cat([drawn_rows, more]).unique(return_counts=True)
        weighed[heads, found] = True
        log_weights[heads, found] = (times.double() * rest / size).log()
    assert counted.escalated == fewest
    assert abs(counted.rows - rows) <= (0 if case.dtype == torch.float32 else 0.02 * rows)
    return weighed, log_weights
