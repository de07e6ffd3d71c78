"""The threads that kernels run on: the same bits however many, any number of callers, forks, and neighbours."""

import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from thresher.errors import UsageError
from thresher.kernels import native
from thresher.kernels.elementwise import rms_norm
from thresher.kernels.linear import pack_linear


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def packed():
    torch.manual_seed(0)
    return pack_linear([torch.randn(2000, 256)], torch.float32)


@pytest.mark.parametrize("rows", [1, 7, 300])
def test_the_same_bits_with_any_number(packed, set_threads, rows):
    x = torch.randn(rows, 256)
    set_threads(1)
    expected = packed(x), rms_norm(x, torch.ones(256), 1e-5)
    for count in (2, 3, 4, 64, 2, 7, 1):
        set_threads(count)
        for _ in range(20):
            assert torch.equal(packed(x), expected[0])
            assert torch.equal(rms_norm(x, torch.ones(256), 1e-5), expected[1])


def test_many_callers_at_once(packed, set_threads):
    set_threads(4)
    inputs = [torch.randn(rows, 256) for rows in (1, 2, 5, 13, 40, 1, 3, 8)]
    expected = [packed(x) for x in inputs]
    wrong = []

    def call(x, y):
        torch.set_num_threads(1 + x.shape[0] % 4)
        wrong.extend(1 for _ in range(200) if not torch.equal(packed(x), y))

    callers = [threading.Thread(target=call, args=pair) for pair in zip(inputs, expected, strict=True)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_a_forked_process_has_threads_of_its_own(packed, set_threads):
    set_threads(3)
    x = torch.randn(5, 256)
    expected = packed(x)
    child = os.fork()
    if not child:
        os._exit(0 if all(torch.equal(packed(x), expected) for _ in range(50)) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(packed(x), expected)


def test_neighbours_that_never_rest(packed, set_threads):
    """Two processes that take all they get: a call takes its share, not a hundred times what it takes alone."""
    set_threads(2)
    x = torch.randn(1, 256)

    def seconds():
        begin = time.perf_counter()
        for _ in range(3000):
            packed(x)
        return time.perf_counter() - begin

    seconds()
    quiet = min(seconds() for _ in range(3))
    neighbours = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        time.sleep(0.3)
        busy = min(seconds() for _ in range(3))
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()
    assert busy < 20 * quiet + 1


def test_too_many_threads_are_refused(set_threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 100_000)
    with pytest.raises(UsageError, match="100000 threads.*1024"):
        native.threads()
