"""What every method must satisfy: the same checks for all, at every instruction set."""

import pytest
import torch
from harness import Case, attend, check_step, close, normal, text_like
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.attention.base import parameter_types
from thresher.attention.index import Index
from thresher.attention.reference import kept_marks, unpack_directions, unpack_signs
from thresher.attention.registry import METHODS, parse_method
from thresher.attention.sparse import Shape
from thresher.errors import UsageError
from thresher.kernels import _native
from thresher.kernels.attention import AttentionPlan, Heads, SparseReading

pytestmark = pytest.mark.usefixtures("set_threads")

METHOD_TEXTS = [
    "dense",
    "auto:budget=40,window=32,tail=8",
    "auto:budget=40,tail=0,union=0",
    "lsh:K=4,L=20",
    "lsh:K=2,L=9,sinks=0,window=1",
    "sign:budget=40",
    "sign:budget=24,union=0,bits=32",
    "sign:budget=0.1,tail=8,bits=128",
    "verified:heavy=20,epsilon=0.9,delta=0.6",
    "verified:heavy=0.1,bits=32",
    "clusters:budget=96",
    "clusters:budget=30,tokens=8",
    "quest:budget=48",
    "quest:budget=40,page=8,union=0",
    "quest:budget=64,page=32,tail=8",
    "block_topk:budget=48",
    "block_topk:budget=20,block=4,tail=8",
    "snapkv:budget=40",
    "snapkv:budget=0.1,tail=8,pool=1,observe=7",
    "streaming:window=70",
    "streaming:window=70,tail=8",
    "topk:budget=40",
    "topk:budget=40,union=0",
    "topk:budget=1,tail=8",
    "sample:draws=50",
    "sample:draws=0.02,sinks=0",
]
SPARSE_TEXTS = [t for t in METHOD_TEXTS if t != "dense"]

# Each reads all rows of a context of at most 700 tokens, or answers densely.
COVERING_TEXTS = [
    "dense",
    "auto:budget=700",
    "lsh:K=0,L=2",
    "lsh:K=6,L=9,certify=0.000001",
    "sign:budget=700",
    "sign:budget=0.9999,tail=8",
    "verified:heavy=700",
    "verified:heavy=8,epsilon=0.001,delta=0.01",
    "clusters:budget=700",
    "quest:budget=700,union=0",
    "block_topk:budget=700,tail=4",
    "snapkv:budget=700",
    "streaming:window=700",
    "streaming:window=700,tail=8",
    "topk:budget=700",
    "topk:budget=700,tail=8",
    "topk:budget=700,union=0",
]

SHAPES = [
    (Heads(2, 2, 64), torch.float32),
    (Heads(6, 2, 64), torch.bfloat16),
    (Heads(8, 1, 16), torch.float32),
    (Heads(3, 1, 80), torch.float32),
    (Heads(6, 2, 16), torch.bfloat16),
    (Heads(8, 1, 128), torch.bfloat16),
]
SHAPE_NAMES = [f"{h.q_heads}-{h.kv_heads}-{h.head_dim}-{str(d).split('.')[1]}" for h, d in SHAPES]

sparse_methods = pytest.mark.parametrize("text", SPARSE_TEXTS)
shapes = pytest.mark.parametrize(("heads", "dtype"), SHAPES, ids=SHAPE_NAMES)


def changed(text, **parameters):
    """The method's text with other parameters."""
    name, _, rest = text.partition(":")
    parts = [p for p in rest.split(",") if p and p.partition("=")[0] not in parameters]
    return f"{name}:{','.join([*parts, *(f'{k}={v}' for k, v in parameters.items())])}"


BUILT = {}


def make(text, heads, n, dtype=torch.float32, **options):
    """A case in which all layers are read by the method. What is a matter of positions alone has no index.

    What is built without compiled kernels is built once, and handed out as forks.
    """
    text = text if text == "dense" else changed(text, dense_layers="none")
    plain = text == "dense" or parse_method(text).visibility() is not None
    if text.startswith("lsh") or set(options) != {"seed"}:
        return Case(text, heads, n, dtype, index=not plain, **options)
    key = (text, heads, n, dtype, options["seed"])
    if key not in BUILT:
        BUILT[key] = Case(text, heads, n, dtype, index=not plain, **options)
    return BUILT[key].fork()


