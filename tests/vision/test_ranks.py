"""Which ranks: budgets that are kept, harm that is least, time that is measured."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from thresher.errors import UsageError
from thresher.vision.decompose import all_bases, decompose
from thresher.vision.latency import onnx_layers, onnx_runner
from thresher.vision.layers import count_macs, count_parameters, survey
from thresher.vision.nets import make_net
from thresher.vision.ranks import (
    Option,
    Target,
    align,
    allocate,
    candidates,
    counted_costs,
    equal_ranks,
    layer_options,
    log_probabilities,
    measured_costs,
    target_cost,
    vbmf_ranks,
)

EXAMPLE = torch.rand(1, 1, 28, 28, generator=torch.Generator().manual_seed(0))
IMAGES = torch.rand(16, 1, 28, 28, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    pass


@pytest.fixture(scope="module")
def net():
    model = make_net("resnet", 10, 1).eval()
    g = torch.Generator().manual_seed(2)
    for m in model.modules():
        if isinstance(m, nn.Conv2d):  # a spectrum that falls, as trained weights have
            m.weight.data *= (torch.arange(1, m.out_channels + 1)[torch.randperm(m.out_channels, generator=g)] ** -0.5)[
                :, None, None, None
            ]
    found = survey(model, EXAMPLE)
    return model, found, all_bases(model, found)


@pytest.mark.parametrize("cost", ["flops", "parameters"])
@pytest.mark.parametrize("share", [0.7, 0.5, 0.3])
def test_a_target_is_met_within_two_percent(net, cost, share):
    model, found, bases = net
    costs = counted_costs(found, cost)
    for images in (None, IMAGES):
        options = layer_options(model, found, bases, images, costs, multiple=4)
        ranks = allocate(options, costs.whole, share)
        result, _ = decompose(model, found, bases, ranks, rounds=0)
        count = count_macs(result, EXAMPLE) if cost == "flops" else count_parameters(result)
        assert count / costs.whole == pytest.approx(target_cost(ranks, found, costs))
        assert share - 0.02 <= count / costs.whole <= share
        assert all(r % 4 == 0 for pair in ranks.values() for r in pair)


def test_where_it_hurts_least_is_better_than_everywhere_alike(net):
    model, found, bases = net
    costs = counted_costs(found, "flops")
    expected = log_probabilities(model, IMAGES)

    def harm(ranks):
        result, _ = decompose(model, found, bases, ranks)
        given = log_probabilities(result, IMAGES)
        return float(nn.functional.kl_div(given, expected, reduction="batchmean", log_target=True))

    before = {n: p.clone() for n, p in model.state_dict().items()}
    options = layer_options(model, found, bases, IMAGES, costs)
    chosen = allocate(options, costs.whole, 0.5)
    assert harm(chosen) < harm(equal_ranks(found, costs, 0.5))
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())


@settings(max_examples=60)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=4), min_size=1, max_size=4
    ),
    st.floats(0.1, 1.1),
)
def test_allocation_is_near_the_best(layers, share):
    options = {
        str(i): [Option((k + 1, 1), float(c), h / 10) for k, (c, h) in enumerate(layer)] + [Option(None, 21.0, 0.0)]
        for i, layer in enumerate(layers)
    }
    whole = 21 * len(layers) + 5
    allowed = share * whole
    combinations = list(itertools.product(*options.values()))
    within = [c for c in combinations if 5 + sum(o.cost for o in c) <= allowed]
    if not within:
        with pytest.raises(UsageError, match="out of reach"):
            allocate(options, whole, share)
        return
    ranks = allocate(options, whole, share)
    chosen = [next(o for o in layer if o.ranks == ranks.get(n)) for n, layer in options.items()]
    assert 5 + sum(o.cost for o in chosen) <= allowed
    best = min(sum(o.harm for o in c) for c in within)
    largest = max(o.harm for layer in options.values() for o in layer)  # what the last step may cost
    assert sum(o.harm for o in chosen) <= best + largest


def test_candidates_are_aligned_and_none_is_worse_twice(net):
    _, found, bases = net
    for c in found.open:
        pairs = candidates(c, bases[c.name], 8)
        costs = [c.macs_at(*p) for p in pairs]
        errors = [bases[c.name].expected_error(p[0], c.inputs if c.pointwise else p[1]) for p in pairs]
        assert costs == sorted(set(costs))
        assert errors == sorted(errors, reverse=True)
        assert all(cost < c.macs for cost in costs)
        assert all(r % 8 == 0 for p in pairs for r in p)


def test_alignment():
    assert [align(r, 32, 8) for r in (0.1, 3, 11, 12.1, 30, 99)] == [8, 8, 8, 16, 32, 32]
    assert align(2.4, 6, 8) == 2
    assert align(0, 6, 8) == 1
    assert align(60, 60, 8) == 60


def test_what_cannot_be_reached(net):
    model, found, bases = net
    costs = counted_costs(found, "flops")
    with pytest.raises(UsageError, match=r"a target of 0.01 is out of reach: the least is 0\.\d\d\d of the whole"):
        equal_ranks(found, costs, 0.01)
    options = layer_options(model, found, bases, None, costs)
    with pytest.raises(UsageError, match="the least is 0"):
        allocate(options, costs.whole, 0.01)


@pytest.mark.parametrize(("share", "cost"), [(0, "flops"), (1, "flops"), (math.nan, "flops"), (0.5, "energy")])
def test_targets_that_make_no_sense(share, cost):
    with pytest.raises(UsageError):
        Target(share, cost)


def test_vbmf_keeps_what_stands_out():
    model = nn.Sequential(nn.Conv2d(1, 32, 3), nn.Conv2d(32, 64, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    g = torch.Generator().manual_seed(0)
    core, outer, inner = (
        torch.randn(8, 4, 3, 3, generator=g),
        torch.randn(64, 8, generator=g),
        torch.randn(32, 4, generator=g),
    )
    signal = torch.einsum("abhw,oa,ib->oihw", core, outer, inner)
    model[1].weight.data = signal + 0.1 * torch.randn(signal.shape, generator=g)
    found = survey(model, EXAMPLE)
    assert vbmf_ranks(model, found, multiple=4) == {"1": (8, 4)}
    assert vbmf_ranks(model, found, weakening=0.5, multiple=4) == {"1": (36, 16)}
    assert vbmf_ranks(model, found, weakening=0.0) == {}
    with pytest.raises(UsageError, match="not between 0 and 1"):
        vbmf_ranks(model, found, weakening=1.5)


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_measured_costs_are_times(runtime):
    model = make_net("vgg", 10, 1).eval()
    found = survey(model, EXAMPLE)
    costs = measured_costs(model, 1.0, 4, runtime, seconds=0.02)
    last = found.open[-1]
    assert 0 < costs.of(last, (8, 8)) < costs.of(last, None) < costs.whole
    assert costs.of(last, (8, 8)) == costs.of(last, (8, 8))  # measured once


def test_onnx_layers_compute_what_they_stand_for():
    layers = [nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 4, (3, 5), (2, 1), (1, 2), (1, 1)), nn.Conv2d(4, 6, 1)]
    images = torch.rand(2, 3, 11, 9)
    given = torch.from_numpy(onnx_runner(onnx_layers(layers, images), images)()[0])
    assert (given - nn.Sequential(*layers)(images)).abs().max() < 1e-5
