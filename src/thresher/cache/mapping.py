"""A file that is read where it lies, whatever happens to it meanwhile."""

import mmap
import weakref
from pathlib import Path

import torch

from thresher.errors import KVFileDamagedError, KVFileError
from thresher.kernels import _native

_MAP_NORESERVE = 0x4000  # of Linux; Python's mmap module does not name it


class MappedFile:
    """A file in memory: copy-on-write, as torch wants writable memory and no write may ever reach the file, and without
    a reservation, as it may be larger than memory.

    A page that the file has no more, because another process cut it, reads as zeros from then on (without that, the
    kernel would end the process with SIGBUS). So whatever was read counts only after a `check`.
    """

    def __init__(self, path: Path, fd: int, size: int) -> None:
        """Raises KVFileError if it cannot be mapped."""
        self.path = path
        try:
            self.memory = mmap.mmap(fd, size, mmap.MAP_PRIVATE | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE)
        except (OSError, ValueError) as error:
            raise KVFileError(f"{path}: cannot be mapped: {error}") from error
        self._watched = _native.watch(torch.frombuffer(self.memory, dtype=torch.uint8).data_ptr(), size)
        weakref.finalize(self.memory, _native.unwatch, self._watched).atexit = False

    def check(self) -> None:
        """Raises KVFileDamagedError if the file was cut since it was opened."""
        try:
            size = self.memory.size()
        except OSError as error:
            raise KVFileError(f"{self.path}: {error.strerror}") from error
        if size < len(self.memory) or _native.was_cut(self._watched):
            raise KVFileDamagedError(f"{self.path} was cut while it was open; read the text again")
