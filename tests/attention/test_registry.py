"""The text that chooses a method: what is refused, and that a method writes itself as it is read."""

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.attention.base import AttentionMethod, parameter_types
from thresher.attention.registry import METHODS, parse_method
from thresher.attention.sparse import SparseMethod, describe_parameters
from thresher.errors import UsageError
from thresher.machine.cost import ModelShape

REFUSED = [
    ("streamin", "did you mean 'streaming'"),
    ("SIGN", "there is dense, auto"),
    ("", "there is dense, auto"),
    ("topk:budgt=3", "did you mean 'budget'"),
    ("dense:budget=3", "there is none"),
    ("lsh:k=9", "parameter 'k'"),
    ("quest:size=16", "parameter 'size'"),
    ("topk:budget", "not a number"),
    ("topk:budget=many", "not a number"),
    ("topk:window=3.5", "not a whole number"),
    ("streaming:window=x", "not a whole number"),
    ("lsh:K=-1", "give 0 to 16 bits"),
    ("lsh:K=17", "give 0 to 16 bits"),
    ("lsh:L=1", "give 2 to 255 tables"),
    ("lsh:L=256", "give 2 to 255 tables"),
    ("lsh:K=16,L=251", "at most 4000 bits"),
    ("lsh:certify=-0.1", "certify=-0.1"),
    ("sign:bits=0", "multiple of 32 from 32 to 512"),
    ("sign:bits=48", "multiple of 32 from 32 to 512"),
    ("auto:bits=544", "multiple of 32 from 32 to 512"),
    ("verified:bits=16", "multiple of 32 from 32 to 512"),
    ("verified:epsilon=0", "between 0 and 1"),
    ("verified:delta=1", "between 0 and 1"),
    ("verified:pilot=1.5", "between 0 and 1"),
    ("verified:heavy=0", "heavy=0"),
    ("verified:heavy=-1", "heavy=-1"),
    ("quest:page=0", "a divisor of 64"),
    ("quest:page=24", "a divisor of 64"),
    ("quest:page=128", "a divisor of 64"),
    ("block_topk:block=-16", "a divisor of 64"),
    ("clusters:tokens=0", "give 1 to 64 tokens"),
    ("clusters:tokens=65", "give 1 to 64 tokens"),
    ("clusters:budget=0", "budget=0"),
    ("topk:budget=0", "budget=0"),
    ("topk:budget=-0.5", "budget=-0.5"),
    ("topk:budget=nan", "not a number"),
    ("topk:budget=1.0", "whole tokens"),
    ("topk:budget=256.0", "whole tokens"),
    ("sign:budget=2.5", "whole tokens"),
    ("auto:budget=1.0", "whole tokens"),
    ("clusters:budget=1.0", "whole tokens"),
    ("verified:heavy=1.0", "whole tokens"),
    ("sample:draws=1.0", "whole tokens"),
    ("sample:draws=1000001", "at most 1000000 draws"),
    ("topk:budget=1e300", "up to 2^53"),
    ("lsh:seed=-1", "seed must be 0 or more"),
    ("verified:seed=-1", "seed must be 0 or more"),
    ("sample:seed=-1", "seed must be 0 or more"),
    ("topk:union=2", "give 0 or 1"),
    ("topk:tail=-1", "0 to 4096 centroids"),
    ("topk:tail=4097", "0 to 4096 centroids"),
    ("streaming:tail=5000", "0 to 4096 centroids"),
    ("topk:tail=8,union=0", "needs union=1"),
    ("auto:union=0", "needs union=1"),
    ("snapkv:observe=0", "1 or more queries"),
    ("snapkv:pool=4", "odd number"),
    ("sample:draws=0", "draws=0"),
    ("topk:sinks=-1", "sinks must be 0 or more"),
    ("streaming:window=0", "window 1 or more"),
    ("topk:dense_layers=0-1", "numbers of layers as in 0+1, or none"),
    ("topk:dense_layers=all", "numbers of layers as in 0+1, or none"),
    ("topk:dense_layers=-1", "numbers of layers as in 0+1, or none"),
    ("topk:dense_layers=", "numbers of layers as in 0+1, or none"),
]


@pytest.mark.parametrize(("text", "words"), REFUSED)
def test_refused_in_one_line(text, words):
    with pytest.raises(UsageError) as error:
        parse_method(text)
    message = str(error.value)
    assert words in message
    assert "\n" not in message
    assert len(message) < 300


def test_only_finite_numbers():
    for text in ("topk:budget=inf", "clusters:budget=1e999", "sample:draws=inf", "lsh:certify=nan", "lsh:certify=-inf"):
        with pytest.raises(UsageError, match="not a number"):
            parse_method(text)


PARAMETERS = [(name, key, kind) for name, m in METHODS.items() for key, kind in parameter_types(m).items()]
NUMBERS = [(name, key) for name, key, kind in PARAMETERS if kind is not str]