def test_every_method_is_in_the_matrix():
    assert {t.partition(":")[0] for t in METHOD_TEXTS} == set(METHODS)
    # Which rows `sample` reads is left to chance, however many it may draw.
    assert {t.partition(":")[0] for t in COVERING_TEXTS} == set(METHODS) - {"sample"}


@shapes
@pytest.mark.parametrize("text", COVERING_TEXTS)
def test_a_budget_that_covers_the_context_gives_the_dense_output(isa, heads, dtype, text):
    case = make(text, heads, 640, dtype, seed=1)
    assert text.startswith(("dense", "streaming")) or case.reading
    close(case.attend(), case.dense(), dtype)


@shapes
@pytest.mark.parametrize("text", METHOD_TEXTS)
def test_matches_the_reference_of_its_choice(isa, heads, dtype, text):
    check_step(make(text, heads, 600, dtype, seed=2))


@shapes
def test_some_of_what_is_verified_is_sampled(heads, dtype):
    """Else the matrix would not see samples."""
    case = make("verified:heavy=20,epsilon=0.9,delta=0.6", heads, 600, dtype, seed=2)
    case.index.clear_readings()
    case.attend()
    counted = case.index.readings()
    assert counted.escalated < counted.checked == heads.kv_heads


@sparse_methods
def test_layers_have_indexes_of_their_own(text):
    """The last of three layers, of which the first is dense and the second holds other keys."""
    case = Case(changed(text, dense_layers="0"), Heads(6, 2, 16), 500, layers=3, seed=3)
    assert case.index.layers == [1, 2]
    check_step(case)
    case.layer = 0
    close(case.attend(), case.dense(), torch.float32)


@sparse_methods
def test_sliding_layers_stay_dense(text):
    case = make(text, Heads(4, 2, 16), 500, seed=4)
    plain = make("dense", Heads(4, 2, 16), 500, seed=4)
    if case.index is None:
        pytest.skip("what it sees is a matter of position, and ends where the layer's window ends")
    (out,), (expected,) = attend([case], layer_window=100), attend([plain], layer_window=100)
    assert torch.equal(out, expected)
    assert case.index.readings().readings == 0


