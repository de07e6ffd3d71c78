"""Snapshots of a recurrent state: which of them a sequence keeps, and how they lie in files."""

import json
import os
import struct
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from thresher.cache import file as kv
from thresher.cache.format import STATEFUL_VERSION, VERSION, Identity, KVFileInfo, describe, encode_header
from thresher.cache.sequence import RECENT_STATES, STATE_EVERY, KVLayout, KVSequence, resident_bytes
from thresher.errors import KVFileDamagedError, KVFileError, KVFileMismatchError

LAYOUT = KVLayout(layers=1, kv_heads=1, head_dim=2, dtype=torch.float32, state=(3, 5))
WITHOUT = replace(LAYOUT, state=(0, 0))
IDENTITY = Identity("tiny", "m" * 32, "t" * 32)
LENGTHS = [1, 511, 512, 513, 2047, 2048, 2049, 4096, 5000]

# Sequences -----------------------------------------------------------------------------------------------------------


def rows_for(token_ids):
    """Rows that name their token."""
    return torch.tensor(token_ids, dtype=torch.float32).view(1, 1, 1, -1, 1).expand(1, 2, 1, -1, 2)


def snapshot(token):
    """The state after a token names it: each token has a number of its own."""
    return torch.full(LAYOUT.state, float(token))


def forward(sequence, token_ids):
    """What a pass of the runner does to a sequence."""
    begin, n = sequence.length, len(token_ids)
    sequence.reserve(n)
    data, used = sequence.incoming(n)[-1]
    data[:, :, :, used - n : used] = rows_for(token_ids)
    positions = sequence.layout.states_of(begin, begin + n)
    sequence.advance(token_ids, {p: snapshot(token_ids[p - begin - 1]) for p in positions})


def passed(layout, lengths):
    """A sequence of tokens 0, 1, .. that came in passes of these lengths."""
    sequence = KVSequence(layout)
    for n in lengths:
        forward(sequence, list(range(sequence.length, sequence.length + n)))
    return sequence


