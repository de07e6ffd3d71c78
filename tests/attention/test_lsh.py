"""LSH, one step at a time: what is read and how it is weighed, held against products in float64; and the certificate.

What all methods must satisfy is in test_matrix.py, how often things happen in test_lsh_statistics.py.
"""

import pytest
import torch
from harness import Case, check_step, close, normal, text_like

from thresher.attention.lsh import SORTED_TOKENS
from thresher.attention.reference import reference_log_inclusion
from thresher.kernels.attention import Heads

pytestmark = pytest.mark.usefixtures("set_threads")

ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 3e-3}  # of products: below, a sign is left open


def make(parameters, heads, n, dtype=torch.float32, **options):
    return Case(f"lsh:{parameters},dense_layers=none", heads, n, dtype, **options)


def chosen(case):
    """Candidates that query heads weigh, bool `[q_heads, candidates]`."""
    return case.weights()[:, case.method.sinks : case.reading.end] > 0


def brute_force(case):
    """Candidates that share a bucket with a query head in two tables, bool `[q_heads, candidates]` twice: surely, and
    if products too close to zero to tell their sign fall as they may. Nothing is taken from the index but the mean."""
    method, group = case.method, case.index.shape.group
    generator = torch.Generator().manual_seed(method.seed)
    w = torch.randn(method.K * method.L, case.heads.head_dim, generator=generator).to(case.dtype).double()
    keys = case.rows()[0][:, method.sinks : case.reading.end].double()
    centred = (keys - case.index.frozen["mean"].double()[:, None]).to(case.dtype).double()

    def sides(x):
        products = x @ w.T
        return products > 0, products.abs() < ROUNDING[case.dtype] * x.norm(dim=-1, keepdim=True) * w.norm(dim=-1)

    (key_signs, key_open), (q_signs, q_open) = sides(centred.repeat_interleave(group, 0)), sides(case.q[0].double())
    agree, doubt = key_signs == q_signs[:, None], key_open | q_open[:, None]
    bits = (method.L, method.K)
    return [(b.unflatten(-1, bits).all(-1).sum(-1) >= 2) for b in (agree & ~doubt, agree | doubt)]


# ---- What is read --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [200, 1500])
@pytest.mark.parametrize(("sinks", "window"), [(0, 1), (7, 100)])
def test_without_bits_all_is_read(isa, dtype, n, sinks, window):
    case = make(f"K=0,L=2,sinks={sinks},window={window}", Heads(6, 2, 32), n, dtype, seed=n)
    assert case.reading
    close(case.attend(), case.dense(), dtype)
    assert case.index.readings().rows == 2 * (n + 1)


@pytest.mark.parametrize("n", [132, 2000])
def test_nothing_found(isa, n):
    """Sinks and window alone answer where no key shares two buckets with the query."""
    case = make("K=16,L=2", Heads(4, 2, 16), n, seed=5)
    assert not brute_force(case)[1].any()
    assert not chosen(case).any()
    check_step(case)


