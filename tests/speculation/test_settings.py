import pytest

from thresher.attention.registry import parse_method
from thresher.errors import UsageError
from thresher.speculation.settings import Speculation, parse_speculation


def test_texts():
    assert parse_speculation("none") is None
    assert parse_speculation("auto") == Speculation()
    assert parse_speculation("self:auto") == Speculation("self", method=parse_method("auto"))
    assert parse_speculation("self:snapkv,budget=512,gamma=4") == Speculation(
        "self", gamma=4, method=parse_method("snapkv:budget=512")
    )
    assert parse_speculation("ngram:ngram=2,gamma=3") == Speculation("ngram", gamma=3, ngram=2)
    assert parse_speculation("model:org/small,weights=int8,attention=streaming,window=128,gamma=2") == Speculation(
        "model", gamma=2, model="org/small", weights="int8", method=parse_method("streaming:window=128")
    )
    assert parse_speculation("auto:model=org/small") == Speculation("auto", model="org/small")


@pytest.mark.parametrize(
    "text",
    [
        "auto",
        "auto:gamma=2",
        "auto:model=a/b,weights=int8",
        "self:auto",
        "self:auto,gamma=4",
        "self:sign,budget=100,gamma=1",
        "ngram",
        "ngram:ngram=5",
        "model:a/b",
        "model:a/b.gguf,attention=quest,budget=64,weights=bf16,gamma=15",
    ],
)
def test_text_of_what_was_parsed(text):
    made = parse_speculation(text)
    assert parse_speculation(str(made)) == made


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "choose from"),
        ("fast", "choose from auto, self"),
        ("self", "name a sparse attention method"),
        ("self:dense", "name a sparse attention method"),
        ("self:autoo", "not known"),
        ("self:auto,gamma=0", "gamma=0: a draft has 1 to 15"),
        ("self:auto,gamma=-1", "gamma=-1"),
        ("self:auto,gamma=16", "gamma=16"),
        ("self:auto,gamma=x", "gamma=x: give a whole number"),
        ("self:auto,gamma=1,gamma=2", "given once"),
        ("self:auto,budgett=1", "setting 'budgett'"),
        ("self:auto,budget=0", "budget=0"),
        ("ngram:model=a", "setting 'model'"),
        ("ngram:ngram=0", "ngram=0"),
        ("model", "name one"),
        ("model:", "name one"),
        ("model:a,weights=int3", "weights=int3"),
        ("auto:weights=int8", "setting 'weights'"),
        ("none:gamma=1", "choose from"),
    ],
)
def test_what_makes_no_sense(text, message):
    with pytest.raises(UsageError, match=message):
        parse_speculation(text)


def test_sparse_attention_cannot_verify_its_own_drafts():
    with pytest.raises(UsageError, match="verified densely"):
        parse_speculation("self:auto").check_target(parse_method("sign"))
    parse_speculation("self:auto").check_target(parse_method("dense"))
    parse_speculation("ngram").check_target(parse_method("sign"))


def test_a_budget_beyond_the_context_of_the_model():
    asked = parse_speculation("self:snapkv,budget=9000")
    with pytest.raises(UsageError, match=r"9,000 tokens is more than the context of the model, 8,192"):
        asked.check_budget(8192)
    asked.check_budget(9000)
    parse_speculation("self:snapkv,budget=0.05").check_budget(10)
    parse_speculation("ngram").check_budget(10)
