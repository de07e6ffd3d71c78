import errno
import json
import os
import signal
import stat
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from thresher.cache import file as kv
from thresher.cache.format import MAGIC, VERSION, Identity, KVFileInfo, Source, encode_header
from thresher.cache.sequence import KVLayout, KVSequence
from thresher.errors import (
    KVFileBusyError,
    KVFileDamagedError,
    KVFileError,
    KVFileMismatchError,
    KVFileVersionError,
    NotAKVFileError,
    StorageError,
)

IDENTITY = Identity("tiny", "m" * 32, "t" * 32)
SOURCE = Source("book.txt", "0" * 64)


def layout(dtype=torch.bfloat16):
    return KVLayout(layers=2, kv_heads=3, head_dim=4, dtype=dtype)


def sequence(n, dtype=torch.bfloat16, seed=0):
    torch.manual_seed(seed)
    made = KVSequence(layout(dtype))
    ids = torch.randint(0, 50000, (n,)).tolist()
    for begin in range(0, n, 300):  # several segments
        part = ids[begin : begin + 300]
        made.append(part, torch.randn(2, 2, 3, len(part), 4).to(dtype))
    return made


def info(made):
    return KVFileInfo(IDENTITY, made.layout, made.length, "bf16", "chat", SOURCE)


def save(path, made):
    kv.save(path, made, identity=IDENTITY, weights="bf16", framing="chat", source=SOURCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n", [1, 511, 512, 513, 2000])
def test_round_trip(tmp_path, n, dtype):
    made = sequence(n, dtype)
    save(tmp_path / "x.kv", made)
    opened, found, _ = kv.open_kv(tmp_path / "x.kv", expect=IDENTITY, layout=made.layout)
    assert found == info(made) == kv.inspect(tmp_path / "x.kv")
    assert opened.token_ids == made.token_ids
    assert torch.equal(opened.rows(0, n), made.rows(0, n))
    assert os.listdir(tmp_path) == ["x.kv"]


def test_an_opened_file_goes_on_without_being_written(tmp_path):
    made = sequence(100)
    save(tmp_path / "x.kv", made)
    before = (tmp_path / "x.kv").read_bytes()
    opened, *_ = kv.open_kv(tmp_path / "x.kv")
    more = sequence(40, seed=1)
    opened.crop(90)
    opened.append(more.token_ids, more.rows(0, 40))
    opened.segments()[0][0][:] = 0  # even a stray write stays in memory
    assert (tmp_path / "x.kv").read_bytes() == before


def test_another_model_tokenizer_or_dtype(tmp_path):
    made = sequence(10)
    save(tmp_path / "x.kv", made)
    with pytest.raises(KVFileMismatchError, match="another model \\(tiny\\), not with other"):
        kv.open_kv(tmp_path / "x.kv", expect=Identity("other", "x", "t" * 32))
    with pytest.raises(KVFileMismatchError, match="tokenizer"):
        kv.open_kv(tmp_path / "x.kv", expect=Identity("tiny", "m" * 32, "x"))
    kv.open_kv(tmp_path / "x.kv", expect=Identity("renamed", "m" * 32, "t" * 32))
    with pytest.raises(KVFileMismatchError, match="bfloat16, written with --weights bf16; .* float32"):
        kv.open_kv(tmp_path / "x.kv", layout=layout(torch.float32))
    with pytest.raises(KVFileMismatchError, match="shape"):
        kv.open_kv(tmp_path / "x.kv", layout=KVLayout(3, 3, 4, torch.bfloat16))


def test_not_a_file_of_ours(tmp_path):
    with pytest.raises(KVFileError, match="no such file"):
        kv.open_kv(tmp_path / "x.kv")
    with pytest.raises(KVFileError, match="directory"):
        kv.open_kv(tmp_path)
    for content in (b"", b"x", b"hello world, this is text" * 1000):
        (tmp_path / "x.kv").write_bytes(content)
        with pytest.raises(NotAKVFileError):
            kv.open_kv(tmp_path / "x.kv")


def test_wrong_version(tmp_path):
    save(tmp_path / "x.kv", sequence(10))
    data = bytearray((tmp_path / "x.kv").read_bytes())
    data[8] = 7
    (tmp_path / "x.kv").write_bytes(data)
    with pytest.raises(KVFileVersionError, match="version 7"):
        kv.inspect(tmp_path / "x.kv")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("kv") / "x.kv"
    save(path, sequence(700))
    return path.read_bytes()


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_byte_is_found(whole, tmp_path, data):
    """Unless it lies in padding, where it means nothing."""
    where = kv.offsets(info(sequence(700)), kv.header_size(info(sequence(700))))
    at = data.draw(
        st.one_of(
            st.integers(0, 300), st.integers(where.tokens, where.tokens + 2799), st.integers(where.rows, where.end - 1)
        )
    )
    broken = bytearray(whole)
    broken[at] ^= data.draw(st.integers(1, 255))
    (tmp_path / "y.kv").write_bytes(broken)
    with pytest.raises(KVFileError):
        kv.open_kv(tmp_path / "y.kv")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
def test_any_cut_is_found(whole, tmp_path, share):
    (tmp_path / "y.kv").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(KVFileError):
        kv.open_kv(tmp_path / "y.kv", verify=False)


def test_a_file_larger_than_memory(tmp_path):
    """A sparse file of twice the machine's memory is mapped, and its rows can be read."""
    wide = KVLayout(layers=1024, kv_heads=64, head_dim=128, dtype=torch.bfloat16)
    length = 2 * psutil.virtual_memory().total // wide.bytes_per_token
    described = KVFileInfo(IDENTITY, wide, length, "bf16", "plain", None)
    where = kv.offsets(described, kv.header_size(described))
    with (tmp_path / "x.kv").open("wb") as file:
        file.write(encode_header(described, [0] * described.blocks))
        file.truncate(where.end)
        file.seek(where.end - 2)
        file.write(b"\x80\x3f")  # 1.0, the last value
    opened, *_ = kv.open_kv(tmp_path / "x.kv", verify=False)
    assert opened.length == length
    data, used = opened.segments()[0]
    assert used == length
    assert data[-1, 1, -1, -1, -1] == 1
    assert data[0, 0, 0, 0, 0] == 0


def test_something_appended_is_found(whole, tmp_path):
    (tmp_path / "y.kv").write_bytes(whole + b"x")
    with pytest.raises(KVFileDamagedError, match="bytes"):
        kv.inspect(tmp_path / "y.kv")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    field=st.sampled_from(["identity", "layers", "head_dim", "dtype", "length", "source", "state", "checksums", ""]),
    value=json_values,
)
def test_hostile_headers_with_valid_checksums(tmp_path, field, value):
    made = sequence(10)
    fields = json.loads(encode_header(info(made), [0])[16:-8])
    if field:
        fields[field] = value
    body = json.dumps(fields if field else value).encode()
    head = MAGIC + VERSION.to_bytes(4, "little") + len(body).to_bytes(4, "little") + body
    (tmp_path / "y.kv").write_bytes(head + xxhash.xxh3_64_intdigest(head).to_bytes(8, "little") + bytes(5000))
    with pytest.raises(KVFileDamagedError):
        kv.open_kv(tmp_path / "y.kv")


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_random_bytes_after_the_magic(tmp_path, content):
    (tmp_path / "y.kv").write_bytes(MAGIC + VERSION.to_bytes(4, "little") + content)
    with pytest.raises((KVFileDamagedError, NotAKVFileError)):
        kv.open_kv(tmp_path / "y.kv")


