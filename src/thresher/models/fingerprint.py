"""Short names for what a KV cache depends on: the model's numbers and the tokenizer's table."""

import json
from collections.abc import Mapping
from typing import Any

import torch
import xxhash

SAMPLES = 64  # values of each tensor that are looked at, at least

# What may differ between two copies of one model without changing a key or a value.
_VOLATILE = {
    "_attn_implementation_internal",
    "_commit_hash",
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "quantization_config",
}


def model_fingerprint(config: Any, state: Mapping[str, torch.Tensor]) -> str:
    """A hash over the configuration and a sample of each tensor, rounded to bf16: the same for every loaded dtype."""
    digest = xxhash.xxh3_128()
    fields = {k: v for k, v in config.to_dict().items() if k not in _VOLATILE and v is not None}
    digest.update(json.dumps(fields, sort_keys=True, default=str).encode())
    for name in sorted(state):
        tensor = state[name].detach().flatten()
        picked = tensor[:: max(1, tensor.numel() // SAMPLES)]
        digest.update(f"{name} {tuple(state[name].shape)}".encode())
        digest.update(picked.to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash over vocabulary, merges, special tokens and the chat template."""
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        table = json.loads(backend.to_str())
        table.update(truncation=None, padding=None)
    else:  # written in Python, as that of bytes
        table = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    digest = xxhash.xxh3_128(json.dumps(table, sort_keys=True).encode())
    digest.update(json.dumps([str(t) for t in tokenizer.all_special_tokens]).encode())
    digest.update(json.dumps(tokenizer.chat_template).encode())
    return digest.hexdigest()