@shapes
def test_the_batch_changes_no_bits(isa, heads, dtype):
    """All methods, a chunk of a prompt, a few tokens and a plain step in one pass, and each alone."""
    cases = [make(t, heads, 300 + 31 * i, dtype, seed=10 + i) for i, t in enumerate(METHOD_TEXTS)]
    cases.insert(5, Case(None, heads, 333, dtype, new=40))
    cases.insert(9, Case(None, heads, 257, dtype, new=3))
    alone = [c.attend() for c in cases]
    for order in (cases, cases[::-1]):
        together = dict(zip(map(id, order), attend(order), strict=True))
        for case, expected in zip(cases, alone, strict=True):
            assert torch.equal(together[id(case)], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_of_memory_change_no_bits(isa, dtype):
    for text in METHOD_TEXTS:
        pieces = [(), (1, 99, 300, 200), (599, 1)]
        outs = [make(text, Heads(6, 2, 64), 600, dtype, seed=5, pieces=p).attend() for p in pieces]
        assert torch.equal(outs[0], outs[1]), text
        assert torch.equal(outs[0], outs[2]), text


def test_used_memory_changes_no_bits(isa):
    """Working memory that served another sequence, a longer or a shorter one, leaves nothing of it to the next."""
    for text in METHOD_TEXTS:
        cases = [make(text, Heads(6, 2, 16), n, seed=n) for n in (300, 1500, 140, 700)]
        workspace = _native.Workspace()
        for case in [*cases, *cases]:
            assert torch.equal(attend([case], workspace=workspace)[0], case.attend()), text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bits(isa, dtype, set_threads):
    """The same cached rows and the same index; only the step differs."""
    for text in METHOD_TEXTS:
        set_threads(1)
        case = make(text, Heads(8, 4, 64), 700, dtype, seed=6)
        expected = case.attend()
        set_threads(2)
        for _ in range(3):
            assert torch.equal(case.attend(), expected), text


def grow(case, steps, seed, every=41):
    """Tokens one by one, each read before it is appended; some of them are checked."""
    outs = []
    for step in range(steps):
        case.next_token(seed + step)
        case.extend()
        outs.append(check_step(case) if step % every == 0 or step == steps - 1 else case.attend())
        case.advance()
    return torch.cat(outs)


@pytest.mark.parametrize("text", METHOD_TEXTS)
def test_growth_crop_and_forks(text):
    """Token by token from nothing to an index and merged blocks; then cut; then two forks that go on differently."""
    case = make(text, Heads(6, 2, 16), 20, seed=7)
    grow(case, 440, 1000)
    if case.index and case.method.indexed:
        sizes = [b.end - b.begin for b in case.index.blocks]
        assert len(set(sizes)) == len(sizes)  # equal ones are merged
        assert all(size % 64 == 0 for size in sizes)
        left = case.sequence.length - 1 - case.index.covered  # extended before the last token
        assert case.method.window <= left
        # One whole group has the time of 64 tokens to be built, and is read exactly until then.
        assert left < case.method.window + 128 or not case.method.grows
    for length in (400, 170, 90):
        case.sequence.crop(length)
        assert not case.index or not case.method.indexed or case.index.covered <= max(4, length - case.method.window)
        grow(case, 60, 3000 + length)
    fork = case.fork()
    lengths = case.sequence.length, fork.sequence.length
    grow(case, 70, 5000)
    grow(fork, 90, 6000)
    assert (case.sequence.length, fork.sequence.length) == (lengths[0] + 70, lengths[1] + 90)
    again = case.fork()
    assert torch.equal(grow(case, 5, 8000), grow(again, 5, 8000))


EDGES = {
    "equal keys": lambda keys: keys.copy_(keys[:, :, :1].clone().expand_as(keys)),
    "zero keys": lambda keys: keys.zero_(),
    "two keys": lambda keys: keys.copy_(keys[:, :, :2].repeat(1, 1, keys.shape[2] // 2, 1)),
    "constant channels": lambda keys: keys[..., ::2].fill_(3.0),
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("text", METHOD_TEXTS)
def test_degenerate_keys(text, edge):
    heads = Heads(6, 2, 16)
    kv = text_like(500, heads, 1, seed=8)
    EDGES[edge](kv[:, 0])
    case = make(text, heads, 500, kv=kv)
    if text.startswith("lsh") and edge == "equal keys":  # less their mean nothing is left that has a direction
        assert torch.isfinite(case.attend()).all()
    else:
        check_step(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", METHOD_TEXTS)
def test_huge_logits_stay_finite(isa, text, dtype):
    """One key has all the weight."""
    heads = Heads(6, 2, 64)
    kv = text_like(500, heads, 1, seed=9)
    kv[:, 0] *= 1000
    case = make(text, heads, 500, dtype, kv=kv)
    out = case.attend()
    assert torch.isfinite(out).all()
    assert out.abs().max() < 8  # no more than the values
    if text.startswith(("dense", "topk", "sample")):
        close(out, case.dense(), dtype)


@pytest.mark.parametrize("union", [0, 1])
@pytest.mark.parametrize("n", [500, 9000])
@pytest.mark.parametrize("text", ["topk", "sign:bits=32", "quest:page=1", "quest:page=16", "block_topk:block=4"])
def test_of_equals_the_first_are_chosen(isa, text, n, union):
    kv = normal(1, 2, 1, 1, 128, seed=1).repeat(1, 1, 1, n, 1)
    weighed = make(changed(text, budget=40, union=union), Heads(2, 1, 128), n, kv=kv).weights() > 0
    chosen = weighed[:, 4 : n - 63 - 64]
    wanted = 48 if "page=16" in text else 40
    assert chosen[:, :wanted].all()
    assert not chosen[:, wanted:].any()


@pytest.mark.parametrize("budget", [1, 37, 3000, 0.5])
@pytest.mark.parametrize("text", ["topk", "sign:bits=64", "quest:page=2", "block_topk:block=1", "clusters:tokens=16"])
def test_large_blocks(text, budget):
    """More candidates than one piece of a scan, several blocks, and a bound that is found from a sample."""
    case = make(changed(text, budget=budget), Heads(3, 1, 64), 13_000, seed=11)
    assert case.reading.end > 12_000
    check_step(case)


def test_blocks_of_lsh_with_buckets_and_with_codes():
    case = make("lsh:K=6,L=30", Heads(3, 1, 64), 1300, seed=12)
    for step in range(200):
        case.next_token(step)
        case.extend()
        case.attend()
        case.advance()
    kinds = ["heads" in b.arrays for b in case.index.blocks]
    assert kinds[0]
    assert not kinds[-1]
    case.next_token(500)
    check_step(case)


@sparse_methods
def test_contexts_with_nothing_to_choose_from(text):
    """Up to sinks + window + 63 tokens every row is read; at one more, the first block is built."""
    method = parse_method(text)
    full = method.sinks + method.window
    for n in {1, max(1, method.sinks), full, full + 63}:
        case = make(text, Heads(3, 1, 16), n, seed=13)
        assert case.reading is None or not method.indexed
        check_step(case)
    case = make(text, Heads(3, 1, 16), full + 64, seed=13)
    assert case.index is None or case.reading
    check_step(case)


@pytest.mark.parametrize("budget", [1, 63, 0.001, 0.5])
@pytest.mark.parametrize("text", [t for t in SPARSE_TEXTS if "budget" in t])
def test_budgets(text, budget):
    alone = {"share": 0} if text.startswith("auto") else {}
    case = make(changed(text, budget=budget, **alone), Heads(6, 2, 16), 500, seed=14)
    assert case.reading.budget == (budget if budget >= 1 else max(1, round(budget * 500)))
    check_step(case)


@settings(max_examples=80)
@given(
    st.sampled_from(SPARSE_TEXTS),
    st.integers(1, 500),
    st.integers(0, 20),
    st.integers(1, 100),
    st.sampled_from([(1, 1), (3, 1), (8, 2)]),
    st.integers(0, 2**31),
)
def test_any_length_sinks_and_window(text, n, sinks, window, head_counts, seed):
    check_step(make(changed(text, sinks=sinks, window=window), Heads(*head_counts, 16), n, seed=seed))


def test_the_preset_reads_its_share_at_least():
    case = make("auto:budget=2,share=0.02,dense_below=0", Heads(6, 2, 16), 500, seed=14)
    assert case.reading.budget == 10
    check_step(case)


@pytest.mark.parametrize("name", METHODS)
def test_largest_parameters(name):
    """A step runs with every number that is not refused."""
    for key, kind in parameter_types(METHODS[name]).items():
        if kind is str:
            continue
        try:
            text = str(parse_method(f"{name}:{key}={2**53 - 1}"))  # odd, as some must be
        except UsageError:
            continue
        check_step(make(text, Heads(3, 1, 16), 400, seed=22))


def test_an_index_serves_other_budgets_and_windows():
    case = make("sign:budget=40,tail=8", Heads(6, 2, 16), 500, seed=15)
    first = case.index.blocks[0]
    for text in ("sign:budget=9,tail=8,window=80", "sign:budget=100,tail=8,window=10", "sign:budget=40,tail=8"):
        case.method = parse_method(changed(text, dense_layers="none"))
        assert case.index.serves(case.method)
        case.index.use(case.method, case.sequence.length)
        case.extend()
        check_step(case)
    assert case.index.blocks[0] is first
    case.method = parse_method("sign:budget=40,tail=8,window=200,dense_layers=none")  # reaches into the block
    case.index.use(case.method, case.sequence.length)
    case.extend()
    check_step(case)
    assert case.index.covered <= case.sequence.length - 200
    others = ["sign", "sign:tail=8,bits=32", "sign:tail=8,sinks=5", "sign:tail=8,seed=1", "auto:tail=8", "lsh"]
    for text in [changed(t, dense_layers="none") for t in others] + ["sign:tail=8"]:
        assert not case.index.serves(parse_method(text))


def test_tails_hold_the_means_of_their_clusters():
    """Every row belongs to one of at most `tail` clusters, of 64 tokens at least on average."""
    case = make("topk:budget=10,tail=8", Heads(6, 2, 16), 900, seed=16)
    for block in case.index.blocks:
        counts, assigned = block.arrays["counts"], block.arrays["assigned"].long()
        assert counts.shape[1] == min(8, (block.end - block.begin) // 64)
        assert (counts.sum(1) == block.end - block.begin).all()
        keys, values = case.sequence.rows(block.begin, block.end)[0]
        for plane in range(2):
            for c in range(counts.shape[1]):
                mine = assigned[plane] == c
                assert int(mine.sum()) == int(counts[plane, c])
                if mine.any():
                    expected = torch.stack([keys[plane, mine].mean(0), values[plane, mine].mean(0)])
                    assert (block.arrays["means"][plane, c] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranked_rows_are_bounds_and_means_of_their_keys(dtype):
    for text in ("quest:page=8", "block_topk:block=8"):
        case = make(text, Heads(6, 2, 16), 300, dtype, seed=17)
        (block,) = case.index.blocks
        keys = case.sequence.rows(block.begin, block.end)[0, 0].unflatten(1, (-1, 8))
        rows = block.arrays["rows"]
        if text.startswith("quest"):
            assert torch.equal(rows, torch.cat([keys.amin(2), keys.amax(2)], dim=-1))
        else:
            assert (rows.double() - keys.double().mean(2)).abs().max() < (1e-6 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("bits", [32, 64, 128])
def test_signs_are_those_of_spread_keys(bits):
    """Signs and factors of a block are those of the centred keys times `spread`; queries are projected so that
    products of queries and keys stay what they are."""
    case = make(f"sign:bits={bits}", Heads(6, 2, 64), 600, seed=18)
    frozen = {name: t.double() for name, t in case.index.frozen.items()}
    for block in case.index.blocks:
        keys = case.sequence.rows(block.begin, block.end)[0, 0].double()
        products = (keys - frozen["mean"][:, None]) @ frozen["spread"]
        clear = products.abs() > 1e-4
        assert (unpack_signs(block.arrays["signs"]) == (products > 0))[clear].all()
        factors = products.square().sum(-1) / products.abs().sum(-1)
        rounded = (factors / frozen["largest"][:, None] * 255).clamp(max=255)
        assert (block.arrays["factors"].double() - rounded).abs().max() <= 0.5 + 1e-3
    directions = unpack_directions(case.index.frozen["directions"]).double()  # [planes, bits, head_dim]
    product = frozen["spread"] @ directions
    if bits >= 64:  # whole groups of orthonormal directions
        assert (product - bits // 64 * torch.eye(64)).abs().max() < 1e-3
    else:  # a projection
        assert (product @ product - product).abs().max() < 1e-3
        assert (product.diagonal(dim1=-2, dim2=-1).sum(-1) - bits).abs().max() < 1e-3


def test_snapkv_keeps_what_the_last_queries_voted_for():
    case = make("snapkv:budget=50,observe=20,pool=5", Heads(6, 2, 16), 500, seed=19)
    (block,) = case.index.blocks
    keys = case.sequence.rows(block.begin, block.end)[0, 0].double()
    q = case.queries(20)[0].double().view(20, 2, 3, 16).permute(1, 2, 0, 3).flatten(1, 2)
    votes = (q @ keys.transpose(1, 2) / 4).softmax(-1).mean(1)
    padded = torch.nn.functional.pad(votes, (2, 2))
    pooled = padded.unfold(1, 5, 1).amax(-1)
    kept = kept_marks(case.index, 0)
    assert (kept.sum(1) == 50).all()
    least = torch.where(kept, pooled, torch.inf).amin(1)
    most = torch.where(kept, -torch.inf, pooled).amax(1)
    assert (least >= most - 1e-6).all()


@pytest.mark.parametrize("tail", [0, 4])
def test_snapkv_is_chosen_anew(tail):
    """By what later tokens have weighed the rows, over all rows up to the window; with a tail over those it had."""
    case = make(f"snapkv:budget=50,tail={tail}", Heads(6, 2, 16), 500, seed=19)
    (old,) = case.index.blocks
    later = make(f"snapkv:budget=50,tail={tail}", Heads(6, 2, 16), 700, seed=19).sequence
    votes = torch.rand(len(case.index._slots), 2, 720)
    votes[:, :, 300:305] += 9  # wanted by all
    case.index.renew(later, votes)
    (new,) = case.index.blocks
    assert (new.begin, new.end) == (old.begin, old.end if tail else old.begin + (700 - 64 - old.begin) // 64 * 64)
    kept = kept_marks(case.index, 0)
    assert (kept.sum(1) == 50).all()
    assert kept[:, 300 - new.begin : 305 - new.begin].all()
    pooled = torch.nn.functional.max_pool1d(votes[case.index.layers[0], :, None, new.begin : new.end], 5, 1, 2)[:, 0]
    assert (torch.where(kept, pooled, torch.inf).amin(1) >= torch.where(kept, -torch.inf, pooled).amax(1)).all()
    assert case.index.reading(700).end == new.end
    assert {name: t.shape[1] for name, t in new.arrays.items() if name != "keep"} == {
        name: t.shape[1] for name, t in old.arrays.items() if name != "keep"
    }


@sparse_methods
def test_many_query_heads_to_a_kv_head(text):
    check_step(make(text, Heads(32, 1, 16), 300, seed=20))
    with pytest.raises(UsageError, match="33 query heads to a KV head; at most 32"):
        Index(parse_method(text), Shape(Heads(33, 1, 16), torch.float32), 2)


def test_refused_readings():
    """Several new tokens, candidates behind the cached rows, blocks that do not reach the end, holes between them."""
    case = make("sign:budget=40", Heads(2, 1, 16), 300)
    case.sequence.reserve(3)
    index, end = case.index._native, case.reading.end
    for queries, last, budget in ((3, end, 40), (1, 301, 40), (1, end - 64, 40), (1, end, -1), (1, 3, 40)):
        plan = AttentionPlan(case.heads, case.dtype, _native.Workspace())
        with pytest.raises(ValueError, match="Plan"):
            plan.add(queries, 300, case.sequence.incoming(queries), None, SparseReading(index, last, budget))
    with pytest.raises(ValueError, match="blocks must follow each other"):
        index.set_blocks([(4, 68, {}), (132, 196, {})])


@pytest.mark.parametrize("sampled", ["like the rest", "better than the rest", "worse than the rest"])
@pytest.mark.parametrize("budget", [1, 100, 600, 5000])
def test_bounds_from_a_sample_lose_nothing(isa, sampled, budget):
    """Of long contexts a sixteenth is scored first, and a bound taken from it. It must not matter how well it speaks
    for the rest: here what is sampled can be all that is good, or nothing of it."""
    heads, n = Heads(3, 1, 64), 6000
    case = make(
        f"sign:budget={budget},sinks=0,window=16,dense_below=0", heads, n, seed=40, kv=text_like(n, heads, 1, 40)
    )
    if sampled != "like the rest":
        place = torch.arange(n) % 256 < 16
        good = place if sampled == "better than the rest" else ~place
        direction = case.q[0].mean(0)
        kv = text_like(n, heads, 1, 40)
        kv[0, 0] += torch.where(good, 3.0, -3.0)[:, None] * direction / direction.norm()
        case = make(str(case.method), heads, n, seed=40, kv=kv)
    assert case.reading.end - case.method.sinks >= 4096
    check_step(case)