def test_writing_goes_on_where_it_was_cut(tmp_path):
    made = sequence(1800)
    path = tmp_path / "x.kv"
    with kv.KVFileWriter(path, info(made), made.token_ids) as writer:
        assert writer.done == 0
        writer.write(made, 1500)
        assert writer.done == 1024  # whole blocks
    assert not path.exists()
    with kv.KVFileWriter(path, info(made), made.token_ids) as writer:
        assert writer.done == 1024
        loaded = writer.load()
        assert torch.equal(loaded.rows(0, 1024), made.rows(0, 1024))
        assert loaded.token_ids == made.token_ids[:1024]
        writer.write(made, 1800)
        writer.finish()
    opened, *_ = kv.open_kv(path)
    assert torch.equal(opened.rows(0, 1800), made.rows(0, 1800))
    assert os.listdir(tmp_path) == ["x.kv"]


@pytest.mark.parametrize(
    "what", ["other tokens", "other weights", "altered rows", "altered checksum", "cut rows", "cut header", "zeros"]
)
def test_a_part_that_does_not_fit_is_not_trusted(tmp_path, what):
    made = sequence(1800)
    path = tmp_path / "x.kv"
    with kv.KVFileWriter(path, info(made), made.token_ids) as writer:
        writer.write(made, 1024)
        where, checksums = writer._where.rows, writer._checksums_at
    described, ids = info(made), list(made.token_ids)
    if what == "other tokens":
        ids[3] += 1
    if what == "other weights":
        described = KVFileInfo(IDENTITY, made.layout, made.length, "int8", "chat", SOURCE)
    part = tmp_path / "x.kv.part"
    content = bytearray(part.read_bytes())
    if what == "altered rows":
        content[where + 700 * 8 : where + 700 * 8 + 2] = b"\x55\x55"
    if what == "altered checksum":
        content[checksums + 16 : checksums + 18] = b"zz"
    if what == "cut rows":
        del content[-1000:]
    if what == "cut header":
        del content[100:]
    if what == "zeros":
        content[:] = bytes(len(content))
    part.write_bytes(content)
    with kv.KVFileWriter(path, described, ids) as writer:
        assert writer.done == {"altered rows": 512, "cut rows": 1024}.get(what, 0)
        writer.write(made, 0)
    assert not path.exists()


