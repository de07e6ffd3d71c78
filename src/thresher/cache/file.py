"""KV files: written in checkpoints that survive a kill, checked and memory-mapped when opened."""

import contextlib
import errno
import fcntl
import hashlib
import json
import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import torch

from thresher.cache.arrays import read_arrays, write_arrays
from thresher.cache.format import (
    BLOCK,
    MAGIC,
    Identity,
    KVFileInfo,
    Offsets,
    Source,
    block_checksum,
    decode_header,
    describe,
    encode_header,
    header_size,
    offsets,
    raw,
    write_all,
)
from thresher.cache.sequence import KVLayout, KVSequence, Segment
from thresher.errors import KVFileBusyError, KVFileDamagedError, KVFileError, KVFileMismatchError, StorageError

_MAP_NORESERVE = 0x4000  # of Linux; Python's mmap module does not name it
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # of file systems without flock

Progress = Callable[[int, int], None]
Arrays = tuple[dict[str, Any], dict[str, torch.Tensor]]  # what cache/arrays.py keeps: meta and named arrays


def inspect(path: Path) -> KVFileInfo:
    """What a file's header says; raises a KVFileError if it is not one, cut, or of another version."""
    with _open_to_read(path) as file:
        return decode_header(file, path, os.fstat(file.fileno()).st_size)[0]


def open_kv(
    path: Path,
    *,
    expect: Identity | None = None,
    layout: KVLayout | None = None,
    verify: bool = True,
    progress: Progress = lambda done, total: None,
) -> tuple[KVSequence, KVFileInfo, Arrays | None]:
    """Map a file as a sequence with one read-only segment, which may be larger than memory, and its index if it has
    one.

    expect, layout: refuse a file of another model, tokenizer, shape or dtype (KVFileMismatchError). verify: read it all
    once and compare every checksum (KVFileDamagedError). progress: called with tokens checked and tokens in all.
    """
    with _open_to_read(path) as file:
        size = os.fstat(file.fileno()).st_size
        info, checksums, where = decode_header(file, path, size)
        _check_identity(path, info, expect, layout)
        try:
            # Copy on write, as torch wants writable memory and no write may ever reach the file; without a reservation,
            # as the file may be larger than memory.
            memory = mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            raise KVFileError(f"{path}: cannot be mapped: {error.strerror}") from error
    token_ids = np.frombuffer(memory, dtype="<i4", count=info.length, offset=where.tokens)
    data = _rows_at(memory, info.layout, info.length, where.rows)
    if verify:
        for i, expected in enumerate(checksums):
            rows = slice(i * BLOCK, min((i + 1) * BLOCK, info.length))
            if block_checksum(token_ids[rows], data[:, :, :, rows]) != expected:
                raise KVFileDamagedError(
                    f"{path} is damaged: tokens {rows.start} to {rows.stop} do not match their checksum"
                )
            progress(rows.stop, info.length)
    if token_ids.min() < 0:
        raise KVFileDamagedError(f"{path} is damaged: negative token ids")
    arrays = read_arrays(memory, where.end, path, verify) if size > where.end else None
    return KVSequence(info.layout, Segment(data, mapped=True), token_ids.tolist()), info, arrays


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
) -> None:
    """Write a sequence as a file; the file appears whole or not at all. Raises StorageError, KVFileBusyError."""
    info = KVFileInfo(identity, sequence.layout, sequence.length, weights, framing, source, model)
    with KVFileWriter(path, info, sequence.token_ids, resume=False) as writer:
        writer.write(sequence, sequence.length)
        writer.finish(arrays)


