"""What is not a number, and what belongs to another model or is too small, neither ends the process nor is read."""

import gc

import pytest
import torch
from harness import Case, attend

from thresher.kernels import _native
from thresher.kernels.attention import AttentionPlan, Heads, reference_attention

HEADS = Heads(4, 2, 32)
SPECS = [
    "lsh:K=4,L=20", "lsh:K=4,L=20,certify=0.2", "sign:budget=64", "sign:budget=64,tail=8", "quest:budget=64",
    "block_topk:budget=64", "clusters:budget=64", "topk:budget=64", "sample:draws=64", "verified:heavy=32",
]  # fmt: skip
BAD = [float("nan"), float("inf"), -float("inf"), 3e38]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("new", [1, 3, 40])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_dense_attention_of_no_numbers_is_none(isa, dtype, new, bad):
    """A query, a whole split of keys, or one key that are not numbers: NaN where the float64 reference has it."""
    for where in ("query", "split", "key"):
        case = Case(None, HEADS, 700, dtype, new=new)
        if where == "query":
            case.q[0, 1] = bad
        else:
            data = case.sequence.segments()[0][0]
            data[:, 0, 0, slice(256, 512) if where == "split" else 300] = bad
        keys, values = case.rows()
        reference = reference_attention(case.q, keys, values, case.scale)
        assert reference.isnan().any()
        out = attend([case])[0]
        assert torch.equal(out.isnan(), reference.isnan())


