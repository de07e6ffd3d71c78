"""Which compiled kernels this process uses: the best the processor supports, or the one THRESHER_ISA names."""

import os
from functools import lru_cache

import torch

from thresher.errors import UsageError
from thresher.kernels import _native
from thresher.machine.cores import available_cores

PANEL: int = _native.panel
SPLIT: int = _native.split
MOST_THREADS: int = _native.most_threads

_DEFAULT_THREADS = torch.get_num_threads()
_CORES = available_cores()

# The numbers of csrc/api/kernels.h's `enum class Type`.
TYPES = {torch.bfloat16: 0, torch.float32: 1, torch.int8: 2}


def isas() -> list[str]:
    """Instruction sets that are built in and that this processor supports, best first."""
    return list(_native.isas())


@lru_cache
def kernel_set(isa: str | None = None) -> _native.KernelSet:
    """The kernels of one instruction set; by default those of THRESHER_ISA, else the best.

    Raises UsageError if this processor cannot run them.
    """
    name = isa or os.environ.get("THRESHER_ISA") or isas()[0]
    if name not in isas():
        raise UsageError(f"THRESHER_ISA={name}: not available here; choose one of {', '.join(isas())}")
    return _native.KernelSet(name)


def threads() -> int:
    """Threads a kernel uses: torch's setting, and no more than this process has processors if nobody has changed it.

    Raises UsageError if they are more than kernels can have.
    """
    count = torch.get_num_threads()
    if count > MOST_THREADS:
        raise UsageError(f"{count} threads: give at most {MOST_THREADS}")
    return min(count, _CORES) if count == _DEFAULT_THREADS else count
