"""Power cuts at every point of writing a file: what is asked of the disk is recorded, and every prefix of it replayed
as a disk might have kept it, which may drop, reorder and tear whatever was not synced."""

import errno
import os
import random
from dataclasses import replace

import pytest
import torch

from thresher.cache import file as kv
from thresher.cache import format as kv_format
from thresher.cache.format import Identity, KVFileInfo
from thresher.cache.sequence import KVLayout, KVSequence
from thresher.errors import StorageError

LAYOUT = KVLayout(layers=1, kv_heads=1, head_dim=4, dtype=torch.bfloat16)
WITH_STATE = replace(LAYOUT, state=(2, 100))  # snapshots of more than a sector
STATE_EVERY = 1024  # of whole blocks, but not of each
TOKENS = 1100  # two whole blocks and a part
SECTOR = 512
LONG = "/models" * 80  # so that the checksums lie in another sector than what the header begins with
ARRAYS = ({"method": "lsh", "blocks": []}, {"frozen/mean": torch.arange(300.0)})


def sequence(seed, layout=LAYOUT, n=TOKENS):
    made = KVSequence(layout)
    generator = torch.Generator().manual_seed(seed)
    made.append(
        torch.randint(0, 1000, (n,), generator=torch.Generator().manual_seed(0)).tolist(),
        torch.randn(1, 2, 1, n, 4, generator=generator).to(torch.bfloat16),
    )
    if layout.state_bytes:
        made.states = {p: torch.randn(layout.state, generator=generator) for p in (STATE_EVERY, n)}
    return made


def info(layout, weights="bf16"):
    return KVFileInfo(Identity("m", "m", "t"), layout, TOKENS, weights, "plain", None, LONG)


class Recorder:
    """Stands for `os` where files change: does what is asked and notes it. `fail`: the call that finds no space."""

    def __init__(self, patch):
        self.operations = []
        self.fail = None
        for name in ("open", "pwrite", "ftruncate", "posix_fallocate", "fsync", "replace", "unlink"):
            patch.setattr(os, name, self._recorded(name, getattr(os, name)))

    def _recorded(self, name, real):
        def call(*args, **kwargs):
            if self.fail == name:
                raise OSError(errno.ENOSPC, "full")
            if name == "open":
                new = not os.path.lexists(args[0])
                fd = real(*args, **kwargs)
                if new:
                    self.operations.append(("link", os.path.basename(args[0]), os.fstat(fd).st_ino))
                return fd
            if name in ("replace", "unlink"):
                self.operations.append((name, *(os.path.basename(a) for a in args)))
                return real(*args, **kwargs)
            fd, *rest = args
            inode = os.fstat(fd).st_ino
            if name == "pwrite":
                done = real(fd, *rest)
                self.operations.append(("write", inode, bytes(rest[0][:done]), rest[1]))
                return done
            result = real(fd, *rest)
            self.operations.append((name, inode, *rest))
            return result

        return call


class Disk:
    """What is durable, and what may or may not be."""

    def __init__(self, folder):
        self.folder = os.stat(folder).st_ino
        self.names = {entry.name: entry.inode() for entry in os.scandir(folder)}
        self.contents = {entry.inode(): (folder / entry.name).read_bytes() for entry in os.scandir(folder)}
        self.pending = []

    def do(self, operation):
        name, *rest = operation
        if name == "fsync":
            directory = rest[0] == self.folder
            synced = [
                p for p in self.pending if (p[0] in NAMES if directory else p[0] not in NAMES and p[1] == rest[0])
            ]
            self.pending = [p for p in self.pending if not any(p is s for s in synced)]
            for each in synced:
                apply(each, self.names, self.contents)
        elif name != "safe":
            self.pending.append(operation)

    def after_a_cut(self, keep):
        """Names and contents when of what is pending that is kept which `keep` says, and how much of each write."""
        names, contents = dict(self.names), dict(self.contents)
        for i, operation in enumerate(self.pending):
            apply(operation, names, contents, keep(i, operation))
        return {name: contents.get(inode, b"") for name, inode in names.items()}


NAMES = ("link", "replace", "unlink")