@pytest.mark.parametrize("name", ["x.kv", "x.kv.part"])
def test_a_folder_link_or_pipe_in_the_way(tmp_path, name):
    made = sequence(10)
    for put in (
        lambda path: path.mkdir(),
        lambda path: path.symlink_to(tmp_path / "nowhere"),
        lambda path: os.mkfifo(path),
        lambda path: path.write_text("my notes"),
    ):
        put(tmp_path / name)
        with pytest.raises(StorageError):
            save(tmp_path / "x.kv", made)
        kept = os.lstat(tmp_path / name).st_mode
        assert (tmp_path / name).is_dir() == stat.S_ISDIR(kept)
        (tmp_path / name).rename(tmp_path / f"kept{len(os.listdir(tmp_path))}")
        (tmp_path / "x.kv.part").unlink(missing_ok=True)
    assert sum(p.is_file() and p.read_text() == "my notes" for p in tmp_path.iterdir()) == 1


@pytest.mark.parametrize("call", ["preadv", "fstat"])
def test_a_failed_resume_keeps_the_checkpoint(tmp_path, monkeypatch, call):
    made = sequence(1800)
    with kv.KVFileWriter(tmp_path / "x.kv", info(made), made.token_ids) as writer:
        writer.write(made, 1024)
    before = (tmp_path / "x.kv.part").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, call, lambda *a: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
        with pytest.raises(StorageError, match="Input/output"):
            kv.KVFileWriter(tmp_path / "x.kv", info(made), made.token_ids)
    assert (tmp_path / "x.kv.part").read_bytes() == before
    with kv.KVFileWriter(tmp_path / "x.kv", info(made), made.token_ids) as writer:
        assert writer.done == 1024


