import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from thresher.errors import UsageError
from thresher.kernels import _native, native


def test_portable_is_always_there():
    assert native.isas()[-1] == "portable"


def test_unknown_isa_is_named(monkeypatch):
    native.kernel_set.cache_clear()
    monkeypatch.setenv("THRESHER_ISA", "sse9")
    with pytest.raises(UsageError, match="sse9.*portable"):
        native.kernel_set()
    native.kernel_set.cache_clear()


@pytest.mark.parametrize("isa", native.isas())
def test_environment_forces_an_isa(isa):
    code = "from thresher.kernels.native import kernel_set; print(kernel_set().name)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"THRESHER_ISA": isa},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == isa


def test_no_openmp_but_torchs():
    """Kernels have threads of their own."""
    maps = Path("/proc/self/maps").read_text()
    assert len(set(re.findall(r"/\S*lib(?:gomp|omp|iomp5)\S*\.so\S*", maps))) == 1
    assert b"libgomp" not in Path(_native.__file__).read_bytes()
