"""Real models from GGUF files, in every weight format, against transformers on the same weights.

THRESHER_REAL_MODELS names a folder with GGUF files; docs/results.md says which ones were tried.
Run as a script it prints the figures: `python tests/models/test_real_models.py FILE.gguf ...`.
"""

import gc
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

from thresher.cache.sequence import KVSequence
from thresher.decoding.runner import Runner, Work
from thresher.evaluation.llama_cpp import AS_IT_LIES, LlamaCpp
from thresher.evaluation.texts import public_text
from thresher.models.check import divergence
from thresher.models.load import load
from thresher.models.resolve import resolve

FOLDER = os.environ.get("THRESHER_REAL_MODELS")
FILES = sorted(Path(FOLDER).glob("*.gguf")) if FOLDER else []
TOKENS = 512
GREEDY = 64
LIMITS = {"float32": 1e-5, "bf16": 0.002, "int8": 0.01}  # mean KL, nats a token


def own(source, ids):
    """Logits of transformers in float32 `[tokens, vocab]`, and the tokens that it would go on with."""
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
    prompt = ids[None, :100]
    with torch.inference_mode():
        logits = module(input_ids=ids[None], use_cache=False).logits[0].float()
        out = module.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=GREEDY, do_sample=False, eos_token_id=None
        )
    return logits, out[0, 100:].tolist()


def ours(model, ids):
    """The same, in pieces."""
    runner = Runner(model)
    sequence = KVSequence(runner.layout)
    logits = [runner.run([Work(sequence, piece.tolist(), len(piece))]) for piece in ids.split(200)]
    sequence = KVSequence(runner.layout)
    step, tokens = runner.run([Work(sequence, ids[:100].tolist(), 1)]), []
    for _ in range(GREEDY):
        tokens.append(int(step[-1].argmax()))
        step = runner.run([Work(sequence, tokens[-1:], 1)])
    return torch.cat(logits), tokens


def of_llama_cpp(file, ids):
    """Logits of llama.cpp, which computes with the file's own weights, one token at a time."""
    engine = LlamaCpp(Path(file), AS_IT_LIES, flash=False, threads=torch.get_num_threads())
    engine.prefill(ids[:1].tolist())
    logits = [engine.logits(0)]
    for token in ids[1:].tolist():
        engine.decode(token)
        logits.append(engine.logits(0))
    return torch.stack(logits)


def measure(file, peer=False):
    """KL to transformers float32 for each format, and of llama.cpp; how many greedy float32 tokens agree."""
    source = resolve(str(file))
    ids = torch.tensor(load(source, "bf16").tokenizer.encode(public_text("paradise_lost")[:20_000]))[:TOKENS]
    assert len(ids) == TOKENS
    reference, expected = own(source, ids)
    found = {}
    for weights in LIMITS:
        gc.collect()
        model = load(source, weights)
        logits, tokens = ours(model, ids)
        found[weights] = divergence(reference, logits)
        if weights == "float32":
            same = next((i for i, (a, b) in enumerate(zip(expected, tokens, strict=True)) if a != b), GREEDY)
    if peer:
        found["llama.cpp"] = divergence(reference, of_llama_cpp(file, ids)[:, : reference.shape[1]])
    return found, same


@pytest.mark.timeout(900)
@pytest.mark.skipif(not FILES, reason="THRESHER_REAL_MODELS does not name a folder with GGUF files")
@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_near_transformers(file):
    found, same = measure(file)
    assert same == GREEDY
    for weights, kl in found.items():
        assert kl <= LIMITS[weights], (weights, kl)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        found, same = measure(Path(name), peer=importlib.util.find_spec("llama_cpp") is not None)
        print(Path(name).name, {k: f"{v:.2g}" for k, v in found.items()}, f"greedy {same}/{GREEDY}", flush=True)