class StatesMachine(RuleBasedStateMachine):
    """Several forks, each beside its tokens and the positions whose state it must know."""

    @initialize()
    def start(self):
        self.all = [(KVSequence(LAYOUT), [], set())]
        self.next = 0

    def chosen(self, which):
        return self.all[which % len(self.all)]

    def fresh(self, n):
        self.next += n
        return list(range(self.next - n, self.next))

    lengths = st.one_of(st.integers(1, 40), st.sampled_from([31, 32, 33, 500, 2015, 2016, 2047, 2048, 2049, 4100]))

    @rule(which=st.integers(0, 7), n=lengths, one_by_one=st.booleans())
    def tokens_come(self, which, n, one_by_one):
        sequence, model, known = self.chosen(which)
        if max(known, default=0) < len(model):
            self.catch_up(which)
        for ids in [[t] for t in self.fresh(n)] if one_by_one and n <= 40 else [self.fresh(n)]:
            forward(sequence, ids)
            model += ids
            end = len(model)
            came = {p for p in range(end - len(ids) + 1, end + 1) if p in (end, p // STATE_EVERY * STATE_EVERY)}
            if len(ids) <= RECENT_STATES:
                came = set(range(end - len(ids) + 1, end + 1))
            known -= {p for p in known if p <= end - RECENT_STATES and p % STATE_EVERY}
            known |= came

    @rule(which=st.integers(0, 7))
    def catch_up(self, which):
        """As the runner does after a crop to where no snapshot is."""
        sequence, model, known = self.chosen(which)
        last = max(known, default=0)
        if last < len(model):
            again = sequence.view(last)
            forward(again, model[last:])
            sequence.states = again.states
            known -= {p for p in known if p <= len(model) - RECENT_STATES and p % STATE_EVERY}
            known |= {p for p in range(last + 1, len(model) + 1) if p == len(model) or p % STATE_EVERY == 0}
            if len(model) - last <= RECENT_STATES:
                known |= set(range(last + 1, len(model) + 1))

    @rule(which=st.integers(0, 7), back=st.one_of(st.integers(0, 40), st.floats(0, 1)))
    def crop(self, which, back):
        sequence, model, known = self.chosen(which)
        length = max(0, len(model) - back) if isinstance(back, int) else round(len(model) * back)
        sequence.crop(length)
        del model[length:]
        known -= {p for p in known if p > length}

    @rule(which=st.integers(0, 7))
    def fork(self, which):
        if len(self.all) < 6:
            sequence, model, known = self.chosen(which)
            fork = sequence.fork()
            assert all(fork.states[p] is sequence.states[p] for p in known)
            self.all.append((fork, list(model), set(known)))

    @rule(which=st.integers(0, 7), share=st.floats(0, 1), n=st.integers(1, 70))
    def view(self, which, share, n):
        """What is done to a view is seen by the invariant if it reaches the origin."""
        sequence, model, known = self.chosen(which)
        length = round(len(model) * share)
        view = sequence.view(length)
        assert view.token_ids == model[:length]
        assert set(view.states) == {p for p in known if p <= length}
        view.crop(view.state_length)
        forward(view, self.fresh(n))
        assert max(view.states) == view.length

    @invariant()
    def the_states_are_those_of_the_model(self):
        for sequence, model, known in getattr(self, "all", []):
            assert sequence.token_ids == model
            assert set(sequence.states) == known
            assert all(0 < p <= len(model) for p in known)
            assert all(torch.equal(state, snapshot(model[p - 1])) for p, state in sequence.states.items())
            last = max(known, default=0)
            assert sequence.state_length == last
            assert torch.equal(sequence.state(), snapshot(model[last - 1]) if last else torch.zeros(LAYOUT.state))
            assert len(known) * LAYOUT.state_bytes <= LAYOUT.states_bytes(len(model))


StatesMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=20)
TestStates = StatesMachine.TestCase


near_checkpoints = st.builds(lambda k, by: max(0, k * STATE_EVERY + by), st.integers(0, 4), st.integers(-2, 2))
positions = st.one_of(st.integers(0, 10000), near_checkpoints)


@settings(max_examples=200)
@given(begin=positions, then=st.one_of(st.integers(0, 70).map(lambda n: -n), positions))
def test_positions_worth_keeping(begin, then):
    end = begin - then if then <= 0 else max(begin, then)
    n = end - begin
    kept = LAYOUT.states_of(begin, end)
    assert kept == sorted(set(kept))
    checkpoints = {p for p in range(begin + 1, end + 1) if p % STATE_EVERY == 0}
    assert set(kept) == (set(range(begin + 1, end + 1)) if n <= RECENT_STATES else {*checkpoints, end})
    assert len(kept) * LAYOUT.state_bytes <= LAYOUT.states_bytes(end)
    assert WITHOUT.states_of(begin, end) == []


@given(lengths=st.lists(st.one_of(st.integers(1, 40), st.integers(1, 3000)), min_size=1, max_size=6))
def test_checkpoints_are_kept_however_the_tokens_come(lengths):
    """So that a file can be written of any sequence: it keeps them and the end."""
    sequence = passed(LAYOUT, lengths)
    info = KVFileInfo(IDENTITY, LAYOUT, sequence.length, "bf16", "plain", None)
    assert set(kv.state_positions(info)) == {*range(STATE_EVERY, sequence.length, STATE_EVERY), sequence.length}
    assert set(kv.state_positions(info)) <= set(sequence.states)


def test_most_snapshots():
    """All that `states_bytes` allows for but one: a checkpoint among the last tokens counts once."""
    sequence = passed(LAYOUT, [4096] + [1] * RECENT_STATES)
    assert len(sequence.states) * LAYOUT.state_bytes == LAYOUT.states_bytes(sequence.length) - LAYOUT.state_bytes
    assert LAYOUT.state_bytes == 4 * 3 * 5


def test_the_last_tokens_are_known_one_by_one():
    sequence = passed(LAYOUT, [2030] + [1] * 100)
    assert set(sequence.states) == {2048, *range(2130 - RECENT_STATES + 1, 2131)}
    sequence.crop(2110)
    assert sequence.state_length == 2110
    sequence.crop(2098)
    assert sequence.state_length == 2048
    sequence.crop(2047)
    assert sequence.state_length == 0
    assert torch.equal(sequence.state(), torch.zeros(LAYOUT.state))


def test_without_a_state():
    sequence = passed(WITHOUT, [100, 1, 3000])
    assert sequence.states == {}
    assert sequence.state_length == sequence.length == 3101
    assert sequence.state().shape == (0, 0)
    assert WITHOUT.state_bytes == WITHOUT.states_bytes(10000) == 0
    sequence.crop(50)
    assert sequence.state_length == 50


def test_snapshots_that_forks_share_count_once():
    sequence = passed(LAYOUT, [64, 1])
    rows = sum(data.numel() * 4 for data, _ in sequence.segments())
    assert len(sequence.states) == 2
    fork = sequence.fork()
    assert resident_bytes([sequence, fork]) == rows + 2 * LAYOUT.state_bytes
    forward(fork, [65])
    assert set(sequence.states) == {64, 65}
    grown = fork.segments()[-1][0]
    assert resident_bytes([sequence, fork]) == rows + grown.numel() * 4 + 3 * LAYOUT.state_bytes


# Files ---------------------------------------------------------------------------------------------------------------


def sequence(n, layout=LAYOUT, seed=0):
    """Random rows and snapshots, of passes of 700 tokens and at the end some of one."""
    generator = torch.Generator().manual_seed(seed)
    made = KVSequence(layout)
    ids = torch.randint(0, 50000, (n,), generator=generator).tolist()
    ends = [*range(700, n - 5, 700), *range(max(1, n - 5), n + 1)]
    for begin, end in zip([0, *ends], ends, strict=False):
        count = end - begin
        made.reserve(count)
        data, used = made.incoming(count)[-1]
        shape = (layout.layers, 2, layout.kv_heads, count, layout.head_dim)
        data[:, :, :, used - count : used] = torch.randn(shape, generator=generator)
        states = {p: torch.randn(layout.state, generator=generator) for p in layout.states_of(begin, end)}
        made.advance(ids[begin:end], states)
    return made


def info(made):
    return KVFileInfo(IDENTITY, made.layout, made.length, "bf16", "chat", None)


def save(path, made):
    kv.save(path, made, identity=IDENTITY, weights="bf16", framing="chat")


def places(made):
    return kv.offsets(info(made), kv.header_size(info(made)))


@pytest.mark.parametrize("layout", [LAYOUT, KVLayout(2, 3, 4, torch.bfloat16, state=(1, 1000))])
@pytest.mark.parametrize("n", LENGTHS)
def test_round_trip(tmp_path, n, layout):
    made = sequence(n, layout)
    save(tmp_path / "x.kv", made)
    opened, found, arrays = kv.open_kv(tmp_path / "x.kv", expect=IDENTITY, layout=layout)
    assert found == info(made) == kv.inspect(tmp_path / "x.kv")
    assert found.layout.state == layout.state
    assert arrays is None
    assert opened.token_ids == made.token_ids
    assert torch.equal(opened.rows(0, n), made.rows(0, n))
    assert list(opened.states) == [*range(STATE_EVERY, n, STATE_EVERY), n]
    assert opened.state_length == n
    for position, state in opened.states.items():
        assert state.dtype == torch.float32
        assert torch.equal(state, made.states[position])
    opened.crop(n - 1)
    assert opened.state_length == (n - 1) // STATE_EVERY * STATE_EVERY


@pytest.mark.parametrize("n", [2049, 4096])
def test_the_bytes_are_those_that_the_format_says(tmp_path, n):
    made = sequence(n)
    save(tmp_path / "x.kv", made)
    assert (tmp_path / "x.kv").read_bytes() == by_hand(made)


def by_hand(made, fields=None, version=STATEFUL_VERSION, states=None):
    """A file as the docstring of format.py has it. fields: more of the header."""
    ids = struct.pack(f"<{made.length}i", *made.token_ids)
    positions = sorted({*range(2048, made.length, 2048), made.length}) if made.layout.state_bytes else []
    rows = made.rows(0, made.length)
    checksums = ""
    for begin in range(0, made.length, 512):
        stop = min(begin + 512, made.length)
        block = ids[4 * begin : 4 * stop] + rows[:, :, :, begin:stop].contiguous().numpy().tobytes()
        block += made.states[stop].numpy().tobytes() if stop in positions else b""
        checksums += f"{xxhash.xxh3_64_intdigest(block):016x}"
    said = {
        "identity": {"model": "tiny", "model_fingerprint": "m" * 32, "tokenizer_fingerprint": "t" * 32},
        "layers": made.layout.layers,
        "kv_heads": made.layout.kv_heads,
        "head_dim": made.layout.head_dim,
        "dtype": "float32",
        "length": made.length,
        "weights": "bf16",
        "framing": "chat",
        "source": None,
        "model": "",
    }
    said |= {"state": list(made.layout.state)} if positions else {}
    said = {name: value for name, value in (said | (fields or {})).items() if value is not ...}
    return (
        header(said | {"checksums": checksums}, version)
        + padded(ids)
        + padded(b"".join(made.states[p].numpy().tobytes() for p in positions))
        + rows.numpy().tobytes()
    )


def header(fields, version):
    body = json.dumps(fields).encode()
    head = b"THRESHKV" + struct.pack("<II", version, len(body)) + body
    return padded(head + struct.pack("<Q", xxhash.xxh3_64_intdigest(head)))


def padded(data):
    return data + bytes(-len(data) % 4096)


@pytest.mark.parametrize("n", [1, 2049])
def test_files_without_state_are_as_they_were(tmp_path, n):
    made = sequence(n, WITHOUT)
    save(tmp_path / "x.kv", made)
    old = by_hand(made, version=2)
    assert (tmp_path / "x.kv").read_bytes() == old
    assert "state" not in describe(info(made))
    assert encode_header(info(made), [0] * info(made).blocks)[8:12] == b"\2\0\0\0"
    for content in (old, by_hand(made, {"model": ...}, version=2)):  # as it was before the model's place was kept
        (tmp_path / "old.kv").write_bytes(content)
        opened, found, _ = kv.open_kv(tmp_path / "old.kv", layout=WITHOUT)
        assert found == info(made)
        assert opened.states == {}
        assert opened.state_length == n
        assert torch.equal(opened.rows(0, n), made.rows(0, n))


def test_another_state_than_the_model_has(tmp_path):
    made = sequence(600)
    save(tmp_path / "x.kv", made)
    for state in ((0, 0), (5, 3), (3, 6)):
        with pytest.raises(KVFileMismatchError, match="shape"):
            kv.open_kv(tmp_path / "x.kv", layout=replace(LAYOUT, state=state))
    save(tmp_path / "y.kv", sequence(600, WITHOUT))
    with pytest.raises(KVFileMismatchError, match="shape"):
        kv.open_kv(tmp_path / "y.kv", layout=LAYOUT)


def refused(path, content, **options):
    """Opening it fails as for any damaged file, and takes little memory."""
    path.write_bytes(content)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    tracemalloc.start()
    try:
        for opening in (kv.inspect, kv.open_kv):
            with pytest.raises(KVFileDamagedError) as caught:
                opening(path, **options if opening is kv.open_kv else {})
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert resident("VmHWM") - before < 32 << 20
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    return str(caught.value)


def resident(name):
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[name].split()[0])