@pytest.mark.parametrize(("name", "key"), NUMBERS)
@pytest.mark.parametrize("value", [10**23, -(10**23), 2**53 + 1])
def test_no_number_that_kernels_cannot_hold(name, key, value):
    with pytest.raises(UsageError, match=r"up to 2\^53"):
        parse_method(f"{name}:{key}={value}")


@pytest.mark.parametrize(("name", "key"), NUMBERS)
def test_parameters_given_in_python_are_checked_alike(name, key):
    for value in (float("nan"), float("inf"), "4", None):
        with pytest.raises(UsageError, match=f"{name}, {key}={value}: give a"):
            METHODS[name](**{key: value})


def test_types_of_parameters():
    """Those that are written in the dataclasses, also if the default of a float is a whole number."""
    assert {kind for _, _, kind in PARAMETERS} == {int, float, str}
    types = {(name, key): kind for name, key, kind in PARAMETERS}
    assert types["topk", "budget"] is types["lsh", "certify"] is types["sample", "draws"] is float
    assert types["topk", "window"] is types["streaming", "window"] is types["lsh", "K"] is int
    assert types["auto", "dense_layers"] is str


@pytest.mark.parametrize(("text", "layers"), [("none", ()), ("0", (0,)), ("0+1", (0, 1)), ("3+0+7", (3, 0, 7))])
def test_dense_layers(text, layers):
    assert parse_method(f"topk:dense_layers={text}").dense_layer_numbers() == layers


CHOICES = {
    "sinks": st.integers(0, 1000),
    "window": st.integers(1, 10**6),
    "dense_layers": st.sampled_from(["none", "0", "0+1", "2+5+31"]),
    "dense_below": st.integers(-1, 10**6),
    "budget": st.integers(1, 10**6) | st.floats(1e-6, 0.999),
    "share": st.floats(0, 0.999),
    "draws": st.integers(1, 10**6) | st.floats(1e-6, 0.999),
    "heavy": st.integers(1, 10**6) | st.floats(1e-6, 0.999),
    "tail": st.integers(0, 4096),
    "bits": st.integers(1, 16).map(lambda n: 32 * n),
    "seed": st.integers(0, 2**40),
    "K": st.integers(0, 15),
    "L": st.integers(2, 255),
    "certify": st.just(0) | st.floats(1e-6, 10),
    "epsilon": st.floats(1e-6, 0.999),
    "delta": st.floats(1e-6, 0.999),
    "pilot": st.floats(1e-6, 0.999),
    "page": st.sampled_from([1, 2, 4, 8, 16, 32, 64]),
    "block": st.sampled_from([1, 2, 4, 8, 16, 32, 64]),
    "tokens": st.integers(1, 64),
    "observe": st.integers(1, 500),
    "pool": st.integers(0, 20).map(lambda n: 2 * n + 1),
}


@st.composite
def methods(draw):
    method = METHODS[draw(st.sampled_from(sorted(METHODS)))]
    names = [f.name for f in fields(method) if f.name != "union"]
    chosen = draw(st.lists(st.sampled_from(names), unique=True)) if names else []
    return method(**{name: draw(CHOICES[name]) for name in chosen})


@given(methods())
def test_a_method_is_read_as_it_is_written(method):
    again = parse_method(str(method))
    assert again == method
    assert str(again) == str(method)
    assert str(method).startswith(method.name)


def test_union_is_read_as_it_is_written():
    assert str(parse_method("topk:union=0")) == "topk:union=0"
    assert parse_method("quest:union=0,page=8") == METHODS["quest"](union=0, page=8)


def test_only_what_is_not_as_by_default_is_written():
    for name, method in METHODS.items():
        assert str(method()) == name
        assert (
            parse_method(f"{name}:{','.join(f'{k}={v}' for k, v in describe_parameters(method).items())}") == method()
        )


@given(methods(), st.integers(0, 10**6))
def test_budgets_are_tokens_or_shares(method, context):
    if not isinstance(method, SparseMethod):
        return
    tokens = method.budget_tokens(context)
    assert isinstance(tokens, int)
    assert tokens >= 0


@given(methods(), st.integers(1, 10**6))
def test_costs_are_those_of_dense_attention_at_most_where_a_method_is_used(method, context):
    """Up to `least_context` a method costs what dense attention costs; all costs are positive."""
    shape = ModelShape(
        layers=30, q_heads=9, kv_heads=3, head_dim=64, weight_bytes=10**8, weight_count=10**8, value_bytes=2
    )
    cost, dense = method.cost(shape, context), METHODS["dense"]().cost(shape, context)
    assert cost.bytes > 0
    if isinstance(method, SparseMethod) and not method.visibility() and context <= method.least_context(shape):
        assert cost == dense


def test_methods_say_what_they_are():
    for name, method in METHODS.items():
        assert method.name == name
        assert method.paper.startswith("https://")
        assert isinstance(method.exact, bool)
        assert method.__doc__
        assert method.__doc__ != AttentionMethod.__doc__
        assert method.__doc__.splitlines()[0].strip()
