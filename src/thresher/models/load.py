"""Load a causal language model, check that we can run it, and put it on our kernels."""

import io
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from typing import Any

import torch

from thresher.errors import ModelError, ThresherError, UsageError
from thresher.kernels.attention import Heads
from thresher.models.fingerprint import model_fingerprint, tokenizer_fingerprint
from thresher.models.fuse import fuse, weight_bytes
from thresher.models.interface import Attend, forward, inspect_calls, position_limit, use_our_attention
from thresher.models.resolve import ModelSource

# What --weights says: the dtype of the packed weights. Activations and KV cache are float32 only for float32.
WEIGHTS = {"bf16": torch.bfloat16, "int8": torch.int8, "float32": torch.float32}


@dataclass(frozen=True)
class Model:
    """A model ready to run. `module` is transformers' own, with layers swapped for native ones."""

    name: str
    module: Any
    tokenizer: Any
    heads: Heads
    layers: int
    dtype: torch.dtype  # of activations and KV cache
    weights: str  # a key of WEIGHTS
    weight_bytes: int  # read by one decode step
    windows: tuple[int, ...]  # sliding window of each layer, 0: none
    positions: int  # the longest sequence it was trained for
    vocab_size: int
    eos_token_ids: frozenset[int]
    fingerprint: str
    tokenizer_fingerprint: str
    stock_modules: tuple[str, ...] = ()  # kinds of module that were not swapped

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, plan: Attend, logit_rows: torch.Tensor
    ) -> torch.Tensor:
        """One pass over a flattened batch: int64 `[tokens]` each -> float32 logits `[logit_rows, vocab]`."""
        return forward(self.module, token_ids, positions, plan, logit_rows)


def load(source: ModelSource, weights: str = "bf16", trust_remote_code: bool = False) -> Model:
    """Load a resolved model.

    Raises UsageError for unknown weights, ModelError if files are missing or broken or weights are not numbers,
    UnsupportedModelError if it asks of attention what we do not compute.
    """
    if weights not in WEIGHTS:
        raise UsageError(f"weights '{weights}': choose one of {', '.join(WEIGHTS)}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = torch.float32 if weights == "float32" else torch.bfloat16
    with redirect_stderr(io.StringIO()), _ClearErrors(source):
        module = AutoModelForCausalLM.from_pretrained(
            source.folder, dtype=dtype, trust_remote_code=trust_remote_code, local_files_only=True
        ).eval()
        tokenizer = AutoTokenizer.from_pretrained(
            source.folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    model = prepare(module, tokenizer, source.name, weights)
    return replace(model, tokenizer_fingerprint=tokenizer_fingerprint(tokenizer))


def prepare(module: Any, tokenizer: Any, name: str, weights: str, swap: bool = True) -> Model:
    """Put a loaded transformers model on our attention and, if `swap`, on our layers."""
    _check_numbers(module, name)
    use_our_attention(module)
    calls = inspect_calls(module)
    fingerprint = model_fingerprint(module.config, module.state_dict())
    stock = fuse(module, WEIGHTS[weights], calls) if swap else []
    module.requires_grad_(False)
    config = module.config.get_text_config()
    eos = module.generation_config.eos_token_id if module.generation_config else config.eos_token_id
    first = calls[0]
    return Model(
        name=name,
        module=module,
        tokenizer=tokenizer,
        heads=Heads(first.q_heads, first.kv_heads, first.head_dim),
        layers=len(calls),
        dtype=torch.float32 if weights == "float32" else torch.bfloat16,
        weights=weights,
        weight_bytes=weight_bytes(module),
        windows=tuple(call.window for call in calls),
        positions=position_limit(config),
        vocab_size=config.vocab_size,
        eos_token_ids=frozenset([eos] if isinstance(eos, int) else eos or []),
        fingerprint=fingerprint,
        tokenizer_fingerprint="",
        stock_modules=tuple(stock),
    )


def _check_numbers(module: Any, name: str) -> None:
    for key, tensor in module.named_parameters():
        if not torch.isfinite(tensor).all():
            raise ModelError(f"{name}: the weights of {key} contain NaN or infinity; the files are damaged")


class _ClearErrors:
    """Turn what transformers raises on missing or broken files into one line."""

    def __init__(self, source: ModelSource) -> None:
        self.source = source

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, ThresherError):
            text = str(error).strip()
            reason = text.splitlines()[0][:160] if text else type(error).__name__
            raise ModelError(f"{self.source.folder}: cannot be loaded: {reason}") from error