@pytest.mark.parametrize("version", [VERSION, STATEFUL_VERSION])
@pytest.mark.parametrize("state", [[1, 1], [3, 5], [1, 1 << 24], [1 << 24, 1], [1 << 14, 1 << 14]])
def test_a_state_that_is_claimed_but_not_there(tmp_path, state, version):
    made = sequence(2500, WITHOUT)
    said = refused(tmp_path / "x.kv", by_hand(made, {"state": state}, version), verify=False)
    assert "bytes, its header says" in said


@pytest.mark.parametrize("state", [..., [0, 0], [1, 2000], [1 << 14, 1 << 14]])
def test_a_state_of_another_size_than_is_there(tmp_path, state):
    assert "bytes, its header says" in refused(tmp_path / "x.kv", by_hand(sequence(2500), {"state": state}))


@pytest.mark.parametrize(
    "state",
    [
        *([-1, 5], [3, -5], [-3, -5], [-1, 0], [0, -1]),
        *([(1 << 24) + 1, 1], [1, 1 << 25], [1 << 14, (1 << 14) + 1], [1 << 24, 1 << 24]),
        *([1 << 31, 1], [1 << 32, 1 << 32], [1, 1 << 63], [1 << 64, 1], [10**30, 10**30]),
        *([3.0, 5], [3, 5.0], [1e300, 1], [float("nan"), 1], [1, float("inf")], [True, 5], [3, None]),
        *(["3", "5"], [[3], [5]], [], [3], [3, 5, 1], [0] * 10000),
        *(None, True, 15, 3.5, float("nan"), "", "35", "x" * 5000, {}, {"3": 1, "5": 1}, {"layers": 3, "size": 5}),
    ],
    ids=lambda state: repr(state)[:20],
)
@pytest.mark.parametrize("has", [True, False], ids=["with", "without"])
def test_a_state_that_makes_no_sense(tmp_path, state, has):
    made = sequence(600, LAYOUT if has else WITHOUT)
    assert "makes no sense" in refused(tmp_path / "x.kv", by_hand(made, {"state": state}))


