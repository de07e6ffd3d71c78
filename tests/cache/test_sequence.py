"""A sequence against the plainest model of it: a list of rows."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from thresher.cache.sequence import MIN_TAIL, KVLayout, KVSequence, Segment, resident_bytes
from thresher.errors import CapacityError

LAYOUT = KVLayout(layers=2, kv_heads=1, head_dim=2, dtype=torch.float32)


def rows_for(token_ids):
    """Rows that name their token."""
    return torch.tensor(token_ids, dtype=torch.float32).view(1, 1, 1, -1, 1).expand(2, 2, 1, -1, 2)


class SequenceMachine(RuleBasedStateMachine):
    """Several forks, each beside a list of the tokens it must hold. A row holds its token's number."""

    @initialize()
    def start(self):
        self.pairs = [(KVSequence(LAYOUT), [])]
        self.next = 0

    def fresh(self, n):
        self.next += n
        return list(range(self.next - n, self.next))

    @rule(which=st.integers(0, 7), n=st.integers(1, 90))
    def append(self, which, n):
        sequence, model = self.pairs[which % len(self.pairs)]
        ids = self.fresh(n)
        sequence.append(ids, rows_for(ids))
        model += ids

    @rule(which=st.integers(0, 7), n=st.integers(1, 90), exact=st.booleans(), write=st.booleans())
    def reserve(self, which, n, exact, write):
        sequence, model = self.pairs[which % len(self.pairs)]
        before = [data.data_ptr() for data, _ in sequence.segments()]
        sequence.reserve(n, exact)
        assert [data.data_ptr() for data, _ in sequence.segments()] == before  # nothing moved
        if write:
            ids = self.fresh(n)
            data, used = sequence.incoming(n)[-1]
            data[:, :, :, used - n : used] = rows_for(ids)
            sequence.advance(ids)
            model += ids

    @rule(which=st.integers(0, 7), share=st.floats(0, 1))
    def crop(self, which, share):
        sequence, model = self.pairs[which % len(self.pairs)]
        length = round(len(model) * share)
        sequence.crop(length)
        del model[length:]

    @rule(which=st.integers(0, 7))
    def fork(self, which):
        if len(self.pairs) < 6:
            sequence, model = self.pairs[which % len(self.pairs)]
            self.pairs.append((sequence.fork(), list(model)))

    @invariant()
    def rows_are_those_of_the_model(self):
        for sequence, model in getattr(self, "pairs", []):
            assert sequence.token_ids == model
            assert sequence.length == len(model) == sum(used for _, used in sequence.segments())
            if model:
                assert torch.equal(sequence.rows(0, len(model)), rows_for(model))
                middle = len(model) // 2
                assert torch.equal(sequence.rows(middle, len(model)), rows_for(model[middle:]))


SequenceMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25)
TestSequence = SequenceMachine.TestCase


def test_growth_doubles_without_copying():
    sequence = KVSequence(LAYOUT)
    for i in range(1000):
        sequence.append([i], rows_for([i]))
    capacities = [data.shape[3] for data, _ in sequence.segments()]
    assert capacities == [MIN_TAIL, 64, 128, 256, 512]


def test_forks_store_the_prefix_once():
    sequence = KVSequence(LAYOUT)
    sequence.reserve(100, exact=True)
    sequence.append(list(range(100)), rows_for(range(100)))
    forks = [sequence.fork() for _ in range(5)]
    assert resident_bytes(forks) == 100 * LAYOUT.bytes_per_token
    for fork in forks:
        fork.reserve(10, exact=True)
    assert resident_bytes(forks) == 150 * LAYOUT.bytes_per_token


def test_a_mapped_segment_is_not_resident_and_never_written():
    data = rows_for(range(4)).contiguous()
    sequence = KVSequence(LAYOUT, Segment(data, object()), [0, 1, 2, 3])
    sequence.crop(2)
    sequence.append([9], rows_for([9]))
    assert torch.equal(data, rows_for(range(4)))
    assert torch.equal(sequence.rows(0, 3), rows_for([0, 1, 9]))
    assert resident_bytes([sequence]) == MIN_TAIL * LAYOUT.bytes_per_token


def test_reserved_rows_take_memory_only_as_they_are_written():
    """One row of 4,096 that may come must not bring them all."""

    def resident():
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * 4096

    layout = KVLayout(layers=30, kv_heads=3, head_dim=64, dtype=torch.bfloat16)
    sequence = KVSequence(layout)
    sequence.reserve(4096, exact=True)
    before = resident()
    sequence.append([1], torch.ones(30, 2, 3, 1, 64, dtype=torch.bfloat16))
    assert resident() - before < 4096 * layout.bytes_per_token / 10
    assert sequence.segments()[0][0].shape[3] == 4096


def test_forks_keep_the_memory_alive():
    layout = KVLayout(layers=4, kv_heads=3, head_dim=64, dtype=torch.bfloat16)
    kv = torch.randn(4, 2, 3, 3000, 64).bfloat16()
    sequence = KVSequence(layout)
    sequence.append(list(range(3000)), kv)
    assert torch.equal(sequence.rows(0, 3000), kv)
    fork = sequence.fork()
    del sequence
    assert torch.equal(fork.rows(1000, 2000), kv[:, :, :, 1000:2000])


@pytest.mark.parametrize("capacity", [1 << 42, 1 << 60])
def test_more_than_the_machine_has(capacity):
    with pytest.raises(CapacityError, match="no memory"):
        KVSequence(LAYOUT).reserve(capacity, exact=True)


def test_misuse():
    sequence = KVSequence(LAYOUT)
    sequence.append([1, 2], rows_for([1, 2]))
    for length in (-1, 3):
        with pytest.raises(ValueError, match="crop"):
            sequence.crop(length)
    with pytest.raises(ValueError, match="reserved"):
        sequence.advance(list(range(MIN_TAIL)))
    with pytest.raises(ValueError, match="rows"):
        sequence.append([1], rows_for([1, 2]))
    with pytest.raises(ValueError, match="reserve"):
        KVSequence(LAYOUT).incoming(1)
