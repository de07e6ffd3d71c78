"""An index through crops, growth and files: its window is always exact, and what comes back is what was built."""

import tempfile
from pathlib import Path

import pytest
import torch
from harness import Case, check_step
from hypothesis import example, given, settings
from hypothesis import strategies as st

from thresher.attention.index import Index, index_bytes_per_token
from thresher.attention.registry import METHODS, parse_method
from thresher.attention.sparse import Shape, SparseMethod
from thresher.cache import file as kv
from thresher.cache.format import Identity
from thresher.errors import UsageError
from thresher.kernels.attention import Heads

pytestmark = pytest.mark.usefixtures("set_threads")

HEADS = Heads(4, 2, 16)
IDENTITY = Identity("m", "m", "t")
TEXTS = [
    "auto:budget=40,tail=8",
    "lsh:K=4,L=20",
    "sign:budget=24,bits=128",
    "verified:heavy=8,epsilon=0.9,delta=0.6",
    "clusters:budget=96",
    "quest:budget=48,tail=8",
    "block_topk:budget=48,block=4",
    "snapkv:budget=40,tail=4",
    "streaming:tail=8",
    "topk:budget=40,tail=8",
]


def through_a_file(case):
    """The case's sequence and index as they come back from a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.kv"
        kv.save(path, case.sequence, identity=IDENTITY, weights="x", framing="plain", arrays=case.index.state())
        sequence, _, (meta, arrays) = kv.open_kv(path)
    shape = Shape(case.heads, case.dtype)
    index = Index.restore(parse_method(meta["method"]), shape, case.layers, sequence.length, meta, arrays)
    assert [(b.begin, b.end) for b in index.blocks] == [(b.begin, b.end) for b in case.index.blocks]
    for ours, theirs in zip(case.index.blocks, index.blocks, strict=True):
        assert ours.arrays.keys() == theirs.arrays.keys()
        assert all(torch.equal(ours.arrays[n].view(torch.uint8), t.view(torch.uint8)) for n, t in theirs.arrays.items())
    sequence.index = case.index = index
    case.sequence = sequence


steps = st.lists(
    st.one_of(
        st.tuples(st.just("grow"), st.integers(1, 150)),
        st.tuples(st.just("crop"), st.integers(0, 100)),
        st.tuples(st.just("window"), st.integers(1, 200)),
        st.tuples(st.just("file"), st.none()),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60)
@given(text=st.sampled_from(TEXTS), steps=steps)
@example(text=TEXTS[0], steps=[("crop", 10), ("file", None)])  # no block is left, and nothing that it settled
@example(text=TEXTS[1], steps=[("crop", 10), ("file", None), ("grow", 150)])
def test_crops_growth_other_windows_and_files(text, steps):
    """In any order. `check_step` looks at what is weighed: all of the last `window` rows among it."""
    case = Case(f"{text},dense_layers=none,window=20", HEADS, 300, seed=3)
    for number, (what, amount) in enumerate(steps):
        if what == "grow":
            case.sequence.append([0] * amount, torch.randn(1, 2, 2, amount, 16))
        elif what == "crop":
            case.sequence.crop(case.sequence.length * amount // 100)
        elif what == "window":
            case.method = parse_method(f"{text},dense_layers=none,window={amount}")
            case.index.use(case.method, case.sequence.length)
        elif case.sequence.length:
            through_a_file(case)
        assert case.index.covered <= max(case.method.sinks, case.sequence.length - case.method.window)
        case.extend()
        case.next_token(number)
        check_step(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [n for n in METHODS if issubclass(METHODS[n], SparseMethod)])
def test_methods_state_what_they_build(name, dtype):
    shape = Shape(HEADS, dtype)
    planes = 2 * HEADS.kv_heads
    for n in (64, 448, 1024):
        for extra in ("", "tail=5,", "bits=96,", "page=64,", "block=2,", "tokens=5,", "K=6,L=7,"):
            try:
                method = parse_method(f"{name}:{extra}window=8,dense_layers=1")
            except UsageError:  # another method's parameter
                continue
            case = Case(str(method), HEADS, n + 12, dtype, layers=3)
            blocks = case.index.blocks
            assert len(blocks) == int(method.indexed)
            for built, stated in [(case.index.frozen, method.frozen_arrays(shape) if blocks else {})] + [
                (block.arrays, method.block_arrays(n, shape)) for block in blocks
            ]:
                assert {k: (t.dtype, tuple(t.shape)) for k, t in built.items()} == {
                    k: (dtype, (planes, *lengths)) for k, (dtype, lengths) in stated.items()
                }
    block = Case(f"{name}:window=8,dense_layers=1", HEADS, 2048 + 12, dtype, layers=3).index.blocks
    expected = block[0].bytes / 2048 if block and not METHODS[name]().visibility() else 0
    assert index_bytes_per_token(parse_method(f"{name}:window=8,dense_layers=1"), shape, 3) == expected


def test_restoring_builds_nothing(monkeypatch):
    """Whatever a file says is compared with what the method states: no work is done that a stranger asked for."""
    for text in TEXTS:
        case = Case(f"{text},dense_layers=none,window=20", HEADS, 300, seed=3)
        with monkeypatch.context() as patch:
            for kind in METHODS.values():
                for name in ("freeze", "build", "choose"):
                    patch.setattr(kind, name, None, raising=False)
            through_a_file(case)
        check_step(case)


@pytest.mark.timeout(20)
def test_many_blocks_take_no_longer_each():
    """As many blocks as a file's JSON may name are looked at once, not once for every other."""
    shape = Shape(HEADS, torch.float32)
    n = 20000
    arrays = {f"{i}/keep": torch.empty(0) for i in range(n)}
    meta = {"blocks": [[4 + 64 * i, 68 + 64 * i] for i in range(n)]}
    with pytest.raises(ValueError, match="another shape"):
        Index.restore(parse_method("snapkv:dense_layers=none"), shape, 1, 64 * n + 100, meta, arrays)