@pytest.mark.parametrize("payload", [0x7F800001, 0x7FFFFFFF, -1])
def test_any_nan_stays_one(isa, payload):
    """Whatever the bits below its exponent are."""
    case = Case(None, HEADS, 300)
    case.q.view(torch.int32)[0, 1] = payload
    out = attend([case])[0]
    assert out[0, 1].isnan().all()
    assert out[0, [0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("where", ["query", "keys", "values"])
def test_sparse_steps_survive_what_is_not_a_number(isa, spec, where):
    for bad in BAD:
        case = Case(spec + ",dense_layers=none,dense_below=0", HEADS, 1300)
        if where == "query":
            case.q[0] = bad
        else:
            case.sequence.segments()[0][0][:, int(where == "values"), :, 64:1200] = bad
        out = attend([case])[0]
        if where == "query" and bad != bad:
            assert out.isnan().all()


@pytest.mark.parametrize("spec", SPECS)
def test_indexes_of_no_numbers(isa, spec):
    """As a file may hold them: every float of the index."""
    for bad in BAD:
        case = Case(spec + ",dense_layers=none,dense_below=0", HEADS, 1300)
        arrays = [*case.index.frozen.values(), *(t for b in case.index.blocks for t in b.arrays.values())]
        for t in arrays:
            if t.dtype.is_floating_point:
                t.fill_(bad)
        attend([case])


def test_hostile_tables(isa):
    """Buckets that begin or end anywhere, and ids beyond the block, stay inside of the tables."""
    torch.manual_seed(0)
    case = Case("lsh:K=4,L=20,dense_layers=none,dense_below=0", HEADS, 1300)
    block = case.index.blocks[0].arrays
    block["heads"].copy_(torch.randint(-(2**31), 2**31 - 1, block["heads"].shape).int())
    attend([case])
    block["heads"][..., ::2], block["heads"][..., 1::2] = 0, 2**31 - 1
    block["ids"].copy_(torch.full(block["ids"].shape, 65535).to(torch.uint16))
    attend([case])


def test_hostile_clusters(isa):
    case = Case("clusters:budget=64,dense_layers=none,dense_below=0", HEADS, 1300)
    block = case.index.blocks[0].arrays
    block["assigned"].copy_(torch.full(block["assigned"].shape, 65535).to(torch.uint16))
    attend([case])


@pytest.mark.parametrize(("spec", "dim"), [("quest", 640), ("quest", 1280), ("topk", 2048), ("block_topk", 2048)])
def test_wide_heads(isa, spec, dim):
    """Queries that are ranked by have the room they need: the step with two KV heads is that with each alone."""
    heads = Heads(4, 2, dim)
    case = Case(f"{spec}:budget=64,dense_layers=none,dense_below=0", heads, 500)
    out = case.attend()
    for kv_head in range(2):
        kv = case.sequence.rows(0, 500)[:, :, kv_head : kv_head + 1].contiguous()
        alone = Case(str(case.method), Heads(2, 1, dim), 500, kv=kv)
        alone.q, alone.k, alone.v = case.q[:, 2 * kv_head :][:, :2], *(t[:, kv_head:][:, :1] for t in (case.k, case.v))
        assert torch.equal(alone.attend()[0], out[0, 2 * kv_head :][:2])


def test_blocks_that_lack_or_exceed_are_refused():
    case = Case("sign:budget=64,dense_layers=none,dense_below=0", HEADS, 1300)
    (block,) = case.index.blocks[:1]
    arrays = block.arrays

    def refused(match, **changed):
        given = {name: t for name, t in (arrays | changed).items() if t is not None}
        with pytest.raises(ValueError, match=match):
            case.index._native.set_blocks([(block.begin, block.end, given)])

    refused("missing", signs=None)
    refused("missing", signs=None, factors=None)
    refused("no method", signs=None, sings=arrays["signs"])
    refused("signs has", signs=arrays["signs"][:, :-1].contiguous())
    refused("factors has", factors=torch.cat([arrays["factors"]] * 2))
    refused("contiguous", signs=arrays["signs"].transpose(1, 2))
    for begin, end in [(block.begin + 64, block.end + 64), (block.begin, block.end - 1), (block.end, block.begin)]:
        with pytest.raises(ValueError, match="follow"):
            case.index._native.set_blocks([(begin, end, arrays)])
    attend([case])  # a refusal changes nothing


def test_methods_that_do_not_fit_are_refused():
    case = Case("lsh:K=4,L=20,dense_layers=none,dense_below=0", HEADS, 1300)
    right = case.index._parameters()
    for changed in (
        {"log_u_count": right["log_u_count"] + 1}, {"tables": 21}, {"tables": 300}, {"bits": 17}, {"planes": 10000},
        {"mean": right["mean"][:1]}, {"directions": right["directions"][:1]}, {"row_dim": 4096}, {"unit": 3},
        {"rank": 9}, {"take": 1}, {"rank": 2},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="Index"):
            case.index._native.set_method(right | changed)
    attend([case])
    quest = Case("quest:budget=64,dense_layers=none,dense_below=0", HEADS, 1300)
    with pytest.raises(ValueError, match="errors are estimated of what tables find"):
        quest.index._native.set_method(quest.index._parameters() | {"certify": 0.2})


def test_segments_and_indexes_of_another_model_are_refused():
    case = Case("sign:budget=64,dense_layers=none,dense_below=0", HEADS, 1300, layers=3)
    case.sequence.reserve(1)
    incoming = case.sequence.incoming(1)
    for heads in (Heads(4, 1, 32), Heads(4, 4, 32), Heads(4, 2, 64)):
        plan = AttentionPlan(heads, torch.float32, _native.Workspace())
        with pytest.raises(ValueError, match="not that of this model"):
            plan.add(1, 1300, incoming)
    plan = AttentionPlan(HEADS, torch.bfloat16, _native.Workspace())
    with pytest.raises(ValueError, match="not that of this model"):
        plan.add(1, 1300, incoming)
    plan = AttentionPlan(HEADS, torch.float32, _native.Workspace())
    plan.add(1, 1300, incoming)
    for layer in (-1, 3, 23):
        with pytest.raises(ValueError, match=f"layer {layer} of 3"):
            plan.attend(layer, case.q, case.k, case.v, case.scale)
    other = Case(None, HEADS, 300, layers=2)
    other.sequence.reserve(1)
    with pytest.raises(ValueError, match="equal layers"):
        plan.add(1, 300, other.sequence.incoming(1))
    for heads, layers in ((Heads(2, 2, 32), 3), (HEADS, 2)):
        stranger = Case("sign:budget=64,dense_layers=none,dense_below=0", heads, 1300, layers=layers)
        with pytest.raises(ValueError, match="another model"):
            plan.add(1, 1300, incoming, None, stranger.reading)
    with pytest.raises(ValueError, match="the plan is for"):
        plan.attend(0, case.q[:, :2], case.k, case.v, case.scale)


def test_a_plan_keeps_what_it_reads():
    """Index, arrays, rows and workspace may be dropped, or replaced, by whoever made them."""
    case = Case("sign:budget=64,dense_layers=none,dense_below=0", HEADS, 3000)
    expected = case.attend()
    plan = AttentionPlan(HEADS, torch.float32, _native.Workspace())
    plan.add(1, 3000, case.sequence.incoming(1), None, case.reading)
    case.index._native.set_blocks([])
    q, k, v, scale = case.q, case.k, case.v, case.scale
    del case
    gc.collect()
    _ = [torch.full((n,), 7.0) for n in range(1, 200000, 1999)]  # takes what was freed
    assert torch.equal(plan.attend(0, q, k, v, scale), expected)


def test_plans_may_share_a_workspace():
    """Also in turns: nothing of one lies in the way of the other."""
    workspace = _native.Workspace()
    cases = [Case("sign:budget=64,dense_layers=none,dense_below=0", HEADS, n, layers=2) for n in (600, 9000)]
    plans = []
    for case in cases:
        case.sequence.reserve(1)
        plans.append(AttentionPlan(HEADS, torch.float32, workspace))
        plans[-1].add(1, case.sequence.length, case.sequence.incoming(1), None, case.reading)
    expected = [case.attend() for case in cases]
    for _ in range(3):
        for case, plan, out in zip(cases, plans, expected, strict=True):
            assert torch.equal(plan.attend(1, case.q, case.k, case.v, case.scale), out)


@pytest.mark.parametrize("spec", ["sign:budget=200,tail=16", "verified", "lsh:K=6,L=40,certify=0.05", "quest", "topk"])
def test_long_contexts_have_the_same_bits_with_any_number_of_threads(spec):
    """Several pieces are scanned, and signs sampled first: 9,100 tokens."""
    before = torch.get_num_threads()
    try:
        outs = []
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            case = Case(f"{spec},dense_below=0" if ":" in spec else f"{spec}:dense_below=0", HEADS, 9100, layers=3)
            outs += [attend([case])[0] for _ in range(20 if count > 1 else 1)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(out, outs[0]) for out in outs)
