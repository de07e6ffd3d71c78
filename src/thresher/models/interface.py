"""The seam to transformers: its models call our attention, and say beforehand what they will ask of it."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from thresher.errors import UnsupportedModelError

NAME = "thresher"

# Keyword arguments of an attention call that change nothing we compute.
_HARMLESS = {
    NAME,
    "cache_position",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "sliding_window",
    "use_cache",
}
_NAMED = {
    "is_causal": "both directions",
    "position_bias": "a position bias",
    "s_aux": "attention sinks",
    "softcap": "soft-capped logits",
}


class Attend(Protocol):
    """What computes attention during a forward pass: kernels.attention.AttentionPlan, or a stand-in."""

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, layer_window: int = 0
    ) -> torch.Tensor:
        """q `[tokens, q_heads, head_dim]`, k, v `[tokens, kv_heads, head_dim]` -> `[tokens, q_heads, head_dim]`."""


def attention_function(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in place of its own attention; query `[1, heads, tokens, head_dim]`.

    The plan of the batch arrives as the keyword argument `thresher`, handed through `model.forward`.
    """
    for name, given in kwargs.items():
        if name not in _HARMLESS and given is not None and not (name == "is_causal" and given):
            what = _NAMED.get(name, repr(name))
            raise UnsupportedModelError(
                f"{type(module).__name__} asks attention for {what}: Thresher does not compute it"
            )
    plan: Attend = kwargs[NAME]
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = plan.attend(module.layer_idx, q, k, v, scale, kwargs.get("sliding_window") or 0)  # type: ignore[arg-type]
    return out[None], None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Causality and windows are the kernel's. Without a registered function transformers would drop them silently."""


def use_our_attention(model: Any) -> None:
    """Make a transformers model call `attention_function`; UnsupportedModelError if it cannot."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_function)
    AttentionMaskInterface.register(NAME, _no_mask)
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise UnsupportedModelError(f"{type(model).__name__} does not use transformers' attention interface")


@dataclass(frozen=True)
class LayerCall:
    """What one layer asked of attention."""

    q_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    window: int


@dataclass
class Recorder:
    """Stands in for a plan: attends within the batch by torch, and notes every layer's call."""

    calls: dict[int, LayerCall] = field(default_factory=dict)

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, layer_window: int = 0
    ) -> torch.Tensor:
        self.calls[layer] = LayerCall(q.shape[1], k.shape[1], q.shape[2], v.shape[2], scale, layer_window)
        position = torch.arange(q.shape[0])
        seen = position[None, :] <= position[:, None]
        if layer_window:
            seen &= position[None, :] > position[:, None] - layer_window
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
        return out[0].transpose(0, 1).contiguous()


def forward(
    model: Any, token_ids: torch.Tensor, positions: torch.Tensor, plan: Attend, logit_rows: torch.Tensor
) -> torch.Tensor:
    """One pass over a flattened batch. token_ids, positions int64 `[tokens]`; logits float32 `[logit_rows, vocab]`."""
    out = model(
        input_ids=token_ids[None],
        position_ids=positions[None],
        use_cache=False,
        logits_to_keep=logit_rows,
        **{NAME: plan},
    )
    logits: torch.Tensor = out.logits[0]
    return logits.float()


def inspect_calls(model: Any) -> list[LayerCall]:
    """A dry run that shows what each layer asks for. Refuses, by name, what we do not compute."""
    config = model.config.get_text_config()
    _check_config(config)
    recorder = Recorder()
    tokens = torch.arange(3) % config.vocab_size
    with torch.inference_mode():
        try:
            forward(model, tokens, torch.arange(3), recorder, torch.tensor([2]))
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise UnsupportedModelError(
                f"{type(model).__name__} does not run as a flattened batch: {type(error).__name__}: {error}"
            ) from error
    missing = sorted(set(range(config.num_hidden_layers)) - set(recorder.calls))
    if missing:
        raise UnsupportedModelError(
            f"{type(model).__name__}: layers {missing[:8]} are not softmax attention (linear or state space)"
        )
    calls = [recorder.calls[i] for i in range(config.num_hidden_layers)]
    first = calls[0]
    for i, call in enumerate(calls):
        if call.head_dim != call.value_dim:
            raise UnsupportedModelError(f"layer {i}: keys of {call.head_dim} and values of {call.value_dim} (MLA)")
        if (call.q_heads, call.kv_heads, call.head_dim) != (first.q_heads, first.kv_heads, first.head_dim):
            raise UnsupportedModelError(f"layer {i} has attention heads of another shape than layer 0")
    types = getattr(config, "layer_types", None) or []
    for i, (kind, call) in enumerate(zip(types, calls, strict=False)):
        if kind == "sliding_attention" and not call.window:
            raise UnsupportedModelError(f"layer {i} has a sliding window but does not hand it to attention")
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedModelError(f"layer {i} is of type {kind}, which Thresher does not compute")
    return calls


def _check_config(config: Any) -> None:
    name = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder; Thresher runs causal language models")
    if getattr(config, "num_kv_shared_layers", 0):
        raise UnsupportedModelError(f"{name} shares keys and values between layers, which Thresher does not do")
    if getattr(config, "attention_chunk_size", None):
        raise UnsupportedModelError(f"{name} uses chunked attention, which Thresher does not compute")
    if getattr(config, "use_bidirectional_attention", None) or getattr(config, "is_causal", True) is False:
        raise UnsupportedModelError(f"{name} attends in both directions; Thresher runs causal language models")
    if getattr(config, "attn_logit_softcapping", None):
        raise UnsupportedModelError(f"{name} asks attention for soft-capped logits, which Thresher does not compute")


def position_limit(config: Any) -> int:
    """Positions the model was trained for. Scaled RoPE that changes with the length stays within its first regime."""
    limit = int(config.max_position_embeddings)
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *(v for v in rope.values() if isinstance(v, dict))):
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            original = parameters.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", None)
            limit = min(limit, int(original or limit))
    return limit
