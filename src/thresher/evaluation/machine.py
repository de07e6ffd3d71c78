"""Measure the machine with the kernels themselves."""

import torch

from thresher.kernels import _native
from thresher.kernels.linear import pack_linear
from thresher.kernels.native import kernel_set, threads
from thresher.machine.profile import MachineProfile, median_seconds

_READ_BYTES = 512 * 2**20  # well beyond any cache


def measure_machine(dtype: torch.dtype = torch.bfloat16) -> MachineProfile:
    """Read 512 MiB with every thread; multiply 512 rows by a packed matrix. About a second."""
    data = torch.ones(_READ_BYTES // 4)
    read = median_seconds(lambda: _native.read_memory(kernel_set(), data.data_ptr(), data.numel(), threads()))
    return MachineProfile(threads(), _READ_BYTES / read, matmul_rate(dtype))


def matmul_rate(dtype: torch.dtype, rows: int = 512, width: int = 1024) -> float:
    """Operations a second of our own product, `[rows, width] @ [width, width]`."""
    packed = pack_linear([torch.randn(width, width)], dtype)
    x = torch.randn(rows, width).to(torch.float32 if dtype == torch.float32 else torch.bfloat16)
    return 2 * rows * width * width / median_seconds(lambda: packed(x))
