import pytest

from thresher.machine.cost import Cost, ModelShape, attention_cost, weights_cost
from thresher.machine.profile import MachineProfile

SHAPE = ModelShape(30, 9, 3, 64, weight_bytes=268_000_000, weight_count=134_000_000, value_bytes=2)


def test_costs_add_up():
    assert Cost(1, 2) + Cost(3, 4) == Cost(4, 6)
    assert Cost(1, 2).times(3) == Cost(3, 6)


def test_a_decode_step_of_the_embedded_model():
    assert SHAPE.kv_bytes_per_token == 30 * 2 * 3 * 64 * 2
    step = weights_cost(SHAPE, 1) + attention_cost(SHAPE, 8192)
    assert step.bytes == 268_000_000 + 8192 * SHAPE.kv_bytes_per_token
    assert step.flops == 2 * 134_000_000 + 4 * 30 * 9 * 64 * 8192


def test_queries_that_share_rows_read_them_once():
    one, eight = attention_cost(SHAPE, 1000, 1), attention_cost(SHAPE, 1000, 8)
    assert eight.bytes == one.bytes
    assert eight.flops == 8 * one.flops


def test_floor_is_the_slower_of_memory_and_arithmetic():
    machine = MachineProfile(threads=2, read=10e9, matmul=100e9)
    assert machine.seconds(Cost(flops=1e9, bytes=1e9)) == pytest.approx(0.1)
    assert machine.seconds(Cost(flops=1e11, bytes=1e9)) == pytest.approx(1.0)
