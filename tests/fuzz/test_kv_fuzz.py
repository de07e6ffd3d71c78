"""A short run of the fuzz target; `kv_fuzz.py` says how to make a long one."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS = 15


@pytest.mark.timeout(600)
def test_altered_kv_files():
    command = [sys.executable, Path(__file__).with_name("kv_fuzz.py"), "--count", "1000000", "--seconds", str(SECONDS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = {name: int(n) for n, name in re.findall(r"(\d+) ([\w ]+)", done.stdout)}
    for files in ("", " with state"):
        assert counts[f"answered{files}"] > 10
        assert counts[f"KVFileDamagedError{files}"] > 10