@pytest.mark.parametrize("length", [1 << 32, 1 << 62, 10**30, -1, 0])
def test_a_length_with_many_snapshots(tmp_path, length):
    refused(tmp_path / "x.kv", by_hand(sequence(600), {"length": length}))


@pytest.fixture(scope="module")
def made():
    return sequence(2100)


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    path = tmp_path_factory.mktemp("kv") / "x.kv"
    save(path, made)
    return path.read_bytes()


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_byte_is_found(made, whole, tmp_path, data):
    """Unless it lies in padding, where it means nothing."""
    at = data.draw(st.integers(0, 2 * LAYOUT.state_bytes - 1))
    broken = bytearray(whole)
    broken[places(made).states + at] ^= data.draw(st.integers(1, 255))
    (tmp_path / "y.kv").write_bytes(broken)
    with pytest.raises(KVFileDamagedError, match="1536 to 2048" if at < LAYOUT.state_bytes else "2048 to 2100"):
        kv.open_kv(tmp_path / "y.kv")
    opened, *_ = kv.open_kv(tmp_path / "y.kv", verify=False)
    assert opened.states.keys() == {2048, 2100}


def test_snapshots_in_each_others_place_are_found(made, whole, tmp_path):
    states, size = places(made).states, LAYOUT.state_bytes
    first, second = whole[states : states + size], whole[states + size : states + 2 * size]
    (tmp_path / "y.kv").write_bytes(whole[:states] + second + first + whole[states + 2 * size :])
    with pytest.raises(KVFileDamagedError, match="1536 to 2048"):
        kv.open_kv(tmp_path / "y.kv")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
