"""The attention kernel against its float64 reference, at every instruction set, over ragged batches and odd shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.kernels import _native
from thresher.kernels.attention import AttentionPlan, Heads, Visibility, reference_attention

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


class Cached:
    """A sequence cut into runs of the given lengths; the last has room for the new rows."""

    def __init__(self, lengths, new, heads, dtype, layers=2, shared=None):
        self.new, self.past = new, sum(lengths)
        self.segments = list(shared or [])
        self.past += sum(used for _, used in self.segments)
        shape = lambda rows: (layers, 2, heads.kv_heads, rows, heads.head_dim)  # noqa: E731
        for n in lengths[:-1]:
            self.segments.append((torch.randn(shape(n + 3)).to(dtype), n))
        tail = torch.full(shape(lengths[-1] + new + 5), float("nan"))
        tail[:, :, :, : lengths[-1]] = torch.randn(shape(lengths[-1]))
        self.segments.append((tail.to(dtype), lengths[-1] + new))

    def rows(self, layer):
        parts = [data[layer, :, :, :used] for data, used in self.segments]
        return torch.cat(parts, dim=2)


def run(sequences, heads, dtype, layer=1, layer_window=0, visibility=None, blank=0):
    """Attend all in one plan; returns the output of each and its float64 reference."""
    visibility = visibility or [None] * len(sequences)
    plan = AttentionPlan(heads, dtype, _native.Workspace())
    for s, see in zip(sequences, visibility, strict=True):
        plan.add(s.new, s.past, s.segments, see)
    n = sum(s.new for s in sequences)
    width = (heads.q_heads + 2 * heads.kv_heads) * heads.head_dim
    qkv = torch.randn(n, width).to(dtype).view(n, -1, heads.head_dim)
    q, k, v = qkv.split([heads.q_heads, heads.kv_heads, heads.kv_heads], dim=1)
    scale = heads.head_dim**-0.5
    out = plan.attend(layer, q, k, v, scale, layer_window, blank)
    outs, references, at = [], [], 0
    for s, see in zip(sequences, visibility, strict=True):
        keys, values = s.rows(layer)
        assert torch.equal(keys[:, s.past :], k[at : at + s.new].transpose(0, 1))
        outs.append(out[at : at + s.new])
        references.append(reference_attention(q[at : at + s.new], keys, values, scale, layer_window, see, blank))
        at += s.new
    return outs, references


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("blank", [1, 3, 64, 300])
@pytest.mark.parametrize(
    ("window", "visibility"), [(0, None), (70, None), (0, Visibility(40, 5)), (90, Visibility(40, 80))]
)
def test_blank_rows_are_seen_by_nobody(isa, dtype, blank, window, visibility):
    """And queries that see only such rows, which come first in a sequence, give 0."""
    torch.manual_seed(blank)
    heads = Heads(4, 2, 32)
    batch = [
        Cached(lengths, new, heads, dtype)
        for lengths, new in (([0], 1), ([0], 100), ([0], 3), ([500], 1), ([40, 290], 5))
    ]
    check(*run(batch, heads, dtype, 1, window, [visibility] * len(batch), blank), dtype)


def test_one_plan_for_several_windows():
    """What a plan has worked out is used again only for the same window, by another layer or the same."""
    heads = Heads(4, 2, 32)
    cached = Cached([700], 1, heads, torch.float32, layers=3)
    plan = AttentionPlan(heads, torch.float32, _native.Workspace())
    plan.add(1, cached.past, cached.segments)
    for layer, window in ((0, 300), (1, 0), (2, 300), (0, 0), (1, 40), (1, 0)):
        q, k, v = (torch.randn(1, n, 32) for n in (4, 2, 2))
        out = plan.attend(layer, q, k, v, 32**-0.5, window)
        check([out], [reference_attention(q, *cached.rows(layer), 32**-0.5, window, None)], torch.float32)


def check(outs, references, dtype):
    for out, reference in zip(outs, references, strict=True):
        assert (out.double() - reference).abs().max() < TOLERANCE[dtype] * (1 + reference.abs().max())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_dim", [16, 20, 64, 80, 128])
def test_matches_reference(isa, dtype, head_dim):
    torch.manual_seed(head_dim)
    heads = Heads(6, 2, head_dim)
    batch = [Cached(lengths, new, heads, dtype) for lengths, new in BATCH]
    check(*run(batch, heads, dtype), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("layer_window", "head_dim"), [(0, 64), (0, 20), (300, 64), (100, 128)])
def test_votes(isa, dtype, layer_window, head_dim):
    """What new tokens weigh each row, summed over them and the query heads of a KV head, beside others that do not
    vote; a second pass adds to the first."""
    torch.manual_seed(head_dim)
    heads, scale = Heads(6, 2, head_dim), head_dim**-0.5
    shared = [(torch.randn(2, 2, 2, 512, head_dim).to(dtype), 512)]
    batch = [
        Cached([300, 7], 3, heads, dtype),
        Cached([9], 2, heads, dtype, shared=shared),
        Cached([400], 1, heads, dtype, shared=shared),
        Cached([600], 40, heads, dtype),
        Cached([0], 16, heads, dtype),
    ]
    voting = [0, 2, 4]
    votes = {i: torch.zeros(2, 2, batch[i].past + batch[i].new + 3) for i in voting}
    q, k, v = (torch.randn(sum(s.new for s in batch), n, head_dim).to(dtype) for n in (6, 2, 2))
    outs = []
    for counted in (True, True, False):
        plan = AttentionPlan(heads, dtype, _native.Workspace())
        for i, s in enumerate(batch):
            plan.add(s.new, s.past, s.segments, votes=votes.get(i) if counted else None)
        outs.append(plan.attend(1, q, k, v, scale, layer_window))
    assert torch.equal(outs[0], outs[2])
    for i in voting:
        at, s = sum(other.new for other in batch[:i]), batch[i]
        keys, total = s.rows(1)[0].double(), s.past + s.new
        queries = q[at : at + s.new].double().view(s.new, 2, 3, head_dim)
        scores = torch.einsum("nhgd,hld->hgnl", queries, keys) * scale
        position, key = torch.arange(s.past, total)[:, None], torch.arange(total)
        seen = (key <= position) & ((key > position - layer_window) | (layer_window == 0))
        expected = 2 * scores.masked_fill(~seen, -torch.inf).softmax(-1).sum((1, 2))
        assert (votes[i][1, :, :total] - expected).abs().max() < TOLERANCE[dtype] * expected.max()
        assert votes[i][1, :, :total].sum(-1) == pytest.approx(
            [2 * 3 * s.new] * 2, rel=1e-4 if dtype == torch.float32 else 1e-2
        )
        assert not votes[i][0].any()  # another layer
        assert not votes[i][1, :, total:].any()


def test_refused_votes():
    heads = Heads(4, 2, 16)
    cached, long = Cached([30], 2, heads, torch.float32), Cached([30], 17, heads, torch.float32)
    for s, votes in ((cached, torch.zeros(2, 2, 31)), (long, torch.zeros(2, 2, 60)), (cached, torch.zeros(2, 1, 32))):
        with pytest.raises(ValueError, match="votes"):
            AttentionPlan(heads, torch.float32, _native.Workspace()).add(s.new, s.past, s.segments, votes=votes)


BATCH = [
    ([0], 1),
    ([0], 16),
    ([300], 1),
    ([100, 200, 7], 5),
    ([255], 2),
    ([512], 1),
    ([40, 600], 17),
    ([3], 130),
]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("layer_window", "visibility"),
    [(100, None), (0, Visibility(64, 4)), (300, Visibility(64, 4)), (1, None), (0, Visibility(1, 0))],
)
def test_windows_and_sinks(isa, dtype, layer_window, visibility):
    torch.manual_seed(1)
    heads = Heads(4, 2, 32)
    batch = [Cached(lengths, new, heads, dtype) for lengths, new in BATCH]
    see = [visibility if i % 3 else None for i in range(len(batch))]
    check(*run(batch, heads, dtype, layer_window=layer_window, visibility=see), dtype)


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 400), min_size=1, max_size=4), st.integers(1, 40)),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from([(1, 1), (3, 3), (9, 3), (8, 1)]),
    st.sampled_from([0, 1, 50, 256, 1000]),
    st.sampled_from([None, Visibility(1, 0), Visibility(70, 3), Visibility(10, 600)]),
    st.integers(0, 2**31),
)
def test_any_ragged_batch(shapes, head_counts, layer_window, visibility, seed):
    torch.manual_seed(seed)
    heads = Heads(*head_counts, 16)
    batch = [Cached(lengths, new, heads, torch.float32) for lengths, new in shapes]
    outs, references = run(batch, heads, torch.float32, 0, layer_window, [visibility] * len(batch))
    check(outs, references, torch.float32)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_shared_prefix_is_read_once(isa, dtype):
    torch.manual_seed(2)
    heads = Heads(6, 2, 64)
    prefix = [(torch.randn(2, 2, 2, 1000, 64).to(dtype), 900)]
    alone = AttentionPlan(heads, dtype, _native.Workspace())
    batch = [Cached([7 * i], 1, heads, dtype, shared=prefix) for i in range(5)]
    check(*run(batch, heads, dtype), dtype)
    plan = AttentionPlan(heads, dtype, _native.Workspace())
    for s in batch:
        plan.add(s.new, s.past, s.segments)
    alone.add(batch[0].new, batch[0].past, batch[0].segments)
    # 768 rows lie in whole splits of the prefix; only what follows is read by each sequence.
    assert plan.rows_read() == 768 + sum(s.past + 1 - 768 for s in batch)
    assert alone.rows_read() == 901


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_view_into_a_longer_run(isa, dtype):
    """Forks of different lengths over one run: the shorter must not see the longer's rows."""
    torch.manual_seed(3)
    heads = Heads(2, 1, 32)
    data = torch.randn(2, 2, 1, 700, 32).to(dtype)
    batch = [Cached([0], 1, heads, dtype, shared=[(data, used)]) for used in (700, 513, 512, 5)]
    check(*run(batch, heads, dtype), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_bitwise_independent_of_chunks_batch_and_runs(isa, dtype):
    """One row's result is the same bits alone or in a batch, in one chunk or many, in one run or many."""
    torch.manual_seed(4)
    heads, n = Heads(6, 2, 64), 700
    q = torch.randn(n, 6, 64).to(dtype)
    k, v = (torch.randn(n, 2, 64).to(dtype) for _ in range(2))

    def attend(chunks, capacities):
        shape = lambda rows: (1, 2, 2, rows, 64)  # noqa: E731
        runs = [torch.empty(shape(c)).to(dtype) for c in capacities]
        outs, at = [], 0
        ends = torch.tensor(capacities).cumsum(0).tolist()
        for chunk in chunks:
            plan = AttentionPlan(heads, dtype, _native.Workspace())
            index = next(i for i, end in enumerate(ends) if at + chunk <= end)
            segments = [(r, c) for r, c in zip(runs[:index], capacities, strict=False)]
            plan.add(chunk, at, [*segments, (runs[index], at + chunk - sum(capacities[:index]))])
            other = Cached([333], 3, heads, dtype, layers=1)
            plan.add(other.new, other.past, other.segments)
            noise = torch.randn(3, 10, 64).to(dtype)
            rows = slice(at, at + chunk)
            out = plan.attend(
                0,
                torch.cat([q[rows], noise[:, :6]]),
                torch.cat([k[rows], noise[:, 6:8]]),
                torch.cat([v[rows], noise[:, 8:]]),
                0.125,
            )
            outs.append(out[:chunk])
            at += chunk
        return torch.cat(outs)

    whole = attend([n], [n])
    assert torch.equal(whole, attend([1] * 300 + [7, 93, 300], [100, 200, 400]))
    assert torch.equal(whole, attend([512, 16, 172], [512, 188]))


def test_bad_plans_are_refused():
    plan = AttentionPlan(Heads(2, 1, 16), torch.float32, _native.Workspace())
    data = torch.zeros(1, 2, 1, 8, 16)
    for queries, past, segments in [
        (0, 4, [(data, 4)]),
        (1, 9, [(data, 4)]),
        (3, 5, [(data, 6), (data, 2)]),
        (1, 8, [(data, 9)]),
    ]:
        with pytest.raises(ValueError, match="Plan"):
            plan.add(queries, past, segments)
    with pytest.raises(ValueError, match="heads"):
        AttentionPlan(Heads(3, 2, 16), torch.float32, _native.Workspace())