def apply(operation, names, contents, kept=True):
    """kept: False, True, or the sectors of a write that arrived."""
    name, *rest = operation
    if not kept:
        return
    if name == "link":
        names[rest[0]] = rest[1]
    elif name == "replace":
        if rest[0] in names:
            names[rest[1]] = names.pop(rest[0])
    elif name == "unlink":
        names.pop(rest[0], None)
    elif name == "ftruncate":
        old = contents.get(rest[0], b"")
        contents[rest[0]] = old[: rest[1]].ljust(rest[1], b"\0")
    elif name == "posix_fallocate":
        contents[rest[0]] = contents.get(rest[0], b"").ljust(rest[1] + rest[2], b"\0")
    else:
        inode, data, at = rest
        content = bytearray(contents.get(inode, b""))
        for begin in range(at // SECTOR * SECTOR, at + len(data), SECTOR):
            if kept is not True and begin not in kept:
                continue
            low, high = max(begin, at), min(begin + SECTOR, at + len(data))
            content.extend(bytes(max(0, high - len(content))))
            content[low:high] = data[low - at : high - at]
        contents[inode] = bytes(content)


def ways_to_keep(disk, draw):
    """None, all, all but one, one alone, and torn at random."""
    yield lambda i, operation: False
    yield lambda i, operation: True
    for chosen in range(len(disk.pending)):
        yield lambda i, operation, chosen=chosen: i != chosen
        yield lambda i, operation, chosen=chosen: i == chosen
    for _ in range(3):

        def torn(i, operation):
            if operation[0] != "write":
                return draw.random() < 0.5
            _, _, data, at = operation
            return {b for b in range(at // SECTOR * SECTOR, at + len(data), SECTOR) if draw.random() < 0.6}

        yield torn


def write_all(path, made, stops, say, **options):
    with kv.KVFileWriter(path, info(made.layout), made.token_ids, **options) as writer:
        for stop in stops:
            writer.write(made, stop)
            say("safe", writer.done)
        if writer.done == TOKENS:
            writer.finish(ARRAYS)
            say("safe", "finished")


def fresh(path, made, recorder):
    write_all(path, made, (512, 1024, TOKENS), lambda *safe: recorder.operations.append(safe))


def resumed(path, made, recorder):
    write_all(path, made, (1024,), lambda *safe: recorder.operations.append(safe))
    write_all(path, made, (TOKENS,), lambda *safe: recorder.operations.append(safe))


def over_the_part_of_another(path, made, recorder):
    """It has the same tokens and a header of the same length, but other rows, all of them synced."""
    other = sequence(5, made.layout)
    with kv.KVFileWriter(path, info(made.layout, "int8"), other.token_ids) as writer:
        writer.write(other, TOKENS)
    fresh(path, made, recorder)


def out_of_space_between(path, made, recorder):
    with kv.KVFileWriter(path, info(made.layout), made.token_ids) as writer:
        writer.write(made, 512)
        recorder.operations.append(("safe", 512))
        for call in ("pwrite", "fsync"):
            recorder.fail = call
            with pytest.raises(StorageError):
                writer.write(made, TOKENS)
            recorder.fail = None
        writer.write(made, TOKENS)
        recorder.operations.append(("safe", TOKENS))
        for call in ("pwrite", "fsync", "replace"):
            recorder.fail = call
            with pytest.raises(StorageError):
                writer.finish(ARRAYS)
            recorder.fail = None
        writer.finish(ARRAYS)
        recorder.operations.append(("safe", "finished"))


@pytest.mark.parametrize("layout", [LAYOUT, WITH_STATE], ids=["", "with state"])
@pytest.mark.parametrize("old", [False, True], ids=["", "over an old file"])
@pytest.mark.parametrize("scenario", [fresh, resumed, over_the_part_of_another, out_of_space_between])
def test_a_power_cut_at_any_point_loses_nothing_that_was_safe(tmp_path, monkeypatch, scenario, old, layout):
    """The file under its name is whole, new or old; an old one goes only for a whole new one; writing goes on from what
    was safe, with the right rows and snapshots."""
    monkeypatch.setattr(kv_format, "STATE_EVERY", STATE_EVERY)
    folder, after = tmp_path / "folder", tmp_path / "after"
    folder.mkdir()
    after.mkdir()
    before, made = sequence(1, layout), sequence(2, layout)
    if old:
        kv.save(folder / "x.kv", before, identity=info(layout).identity, weights="bf16", framing="plain")
    disk = Disk(folder)
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(patch)
        scenario(folder / "x.kv", made, recorder)
    seen = set()
    safe = 0
    draw = random.Random(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        for operation in [*recorder.operations, ("safe", "finished")]:
            for keep in ways_to_keep(disk, draw):
                files = disk.after_a_cut(keep)
                state = (safe, *sorted(files.items()))
                if state not in seen:
                    seen.add(state)
                    for entry in os.scandir(after):
                        os.unlink(entry.path)
                    for name, content in files.items():
                        (after / name).write_bytes(content)
                    check_after(after / "x.kv", before if old else None, made, safe)
            disk.do(operation)
            if operation[0] == "safe":
                safe = operation[1]
    assert len(seen) > 50
    assert safe == "finished"


def check_after(path, before, made, safe):
    renamed = False
    if path.exists():
        opened, _, arrays = kv.open_kv(path)
        found = opened.rows(0, TOKENS)
        renamed = torch.equal(found, made.rows(0, TOKENS))
        check_states(opened, made if renamed else before)
        assert renamed or (before is not None and torch.equal(found, before.rows(0, TOKENS)))
        assert not renamed or torch.equal(arrays[1]["frozen/mean"], ARRAYS[1]["frozen/mean"])
    assert path.exists() or before is None
    assert renamed or safe != "finished"
    with kv.KVFileWriter(path, info(made.layout), made.token_ids) as writer:
        assert renamed or writer.done >= safe
        loaded = writer.load()
        known = [p for p in made.states if p <= writer.done] if made.states else [writer.done]
        assert loaded.length == loaded.state_length == max(known, default=0)
        assert torch.equal(loaded.rows(0, loaded.length), made.rows(0, loaded.length))
        check_states(loaded, made)
        writer.write(made, TOKENS)
        writer.finish()
    opened, *_ = kv.open_kv(path)
    assert torch.equal(opened.rows(0, TOKENS), made.rows(0, TOKENS))
    check_states(opened, made)


def check_states(found, made):
    assert list(found.states) == [p for p in made.states if p <= found.length]
    assert all(torch.equal(state, made.states[p]) for p, state in found.states.items())