def test_any_cut_is_found(whole, tmp_path, share):
    (tmp_path / "y.kv").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(KVFileError):
        kv.open_kv(tmp_path / "y.kv", verify=False)


def test_snapshots_are_copies(made, whole, tmp_path):
    """They outlive the file, and are written to another whatever becomes of it."""
    (tmp_path / "x.kv").write_bytes(whole)
    opened, *_ = kv.open_kv(tmp_path / "x.kv", verify=False)
    for state in opened.states.values():
        state += 1
    again, *_ = kv.open_kv(tmp_path / "x.kv")
    assert all(torch.equal(state, made.states[p]) for p, state in again.states.items())
    os.truncate(tmp_path / "x.kv", 100)
    assert all(torch.equal(state, made.states[p]) for p, state in again.states.items())
    with pytest.raises(KVFileDamagedError, match="cut while it was open"):
        save(tmp_path / "y.kv", again)


def test_an_opened_file_can_be_saved_again(made, whole, tmp_path):
    (tmp_path / "x.kv").write_bytes(whole)
    save(tmp_path / "y.kv", kv.open_kv(tmp_path / "x.kv")[0])
    assert (tmp_path / "y.kv").read_bytes() == whole


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.one_of(st.sampled_from(LENGTHS), st.integers(1, 5000)), stops=st.lists(st.integers(0, 5000), max_size=4))
def test_resumed_writing_gives_the_same_bytes(tmp_path, n, stops):
    """Each writer goes on with what it loads: rows of after the last snapshot it makes again."""
    made = sequence(n)
    save(tmp_path / "whole.kv", made)
    done = 0
    for stop in [*stops, n]:
        with kv.KVFileWriter(tmp_path / "x.kv", info(made), made.token_ids) as writer:
            assert writer.done == done
            loaded = check_loaded(writer, made)
            going_on(loaded, made)
            writer.write(loaded, min(stop, n))
            done = max(done, n if stop >= n else stop // 512 * 512)
            if writer.done == n:
                writer.finish()
                break
    assert (tmp_path / "x.kv").read_bytes() == (tmp_path / "whole.kv").read_bytes()
    (tmp_path / "x.kv").unlink()


def check_loaded(writer, made):
    loaded = writer.load()
    known = [p for p in [*range(STATE_EVERY, made.length, STATE_EVERY), made.length] if p <= writer.done]
    assert loaded.length == loaded.state_length == max(known, default=0)
    assert list(loaded.states) == known
    assert all(torch.equal(loaded.states[p], made.states[p]) for p in known)
    assert loaded.token_ids == made.token_ids[: loaded.length]
    assert torch.equal(loaded.rows(0, loaded.length), made.rows(0, loaded.length))
    return loaded


def going_on(loaded, made):
    """The tokens that are missing, in one pass."""
    begin, end = loaded.length, made.length
    if begin < end:
        loaded.reserve(end - begin)
        data, used = loaded.incoming(end - begin)[-1]
        data[:, :, :, used - end + begin : used] = made.rows(begin, end)
        positions = [p for p in LAYOUT.states_of(begin, end) if p % STATE_EVERY == 0 or p == end]
        loaded.advance(made.token_ids[begin:end], {p: made.states[p] for p in positions})


@pytest.mark.parametrize("torn", [False, True], ids=["after", "within"])
def test_a_writer_that_is_cut_at_any_write(tmp_path, torn):
    """It dies once so many writes have come, the last of them whole or half; the next one goes on."""

    class Cut(BaseException):
        pass

    made = sequence(2600)
    save(tmp_path / "whole.kv", made)
    real = os.pwrite
    done = Counter()
    for last in range(1, 100):
        written, announced = 0, 0

        def pwrite(fd, data, at, last=last):
            nonlocal written
            written += 1
            if written < last:
                return real(fd, data, at)
            real(fd, data[: len(data) // 2] if torn else data, at)
            raise Cut

        path = tmp_path / f"{last}.kv"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "pwrite", pwrite)
            patch.setattr(os, "fsync", lambda fd: None)
            try:
                with kv.KVFileWriter(path, info(made), made.token_ids) as writer:
                    for stop in (512, 1536, 2048, 2600):
                        writer.write(made, stop)
                        announced = writer.done
                    writer.finish()
                break
            except Cut:
                pass
        assert not path.exists()
        with kv.KVFileWriter(path, info(made), made.token_ids) as writer:
            assert writer.done >= announced
            done[writer.done] += 1
            loaded = check_loaded(writer, made)
            going_on(loaded, made)
            writer.write(loaded, made.length)
            writer.finish()
        assert path.read_bytes() == (tmp_path / "whole.kv").read_bytes()
    assert last == 22  # header, ids; 6 blocks of a key and a value plane, 2 snapshots, 4 times checksums; header
    assert {0, 512, 1536, 2048, 2600} <= set(done)


def test_snapshots_are_float32_whatever_torch_makes_by_default(tmp_path):
    """As while a model is loaded in another thread."""
    made = sequence(2500)
    with kv.KVFileWriter(tmp_path / "x.kv", info(made), made.token_ids) as writer:
        writer.write(made, 2500)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert KVSequence(LAYOUT).state().dtype == torch.float32
        with kv.KVFileWriter(tmp_path / "x.kv", info(made), made.token_ids) as writer:
            assert writer.done == 2500
            check_loaded(writer, made)
            writer.finish()
        assert kv.open_kv(tmp_path / "x.kv")[0].state().dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("what", ["snapshot", "snapshot of the end", "cut", "another state"])
def test_a_part_whose_snapshot_does_not_fit_is_not_trusted(tmp_path, what):
    made = sequence(2500)
    path = tmp_path / "x.kv"
    with kv.KVFileWriter(path, info(made), made.token_ids) as writer:
        writer.write(made, 2500)
    part = tmp_path / "x.kv.part"
    content = bytearray(part.read_bytes())
    if what == "snapshot":
        content[places(made).states + 30] ^= 1
    if what == "snapshot of the end":
        content[places(made).states + 2 * LAYOUT.state_bytes - 1] ^= 1
    if what == "cut":
        del content[places(made).states + LAYOUT.state_bytes + 7 :]
    part.write_bytes(content)
    if what == "another state":
        other = sequence(2500, replace(LAYOUT, state=(5, 3)))
        with kv.KVFileWriter(path, info(other), other.token_ids) as writer:
            assert writer.done == 0
        return
    with kv.KVFileWriter(path, info(made), made.token_ids) as writer:
        assert writer.done == {"snapshot": 1536, "snapshot of the end": 2048, "cut": 0}[what]
        check_loaded(writer, made)
