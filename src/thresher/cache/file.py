"""KV files: written in checkpoints that survive a kill and a power cut, checked and memory-mapped when opened."""

import contextlib
import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from thresher.cache.arrays import read_arrays, write_arrays
from thresher.cache.format import (
    BLOCK,
    MAGIC,
    MOST_NAMES,
    PART_MAGIC,
    Identity,
    KVFileInfo,
    Offsets,
    Source,
    block_checksum,
    checksums_at,
    decode_checksums,
    decode_header,
    encode_checksums,
    encode_header,
    header_size,
    offsets,
    raw,
    read_at,
    read_into,
    state_positions,
    write_all,
)
from thresher.cache.mapping import MappedFile
from thresher.cache.sequence import KVLayout, KVSequence, Segment
from thresher.errors import (
    KVFileBusyError,
    KVFileDamagedError,
    KVFileError,
    KVFileMismatchError,
    StorageError,
    UsageError,
)

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # of file systems without flock

Progress = Callable[[int, int], None]
Arrays = tuple[dict[str, Any], dict[str, torch.Tensor]]  # what cache/arrays.py keeps: meta and named arrays


def _silent(done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class _Opened:
    """A mapped file: int32 ids `[length]`, rows `[layers, 2, kv_heads, length, head_dim]`, snapshots of the recurrent
    state by position, and the index if it has one; all of them views of the mapping."""

    file: MappedFile
    info: KVFileInfo
    token_ids: np.ndarray
    rows: torch.Tensor
    states: dict[int, torch.Tensor]
    arrays: Arrays | None


def inspect(path: Path) -> KVFileInfo:
    """What a file's header says; raises a KVFileError if it is not one, cut, or of another version."""
    with _open_to_read(path) as fd:
        return decode_header(fd, path, os.fstat(fd).st_size)[0]


def index_of(path: Path, *, verify: bool = True, progress: Progress = _silent) -> Arrays | None:
    """The index of a file whose model is not at hand, checked like `open_kv` does."""
    return _open(path, None, None, verify, progress).arrays


def open_kv(
    path: Path,
    *,
    expect: Identity | None = None,
    layout: KVLayout | None = None,
    verify: bool = True,
    progress: Progress = _silent,
) -> tuple[KVSequence, KVFileInfo, Arrays | None]:
    """Map a file as a sequence with one read-only segment, which may be larger than memory, and its index if it has
    one.

    expect, layout: refuse a file of another model, tokenizer, shape or dtype (KVFileMismatchError). verify: read it all
    once and compare every checksum (KVFileDamagedError). progress: called with tokens checked and tokens in all.
    """
    opened = _open(path, expect, layout, verify, progress)
    segment = Segment(opened.rows, opened.file)
    sequence = KVSequence(opened.info.layout, segment, opened.token_ids.tolist())
    sequence.states = {position: state.clone() for position, state in opened.states.items()}
    opened.file.check()
    return sequence, opened.info, opened.arrays


def _open(path: Path, expect: Identity | None, layout: KVLayout | None, verify: bool, progress: Progress) -> _Opened:
    with _open_to_read(path) as fd:
        size = os.fstat(fd).st_size
        info, checksums, where = decode_header(fd, path, size)
        _check_identity(path, info, expect, layout)
        file = MappedFile(path, fd, size)
    token_ids = np.frombuffer(file.memory, dtype="<i4", count=info.length, offset=where.tokens)
    rows = _rows_at(file.memory, info.layout, info.length, where.rows)
    states = _states_at(file.memory, info, where.states)
    if verify:
        for i, expected in enumerate(checksums):
            block = slice(i * BLOCK, min((i + 1) * BLOCK, info.length))
            if block_checksum(token_ids[block], rows[:, :, :, block], states.get(block.stop)) != expected:
                raise KVFileDamagedError(
                    f"{path} is damaged: tokens {block.start} to {block.stop} do not match their checksum"
                )
            progress(block.stop, info.length)
    if token_ids.min() < 0:
        raise KVFileDamagedError(f"{path} is damaged: negative token ids")
    arrays = read_arrays(file.memory, where.end, path, verify) if size > where.end else None
    file.check()
    return _Opened(file, info, token_ids, rows, states, arrays)


def save(
    path: Path,
    sequence: KVSequence,
    *,
    identity: Identity,
    weights: str,
    framing: str,
    source: Source | None = None,
    model: str = "",
    arrays: Arrays | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> None:
    """Write a sequence as a file; the file appears whole or not at all. Raises StorageError, KVFileBusyError."""
    info = KVFileInfo(identity, sequence.layout, sequence.length, weights, framing, source, model)
    with KVFileWriter(path, info, sequence.token_ids, resume=False, say=say) as writer:
        writer.write(sequence, sequence.length)
        writer.finish(arrays, sequence)


class KVFileWriter:
    """Writes a file whose tokens are known but whose rows come little by little, as a long prefill makes them.

    Rows go to `<path>.part`, laid out like the file itself: its header holds the checksum of every block that is
    written, behind a magic of its own. So nothing needs to be believed of it: a writer for the same tokens, model and
    settings goes on behind the first blocks that match their checksums (`done`), whatever had reached the disk; any
    difference, or damage, starts anew. One writer at a time: a second gets KVFileBusyError.
    """

    def __init__(
        self,
        path: Path,
        info: KVFileInfo,
        token_ids: Sequence[int],
        resume: bool = True,
        say: Callable[[str], None] = lambda message: None,
    ) -> None:
        """say: is told what the file system cannot do (locks, syncing a folder) and is gone on without.

        Raises StorageError if there is no room for the whole file, or if it or `<path>.part` would replace something
        else than a KV file.
        """
        if len(token_ids) != info.length or info.length < 1:
            raise ValueError(f"a file of {info.length} tokens from {len(token_ids)} token ids")
        size = header_size(info)
        if size - 16 * info.blocks > MOST_NAMES:
            raise UsageError(f"{path}: the names in its header have {size - 16 * info.blocks} bytes, give shorter ones")
        self.path = path
        self.info = info
        self.done = 0
        self._say = say
        self._part = path.with_name(path.name + ".part")
        self._where: Offsets = offsets(info, size)
        self._states = {position: i for i, position in enumerate(state_positions(info))}
        self._checksums_at = checksums_at(info)
        self._described = encode_header(info, [0] * info.blocks)[8 : self._checksums_at]  # what follows the magic
        self._token_ids = np.asarray(token_ids, dtype="<i4")
        self._checksums: list[int] = []
        with _storage_errors(path):
            _check_target(path)
            self._fd = self._lock()
        try:
            with _storage_errors(path):
                self._check_part()
                if resume:
                    self._checksums = self._checkpoint()
                if not self._checksums:
                    self._start()
        except BaseException:
            self.close()
            raise
        self.done = min(len(self._checksums) * BLOCK, info.length)

    def load(self) -> KVSequence:
        """A sequence with the tokens that are done, in memory of its own; of a model with recurrent state only those up
        to the last snapshot."""
        sequence = KVSequence(self.info.layout)
        done, states = self.done, {}
        if self.info.layout.state_bytes:
            positions = [p for p in state_positions(self.info) if p <= self.done]
            done = positions[-1] if positions else 0
            states = {p: state for p in positions if (state := self._read_state(p)) is not None}
        if done:
            sequence.reserve(done)
            data = sequence.incoming(done)[-1][0]
            with _storage_errors(self.path):
                if not self._read_rows(data, 0, done):
                    raise StorageError(f"{self._part} was cut while it was read; start again")
            sequence.advance(self._token_ids[:done].tolist(), states)
        return sequence

    def write(self, sequence: KVSequence, upto: int) -> None:
        """Make positions up to `upto` safe: whole blocks, and the last one when `upto` is the length."""
        end = upto if upto == self.info.length else upto // BLOCK * BLOCK
        if end <= self.done:
            return
        if sequence.token_ids[:end] != self._token_ids[:end].tolist():
            raise ValueError("the sequence holds other tokens than the file")
        checksums: list[int] = []  # the writer's own grow only once all is safe, so that a failure can be repeated
        with _storage_errors(self.path):
            for begin in range(self.done, end, BLOCK):
                stop = min(begin + BLOCK, end)
                rows, state = sequence.rows(begin, stop), None
                if stop in self._states:
                    state = sequence.states[stop]
                    write_all(self._fd, raw(state.contiguous()), self._state_at(stop))
                checksums.append(block_checksum(self._token_ids[begin:stop], rows, state))
                for plane, at in zip(rows.flatten(0, 2), self._planes_at(begin), strict=True):
                    write_all(self._fd, raw(plane.contiguous()), at)
            sequence.check()
            digits = encode_checksums(checksums).encode()
            write_all(self._fd, memoryview(digits), self._checksums_at + 16 * len(self._checksums))
            os.fsync(self._fd)  # whatever arrives first: rows and checksums vouch for each other
        self._checksums += checksums
        self.done = end

    def finish(self, arrays: Arrays | None = None, of: KVSequence | None = None) -> None:
        """All rows are written: put the index behind them and give the file its name. of: the sequence that the arrays
        belong to, as they may lie in its file."""
        if self.done != self.info.length:
            raise ValueError(f"{self.done} of {self.info.length} tokens are written")
        with _storage_errors(self.path):
            os.ftruncate(self._fd, self._where.end)  # what is left of an index that could not be written
            if arrays:
                write_arrays(self._fd, self._where.end, *arrays)
            if of:
                of.check()
            write_all(self._fd, memoryview(encode_header(self.info, self._checksums)), 0)
            os.fsync(self._fd)
            _check_target(self.path)  # something else may have come since
            os.replace(self._part, self.path)
        self.close()
        try:
            _sync_folder(self.path.parent)
        except OSError as error:
            self._say(f"{self.path} is written, but its folder was not synced: {error.strerror}")

    def discard(self) -> None:
        """Remove what was written so far."""
        with _storage_errors(self.path):
            self._part.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Stop here; a later writer can go on from the last checkpoint."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> "KVFileWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _lock(self) -> int:
        while True:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            fd = os.open(self._part, flags, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The file may have been renamed or removed between open and lock.
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(fd), os.stat(self._part)):
                        return fd
            except BlockingIOError:
                os.close(fd)
                raise KVFileBusyError(f"{self.path} is being written by another process") from None
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    self._say(f"{self.path}: no locks here ({error.strerror}); let no other process write it meanwhile")
                    return fd
                os.close(fd)
                raise
            os.close(fd)

    def _check_part(self) -> None:
        """Only what a writer left is overwritten: a header, or zeros where a power cut came before it."""
        regular = stat.S_ISREG(os.fstat(self._fd).st_mode)
        if not regular or read_at(self._fd, len(MAGIC), 0) not in (b"", bytes(len(MAGIC)), MAGIC, PART_MAGIC):
            raise StorageError(f"{self._part} is in the way: move it, or give another name")

    def _start(self) -> None:
        try:
            os.ftruncate(self._fd, 0)
            os.fsync(self._fd)  # or a power cut could leave rows of before under the new header
            _reserve(self._fd, self._where.end)
            head = PART_MAGIC + self._described + encode_checksums([0] * self.info.blocks).encode()
            write_all(self._fd, memoryview(head), 0)
            write_all(self._fd, memoryview(self._token_ids.tobytes()), self._where.tokens)
            os.fsync(self._fd)
            _sync_folder(self._part.parent)
        except OSError:
            with contextlib.suppress(OSError):
                self._part.unlink()
            raise

    def _checkpoint(self) -> list[int]:
        """Checksums of the first blocks that an earlier writer left and that match; none if it was another file."""
        layout, length = self.info.layout, self.info.length
        head = read_at(self._fd, self._checksums_at + 16 * self.info.blocks, 0)
        if head[8 : self._checksums_at] != self._described:
            return []
        if read_at(self._fd, 4 * length, self._where.tokens) != self._token_ids.tobytes():
            return []
        try:
            noted = decode_checksums(head[self._checksums_at :].decode(), self.info.blocks)
        except ValueError:
            return []
        good: list[int] = []
        for begin, expected in zip(range(0, length, BLOCK), noted, strict=True):
            stop = min(begin + BLOCK, length)
            rows = layout.empty(stop - begin)
            state = self._read_state(stop) if stop in self._states else None
            if not expected or not self._read_rows(rows, begin, stop):
                break
            if block_checksum(self._token_ids[begin:stop], rows, state) != expected:
                break
            good.append(expected)
        return good

    def _read_rows(self, data: torch.Tensor, begin: int, stop: int) -> bool:
        """Fill rows 0 .. of `[layers, 2, kv_heads, capacity, head_dim]`; whether the file has them all."""
        parts = [raw(plane[: stop - begin]) for plane in data.flatten(0, 2)]
        counts = [read_into(self._fd, part, at) for part, at in zip(parts, self._planes_at(begin), strict=True)]
        return counts == [len(part) for part in parts]

    def _read_state(self, position: int) -> torch.Tensor | None:
        """The snapshot after so many tokens; None if the file ends before it."""
        state = torch.empty(self.info.layout.state, dtype=torch.float32)
        memory = raw(state)
        return state if read_into(self._fd, memory, self._state_at(position)) == len(memory) else None

    def _state_at(self, position: int) -> int:
        """Where in the file that snapshot lies."""
        return self._where.states + self._states[position] * self.info.layout.state_bytes

    def _planes_at(self, begin: int) -> list[int]:
        """Where the rows from position `begin` on of each (layer, key or value, KV head) lie in the file."""
        layout = self.info.layout
        row_bytes = layout.head_dim * layout.dtype.itemsize
        planes = layout.layers * 2 * layout.kv_heads
        return [self._where.rows + (i * self.info.length + begin) * row_bytes for i in range(planes)]


def _states_at(memory: mmap.mmap, info: KVFileInfo, offset: int) -> dict[int, torch.Tensor]:
    positions = state_positions(info)
    if not positions:
        return {}
    layers, size = info.layout.state
    flat = torch.frombuffer(memory, dtype=torch.float32, count=len(positions) * layers * size, offset=offset)
    return dict(zip(positions, flat.view(len(positions), layers, size), strict=True))


def _rows_at(memory: mmap.mmap, layout: KVLayout, length: int, offset: int) -> torch.Tensor:
    count = length * layout.bytes_per_token // layout.dtype.itemsize
    flat = torch.frombuffer(memory, dtype=layout.dtype, count=count, offset=offset)
    return flat.view(layout.layers, 2, layout.kv_heads, length, layout.head_dim)


@contextmanager
def _open_to_read(path: Path) -> Iterator[int]:
    """A descriptor of a regular file; a pipe or device might never end."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise KVFileError(f"{path}: no such file; make one with: thresher read BOOK.txt -o {path.name}") from None
    except OSError as error:
        raise KVFileError(f"{path}: {error.strerror}") from error
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            raise KVFileError(f"{path} is a {'directory' if stat.S_ISDIR(mode) else 'device or pipe'}, not a KV file")
        yield fd
    except OSError as error:
        raise KVFileError(f"{path}: cannot be read: {error.strerror}") from error
    finally:
        os.close(fd)


def _check_target(path: Path) -> None:
    """Only a regular KV file, or one with nothing in it, is ever replaced. Raises StorageError."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise StorageError(f"{path} is a folder; give a file name")
    if stat.S_ISREG(mode):
        with path.open("rb") as file:
            if file.read(len(MAGIC)) in (b"", MAGIC):
                return
    raise StorageError(f"{path} exists and is not a KV file; give another name or remove it")


def _reserve(fd: int, size: int) -> None:
    """Take the space of a whole file, so that a full disk is told before the work begins."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(fd, size)  # a file system without such a call


def _sync_folder(folder: Path) -> None:
    """Make names in it durable, where the file system can."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(f"no space left on the disk for {path}") from error
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error


def _check_identity(path: Path, info: KVFileInfo, expect: Identity | None, layout: KVLayout | None) -> None:
    have = info.identity
    if expect and have.model_fingerprint != expect.model_fingerprint:
        raise KVFileMismatchError(f"{path} was made with another model ({have.model:.200}), not with {expect.model}")
    if expect and have.tokenizer_fingerprint != expect.tokenizer_fingerprint:
        raise KVFileMismatchError(f"{path} was made with another tokenizer than that of {expect.model}")
    if layout and info.layout.dtype != layout.dtype:
        raise KVFileMismatchError(
            f"{path} holds {str(info.layout.dtype).removeprefix('torch.')}, written with --weights {info.weights:.20}; "
            f"the model is loaded with {str(layout.dtype).removeprefix('torch.')}"
        )
    if layout and info.layout != layout:
        raise KVFileMismatchError(f"{path} holds keys and values of another shape than the model's")