def test_nothing_is_left_open(tmp_path, monkeypatch):
    made = sequence(600)
    before = len(os.listdir("/proc/self/fd"))
    save(tmp_path / "x.kv", made)
    for call in ("fsync", "replace", "ftruncate", "posix_fallocate", "pwrite"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, lambda *a: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
            with pytest.raises(StorageError):
                save(tmp_path / "x.kv", made)
    (tmp_path / "text").write_text("words")
    for path in (tmp_path / "text", tmp_path):
        with pytest.raises(KVFileError):
            kv.open_kv(path)
        with pytest.raises(StorageError):
            save(path, made)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_folder_that_cannot_be_synced_is_said(tmp_path, monkeypatch):
    """The file is there: that is no failure."""
    made = sequence(600)
    said = []
    real = os.fsync

    def fsync(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode) and (tmp_path / "x.kv").exists():
            raise OSError(errno.EIO, "Input/output error")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    kv.save(tmp_path / "x.kv", made, identity=IDENTITY, weights="bf16", framing="chat", say=said.append)
    assert "is written, but its folder was not synced: Input/output error" in said[0]
    assert kv.open_kv(tmp_path / "x.kv")[0].length == 600


@pytest.mark.parametrize("left", [0, 5000, "all but one"])
def test_a_file_that_is_cut_while_it_is_open(tmp_path, left):
    """Its rows are zeros then, not the end of the process, and nothing is made of them."""
    made = sequence(5000)
    save(tmp_path / "x.kv", made)
    opened, *_ = kv.open_kv(tmp_path / "x.kv", verify=False)
    opened.check()
    os.truncate(tmp_path / "x.kv", left if isinstance(left, int) else (tmp_path / "x.kv").stat().st_size - 1)
    assert not torch.equal(opened.rows(0, 5000), made.rows(0, 5000))
    with pytest.raises(KVFileDamagedError, match="x.kv was cut while it was open"):
        opened.check()
    with pytest.raises(KVFileDamagedError, match="x.kv was cut while it was open"):
        save(tmp_path / "y.kv", opened)
    assert not (tmp_path / "y.kv").exists()
    save(tmp_path / "x.kv", made)
    assert torch.equal(kv.open_kv(tmp_path / "x.kv")[0].rows(0, 5000), made.rows(0, 5000))


@pytest.mark.parametrize("written", [0, 5000])
def test_a_file_that_is_cut_while_it_is_copied(tmp_path, written):
    """Before its rows are written, or between them and its index."""
    made = sequence(5000)
    save(tmp_path / "x.kv", made)
    opened, *_ = kv.open_kv(tmp_path / "x.kv", verify=False)
    with kv.KVFileWriter(tmp_path / "y.kv", info(made), made.token_ids) as writer:
        writer.write(opened, written)
        os.truncate(tmp_path / "x.kv", 100000)
        with pytest.raises(KVFileDamagedError, match="x.kv was cut while it was open"):
            writer.write(opened, 5000) if not written else writer.finish(None, opened)
        assert writer.done == written
    assert not (tmp_path / "y.kv").exists()


def test_other_rows_than_announced(tmp_path):
    made = sequence(600)
    with (
        kv.KVFileWriter(tmp_path / "x.kv", info(made), made.token_ids) as writer,
        pytest.raises(ValueError, match="other tokens"),
    ):
        writer.write(sequence(600, seed=5), 600)


def test_two_writers(tmp_path):
    made = sequence(600)
    with kv.KVFileWriter(tmp_path / "x.kv", info(made), made.token_ids) as writer:
        with pytest.raises(KVFileBusyError, match="another process"):
            kv.KVFileWriter(tmp_path / "x.kv", info(made), made.token_ids)
        writer.write(made, 600)
        writer.finish()
    kv.open_kv(tmp_path / "x.kv")


def test_no_space(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    made = sequence(600)
    with pytest.raises(StorageError, match="no space left"):
        save(tmp_path / "x.kv", made)
    assert os.listdir(tmp_path) == []


def test_no_space_while_writing_keeps_the_checkpoint(tmp_path, monkeypatch):
    made = sequence(1800)
    with kv.KVFileWriter(tmp_path / "x.kv", info(made), made.token_ids) as writer:
        writer.write(made, 1024)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", lambda *a: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
            with pytest.raises(StorageError, match="no space left"):
                writer.write(made, 1800)
    with kv.KVFileWriter(tmp_path / "x.kv", info(made), made.token_ids) as writer:
        assert writer.done == 1024


def test_places_that_cannot_be_written(tmp_path):
    made = sequence(10)
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "no" / "x.kv", tmp_path / "file" / "x.kv", tmp_path):
        with pytest.raises(StorageError):
            save(path, made)


def test_an_old_file_survives_a_failed_save(tmp_path, monkeypatch):
    old = sequence(10)
    save(tmp_path / "x.kv", old)
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(StorageError, match="Input/output"):
        save(tmp_path / "x.kv", sequence(20))
    assert kv.open_kv(tmp_path / "x.kv")[0].token_ids == old.token_ids


KILLED = """
import sys
sys.path.insert(0, {folder!r})
from pathlib import Path
from test_kv_file import *
made = sequence(200000)
with kv.KVFileWriter(Path(sys.argv[1]), info(made), made.token_ids) as writer:
    for upto in range(512, 200001, 512):
        writer.write(made, upto)
        print(writer.done, flush=True)
"""


def test_killed_while_writing(tmp_path):
    """SIGKILL in the middle: no file under its name, and every checkpoint that was announced is there."""
    code = KILLED.format(folder=os.path.dirname(__file__))
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "x.kv")], stdout=subprocess.PIPE, text=True)
    announced = [int(child.stdout.readline()) for _ in range(5)][-1]
    time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "x.kv").exists()
    made = sequence(200000)
    with kv.KVFileWriter(tmp_path / "x.kv", info(made), made.token_ids) as writer:
        assert writer.done >= announced
        assert torch.equal(writer.load().rows(0, announced), made.rows(0, announced))
        writer.discard()
    assert os.listdir(tmp_path) == []


