"""Every header of csrc/ includes what it uses: it compiles alone, for the least and for the best instruction set."""

import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEADERS = sorted(str(path.relative_to(ROOT / "csrc")) for path in (ROOT / "csrc").rglob("*.h"))


def flags(isa):
    """Those of CMakeLists.txt."""
    given = dict(re.findall(r"set\(flags_(\w+) (.*)\)", (ROOT / "CMakeLists.txt").read_text()))
    words = [flags(word[8:-1]) if word.startswith("${flags_") else [word] for word in given[isa].split()]
    return [flag for each in words for flag in each if flag != '""']


def errors(header, isa):
    command = ["g++", "-std=gnu++20", "-fsyntax-only", "-Wno-psabi", *flags(isa), f"-DTHRESHER_ISA={isa}", "-I", "csrc"]
    done = subprocess.run(
        [*command, "-x", "c++", "-include", header, "/dev/null"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return [f"{header}, {isa}: {line}" for line in done.stderr.splitlines() if "error" in line]


needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="the compiler whose flags these are is not here")


@needs_compiler
def test_headers_compile_alone():
    isas = ["portable", "avx512_bf16"] if platform.machine() in ("x86_64", "AMD64") else ["portable"]
    once = ("api/", "host/")  # seen by, or compiled into, what does not know of instruction sets
    tasks = [(header, isa) for header in HEADERS for isa in isas if isa == "portable" or not header.startswith(once)]
    with ThreadPoolExecutor(2) as pool:
        assert not [line for lines in pool.map(errors, *zip(*tasks, strict=True)) for line in lines]


@needs_compiler
def test_nothing_but_the_table_leaves_an_object(tmp_path):
    """Or the linker could pick, of two functions of one name, the one that was built for another processor. Without
    optimisation, so that nothing is inlined and hidden by that."""
    command = [
        "g++",
        "-std=gnu++20",
        "-O0",
        "-Wno-psabi",
        "-Icsrc",
        "-DTHRESHER_ISA=portable",
        "-c",
        "csrc/kernels.cpp",
    ]
    subprocess.run([*command, "-o", tmp_path / "kernels.o"], cwd=ROOT, check=True)
    names = subprocess.run(
        ["nm", "-C", "--defined-only", "--extern-only", tmp_path / "kernels.o"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert [line.split(maxsplit=2)[2] for line in names] == ["thresher::kernels_portable"]