class KVFileWriter:
    """Writes a file whose tokens are known but whose rows come little by little, as a long prefill makes them.

    Rows go to `<path>.part`, and what is safe there is noted in `<path>.part.json`. A writer for the same tokens, model
    and settings goes on where the last one stopped (`done`); any difference, or damage, starts anew. One writer at a
    time: a second gets KVFileBusyError.
    """

    def __init__(self, path: Path, info: KVFileInfo, token_ids: Sequence[int], resume: bool = True) -> None:
        """Raises StorageError if there is no room for the whole file."""
        if len(token_ids) != info.length or info.length < 1:
            raise ValueError(f"a file of {info.length} tokens from {len(token_ids)} token ids")
        self.path = path
        self.info = info
        self._part = path.with_name(path.name + ".part")
        self._note = path.with_name(path.name + ".part.json")
        self._where: Offsets = offsets(info, header_size(info))
        self._token_ids = np.asarray(token_ids, dtype="<i4")
        self._checksums: list[int] = []
        _check_target(path)
        self._file = self._lock()
        try:
            if resume:
                self._checksums = self._checkpoint()
            if not self._checksums:
                try:
                    self._start()
                except OSError:
                    self.discard()
                    raise
        except OSError as error:
            self.close()  # what an earlier writer left stays
            raise _storage_error(path, error) from error
        self.done = min(len(self._checksums) * BLOCK, info.length)

    def load(self) -> KVSequence:
        """A sequence with the tokens that are done, in memory of its own."""
        sequence = KVSequence(self.info.layout)
        if self.done:
            with mmap.mmap(self._file.fileno(), self._where.end, access=mmap.ACCESS_COPY) as memory:
                rows = _rows_at(memory, self.info.layout, self.info.length, self._where.rows)[:, :, :, : self.done]
                sequence.append(self._token_ids[: self.done].tolist(), rows)
                del rows
        return sequence

    def write(self, sequence: KVSequence, upto: int) -> None:
        """Make positions up to `upto` safe: whole blocks, and the last one when `upto` is the length."""
        end = upto if upto == self.info.length else upto // BLOCK * BLOCK
        if end <= self.done:
            return
        if sequence.token_ids[:end] != self._token_ids[:end].tolist():
            raise ValueError("the sequence holds other tokens than the file")
        layout = self.info.layout
        row_bytes = layout.head_dim * layout.dtype.itemsize
        checksums = list(self._checksums)  # the writer's own grow only once all is safe, so a failure can be repeated
        try:
            for begin in range(self.done, end, BLOCK):
                stop = min(begin + BLOCK, end)
                rows = sequence.rows(begin, stop)
                checksums.append(block_checksum(self._token_ids[begin:stop], rows))
                for i, plane in enumerate(rows.flatten(0, 2)):
                    at = self._where.rows + (i * self.info.length + begin) * row_bytes
                    write_all(self._file, raw(plane.contiguous()), at)
            os.fsync(self._file.fileno())
            self._write_note(checksums)
        except OSError as error:
            raise _storage_error(self.path, error) from error
        self._checksums = checksums
        self.done = end

    def finish(self, arrays: Arrays | None = None) -> None:
        """All rows are written: put the index behind them and give the file its name."""
        if self.done != self.info.length:
            raise ValueError(f"{self.done} of {self.info.length} tokens are written")
        try:
            if arrays:
                write_arrays(self._file, self._where.end, *arrays)
            else:
                self._file.truncate(self._where.end)
            write_all(self._file, memoryview(encode_header(self.info, self._checksums)), 0)
            os.fsync(self._file.fileno())
            os.replace(self._part, self.path)
            self._note.unlink(missing_ok=True)
            _sync_folder(self.path.parent)
        except OSError as error:
            raise _storage_error(self.path, error) from error
        self.close()

    def discard(self) -> None:
        """Remove what was written so far."""
        self._note.unlink(missing_ok=True)
        self._part.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Stop here; a later writer can go on from the last checkpoint."""
        self._file.close()

    def __enter__(self) -> "KVFileWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _lock(self) -> BinaryIO:
        while True:
            try:
                file = os.fdopen(os.open(self._part, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)
            except OSError as error:
                raise _storage_error(self.path, error) from error
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The file may have been renamed or removed between open and lock.
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(file.fileno()), os.stat(self._part)):
                        return file
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    return file
                file.close()
                if not isinstance(error, BlockingIOError):
                    raise _storage_error(self.path, error) from error
                raise KVFileBusyError(f"{self.path} is being written by another process") from None
            file.close()

    def _start(self) -> None:
        self._file.truncate(0)
        os.posix_fallocate(self._file.fileno(), 0, self._where.end)
        write_all(self._file, memoryview(self._token_ids.tobytes()), self._where.tokens)
        self._write_note([])

    def _described(self) -> dict[str, Any]:
        return describe(self.info) | {"tokens": hashlib.sha256(self._token_ids.tobytes()).hexdigest()}

    def _write_note(self, checksums: list[int]) -> None:
        text = json.dumps(self._described() | {"checksums": checksums})
        temporary = self._note.with_name(self._note.name + ".new")
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._note)
        _sync_folder(self._note.parent)

    def _checkpoint(self) -> list[int]:
        """Checksums of the blocks that an earlier writer left and that still match; empty if it was another file."""
        try:
            note = json.loads(self._note.read_text())
            checksums = note.pop("checksums")
            if note != self._described() or os.fstat(self._file.fileno()).st_size < self._where.end:
                return []
            if not checksums or len(checksums) > self.info.blocks:
                return []
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return []
        good: list[int] = []
        with mmap.mmap(self._file.fileno(), self._where.end, access=mmap.ACCESS_COPY) as memory:
            data = _rows_at(memory, self.info.layout, self.info.length, self._where.rows)
            for i, expected in enumerate(checksums):
                rows = slice(i * BLOCK, min((i + 1) * BLOCK, self.info.length))
                if block_checksum(self._token_ids[rows], data[:, :, :, rows]) != expected:
                    break
                good.append(expected)
            del data
        return good


def _rows_at(memory: mmap.mmap, layout: KVLayout, length: int, offset: int) -> torch.Tensor:
    count = length * layout.bytes_per_token // layout.dtype.itemsize
    flat = torch.frombuffer(memory, dtype=layout.dtype, count=count, offset=offset)
    return flat.view(layout.layers, 2, layout.kv_heads, length, layout.head_dim)


def _check_target(path: Path) -> None:
    """Only a regular KV file is ever replaced. Raises StorageError."""
    if path.is_dir():
        raise StorageError(f"{path} is a folder; give a file name")
    try:
        if not os.path.lexists(path):
            return
        if not path.is_symlink() and path.is_file():
            with path.open("rb") as file:
                if file.read(len(MAGIC)) == MAGIC:
                    return
    except OSError as error:
        raise _storage_error(path, error) from error
    raise StorageError(f"{path} exists and is not a KV file; give another name or remove it")


def _sync_folder(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _open_to_read(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise KVFileError(f"{path}: no such file; make one with: thresher read BOOK.txt -o {path.name}") from None
    except OSError as error:
        raise KVFileError(f"{path}: {error.strerror}") from error


def _storage_error(path: Path, error: OSError) -> StorageError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"no space left on the disk for {path}")
    return StorageError(f"{path}: cannot be written: {error.strerror or error}")


def _check_identity(path: Path, info: KVFileInfo, expect: Identity | None, layout: KVLayout | None) -> None:
    have = info.identity
    if expect and have.model_fingerprint != expect.model_fingerprint:
        raise KVFileMismatchError(f"{path} was made with another model ({have.model}), not with {expect.model}")
    if expect and have.tokenizer_fingerprint != expect.tokenizer_fingerprint:
        raise KVFileMismatchError(f"{path} was made with another tokenizer than that of {expect.model}")
    if layout and info.layout.dtype != layout.dtype:
        raise KVFileMismatchError(
            f"{path} holds {str(info.layout.dtype).removeprefix('torch.')}, written with --weights {info.weights}; "
            f"the model is loaded with {str(layout.dtype).removeprefix('torch.')}"
        )
    if layout and info.layout != layout:
        raise KVFileMismatchError(f"{path} holds keys and values of another shape than the model's")