def indexed_file(tmp_path):
    made = sequence(700, torch.float32)
    arrays = {
        "0/ids": torch.arange(7, dtype=torch.int32).to(torch.uint16),
        "frozen/mean": torch.randn(3, 5),
        "0/empty": torch.empty(0, 4, dtype=torch.int64),
    }
    meta = {"method": "lsh", "blocks": [[4, 68]]}
    kv.save(tmp_path / "i.kv", made, identity=IDENTITY, weights="float32", framing="plain", arrays=(meta, arrays))
    return meta, arrays


def test_an_index_comes_back(tmp_path):
    meta, arrays = indexed_file(tmp_path)
    _, _, (found, opened) = kv.open_kv(tmp_path / "i.kv")
    assert found == meta
    assert opened.keys() == arrays.keys()
    for name, array in arrays.items():
        assert opened[name].dtype == array.dtype
        assert torch.equal(opened[name].view(torch.uint8), array.view(torch.uint8))


def test_damage_anywhere_in_an_index_is_found(tmp_path):
    """Every byte that means something is under a checksum; the zeros between arrays mean nothing."""
    _, arrays = indexed_file(tmp_path)
    whole = (tmp_path / "i.kv").read_bytes()
    begin = whole.index(b"THRESHIX")
    rng = np.random.default_rng(0)
    harmless = 0
    for at in rng.integers(begin, len(whole), 200):
        damaged = bytearray(whole)
        damaged[at] ^= int(rng.integers(1, 256))
        (tmp_path / "d.kv").write_bytes(damaged)
        try:
            _, _, (_, opened) = kv.open_kv(tmp_path / "d.kv")
        except KVFileDamagedError:
            continue
        harmless += 1
        assert all(torch.equal(opened[name], array) for name, array in arrays.items())
    assert harmless < 200
    for cut in (begin + 4, begin + 30, len(whole) - 1):
        (tmp_path / "c.kv").write_bytes(whole[:cut])
        with pytest.raises(KVFileDamagedError):
            kv.open_kv(tmp_path / "c.kv")


def test_only_a_kv_file_is_replaced(tmp_path):
    made = sequence(10)
    (tmp_path / "book.txt").write_text("words")
    (tmp_path / "link.kv").symlink_to(tmp_path / "nowhere")
    for name in ("book.txt", "link.kv"):
        with pytest.raises(StorageError, match="not a KV file"):
            save(tmp_path / name, made)
    assert (tmp_path / "book.txt").read_text() == "words"


def test_no_space_then_space(tmp_path, monkeypatch):
    made = sequence(1800)
    with kv.KVFileWriter(tmp_path / "x.kv", info(made), made.token_ids) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
            with pytest.raises(StorageError):
                writer.write(made, 1800)
        writer.write(made, 1800)
        writer.finish()
    assert kv.open_kv(tmp_path / "x.kv")[0].length == 1800


def test_no_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(kv.fcntl, "flock", lambda *a: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks")))
    said = []
    kv.save(tmp_path / "x.kv", sequence(10), identity=IDENTITY, weights="bf16", framing="chat", say=said.append)
    assert "no locks here" in said[0]
    assert kv.open_kv(tmp_path / "x.kv")[0].length == 10