BLOCKS = [  # tokens that are appended at a time, and the blocks they come to
    ((300,), [256]),
    ((1500,), [1408]),
    ((397, 461, 397, 109), [320, 768, 128]),
    ((100, 100, 100, 100, 59), [256, 64]),
    ((1068, 192, 64), [1024, 128, 64]),
    ((556, 576), [1024]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_counts", [(2, 2), (4, 1), (8, 1)])
@pytest.mark.parametrize(("parts", "blocks"), BLOCKS)
def test_reads_what_brute_force_finds(isa, dtype, head_counts, parts, blocks):
    """Sorted blocks and blocks of codes, one and several, merged ones; heads of their own and shared ones."""
    heads = Heads(*head_counts, 32)
    case = make("K=5,L=30,window=40", heads, parts[0], dtype, seed=sum(parts))
    for i, n in enumerate(parts[1:]):
        case.sequence.append([0] * n, text_like(n, heads, 1, seed=sum(parts)).to(dtype) + 0.1 * i)
        case.extend()
    assert [b.end - b.begin for b in case.index.blocks] == blocks
    assert ["ids" in b.arrays for b in case.index.blocks] == [size >= SORTED_TOKENS for size in blocks]
    check_step(case)
    read, (surely, maybe) = chosen(case), brute_force(case)
    assert (surely <= read).all()
    assert (read <= maybe).all()
    assert 0 < read.double().mean() < 0.5


@pytest.mark.parametrize(("K", "L"), [(1, 2), (2, 50), (4, 150), (8, 50), (10, 150), (11, 100), (16, 200)])
@pytest.mark.parametrize("n", [500, 1200])
def test_any_size_of_tables(K, L, n):
    kv = normal(1, 2, 1, n, 32, seed=K)
    kv[0, 0, :, 100:130] = 3 * normal(1, 1, 32, seed=1) + 0.3 * normal(1, 30, 32, seed=2)
    case = make(f"K={K},L={L}", Heads(3, 1, 32), n, kv=kv)
    case.q[0, 0] = kv[0, 0, 0, 110] - case.index.frozen["mean"][0]
    check_step(case)
    read, (surely, maybe) = chosen(case), brute_force(case)
    assert (surely <= read).all()
    assert (read <= maybe).all()
    assert read[0, 106]  # at cosine 1


def test_skewed_buckets(isa):
    """Most keys in one bucket, in all tables."""
    kv = normal(1, 2, 1, 1400, 16, seed=7)
    kv[:, 0] = normal(1, 1, 1, 16, seed=8) + 0.02 * kv[:, 0]
    kv[:, 0, :, 4:40] *= -30
    case = make("K=6,L=20", Heads(2, 1, 16), 1400, kv=kv)
    case.q[0, 1] = kv[0, 0, 0, 1000]
    check_step(case)
    assert chosen(case)[1].double().mean() > 0.9


def test_a_wrong_mean_is_noticed():
    """`check_step` can tell cosines to keys that are centred by something else."""
    case = make("K=4,L=20", Heads(2, 1, 16), 700, seed=26)
    check_step(case)
    right = case.index._parameters()
    case.index._native.set_method(right | {"mean": right["mean"] + 0.1})
    with pytest.raises(AssertionError):
        check_step(case)


def test_threads_build_the_same_index(set_threads):
    built = []
    for threads in (1, 2, 3):
        set_threads(threads)
        built.append(make("K=4,L=20", Heads(8, 2, 16), 1700, seed=32).index)
    for index in built[1:]:
        for block, expected in zip(index.blocks, built[0].blocks, strict=True):
            assert block.arrays.keys() == expected.arrays.keys()
            assert all(torch.equal(t, expected.arrays[name]) for name, t in block.arrays.items())


# ---- The certificate -----------------------------------------------------------------------------------------------


def estimated_errors(case):
    """sqrt(sum w^2 (1 - u) / u^2 |v - o|^2) / (sum w / u) / |o| for each query head, in float64."""
    keys, values = case.rows()
    weights, values = case.weights(), values.double().repeat_interleave(case.index.shape.group, 0)
    out = torch.einsum("hn,hnd->hd", weights, values)
    here = slice(case.method.sinks, case.reading.end)
    missed = 1 - reference_log_inclusion(case.index, case.layer, case.q[0], keys)[:, here].exp()
    away = (values - out[:, None])[:, here].square().sum(-1)
    return (weights[:, here].square() * missed * away).sum(-1).sqrt() / out.norm(dim=-1)


@pytest.mark.parametrize("n", [1500, 9000])  # one tile of rows, and several whose greatest scores differ
def test_certificate(isa, n):
    """Outputs whose estimated error is above `certify` are dense, the others stay what they are; counters agree."""
    heads, kv = Heads(8, 2, 16), normal(1, 2, 2, n, 16, seed=15)

    def case_of(parameters):
        case = make(f"K=5,L=30{parameters}", heads, n, kv=kv, seed=15)
        case.q *= torch.linspace(0.3, 4, 8)[:, None]
        return case

    plain = case_of("")
    out, exact, errors = check_step(plain)[0], plain.dense()[0], estimated_errors(plain)
    assert plain.index.readings().checked == 0
    assert ((out - exact).norm(dim=-1) > 1e-3 * exact.norm(dim=-1)).all()  # so that one is not taken for the other
    ordered = errors.sort().values
    between = (ordered[:-1] * ordered[1:]).sqrt().tolist()
    for dense, limit in zip(range(8, -1, -1), [1e-6, *between, 1e6], strict=True):
        case = case_of(f",certify={limit}")
        certified, readings, above = case.attend()[0], case.index.readings(), errors > limit
        assert (readings.checked, readings.escalated) == (8, dense)
        assert int(above.sum()) == dense
        assert torch.equal(certified[~above], out[~above])
        close(certified, torch.where(above[:, None], exact, out.double()), torch.float32)


def test_no_certificate_without_a_sample(isa):
    """Where no key was found nothing is known of those not read: such outputs are dense, whatever error is allowed."""
    case = make("K=16,L=2,certify=100", Heads(4, 2, 16), 2000, seed=33)
    assert not brute_force(case)[1].any()
    close(case.attend(), case.dense(), torch.float32)
    assert case.index.readings().escalated == 4
