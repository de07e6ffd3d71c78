"""The seam to transformers: its models call our attention, and say beforehand what they will ask of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from thresher.errors import UnsupportedModelError
from thresher.models.states import StateBatch, state_shape_of

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
    "blank",
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
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        layer_window: int = 0,
        blank: int = 0,
    ) -> torch.Tensor:
        """q `[tokens, q_heads, head_dim]`, k, v `[tokens, kv_heads, head_dim]` -> `[tokens, q_heads, head_dim]`."""


def attention_function(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in place of its own attention; query `[1, heads, tokens, head_dim]`.

    The plan of the batch arrives as the keyword argument `thresher`, handed through `model.forward`. blank: so many
    first rows of the layer hold nothing and are seen by nobody.
    """
    for name, given in kwargs.items():
        if name not in _HARMLESS and given is not None and not (name == "is_causal" and given):
            what = _NAMED.get(name, repr(name))
            raise UnsupportedModelError(
                f"{type(module).__name__} asks attention for {what}: Thresher does not compute it"
            )
    plan: Attend = kwargs[NAME]
    window = kwargs.get("sliding_window") or 0
    if isinstance(plan, Recorder) and plan.masks is not None:
        plan.masks.compare(module, attention_mask, window)
    elif attention_mask is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} hands attention a mask of its own: Thresher does not compute it"
        )
    if query.shape[0] != 1 or key.shape[2] != query.shape[2]:
        raise UnsupportedModelError(f"{type(module).__name__} attends to other tokens than those of the sequence")
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = plan.attend(module.layer_idx, q, k, v, scale, window, kwargs.get("blank", 0))  # type: ignore[arg-type]
    return out[None], None


@dataclass
class MaskRecorder:
    """The masks that a model makes in a dry run, so that a layer's mask can be compared with what it told attention.

    Our kernels know causality and one window a layer. Transformers would give other masks (chunks, both directions,
    a window that only the mask has) to its own attention; ours must refuse them.
    """

    positions: int  # the longest sequence to ask a mask about
    made: list[tuple[torch.Tensor, int]] = field(default_factory=list)  # a mask and its window, 0: none

    def make(self, mask_function: Any, **kwargs: Any) -> torch.Tensor:
        from transformers.masking_utils import eager_mask

        mask: torch.Tensor = eager_mask(mask_function=mask_function, **kwargs)
        self.made.append((mask, self._window(mask_function)))
        return mask

    def _window(self, mask_function: Any) -> int:
        """The window of a causal mask function, by asking it about three queries; UnsupportedModelError for others."""
        nothing = torch.tensor(0)
        last = self.positions - 1
        window = 0
        for query in (last, last * 3 // 4, last // 2):
            keys = torch.arange(min(self.positions, query + 2))
            seen = torch.as_tensor(mask_function(nothing, nothing, torch.tensor(query), keys)).expand(len(keys))
            count = int(seen.sum())
            if not window:  # of the longest: counts of all that came before mean no window
                window = count
            expected = (keys <= query) & (keys > query - window)
            if not torch.equal(seen.bool(), expected):
                raise UnsupportedModelError("a mask that is neither causal nor a sliding window is not computed here")
        return 0 if window == self.positions else window

    def compare(self, module: nn.Module, mask: torch.Tensor | None, window: int) -> None:
        """Refuse a layer whose mask is not what `window` says."""
        name = type(module).__name__
        if mask is None:
            return
        windows = {w for known, w in self.made if mask.shape == known.shape and torch.equal(mask, known)}
        windows = {w for known, w in self.made if mask is known} or windows
        if not windows:
            raise UnsupportedModelError(f"{name} changes the attention mask: Thresher does not compute it")
        if (window if window < self.positions else 0) not in windows:
            raise UnsupportedModelError(
                f"{name} has a window of {max(windows) or 'no'} tokens in its mask, and asks for {window or 'none'}"
            )


_recording: MaskRecorder | None = None


def _our_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """None: causality and windows are the kernel's. Without a registered function transformers would drop them."""
    return _recording.make(*args, **kwargs) if _recording else None


def use_our_attention(model: Any) -> None:
    """Make a transformers model call `attention_function`; UnsupportedModelError if it cannot."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_function)
    AttentionMaskInterface.register(NAME, _our_mask)
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
    blank: int = 0


@dataclass
class Recorder:
    """Stands in for a plan: attends within the batch by torch, and notes every layer's call."""

    calls: dict[int, LayerCall] = field(default_factory=dict)
    masks: MaskRecorder | None = None
    states: StateBatch | None = None

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        layer_window: int = 0,
        blank: int = 0,
    ) -> torch.Tensor:
        if layer in self.calls:
            raise UnsupportedModelError(f"layer {layer} calls attention more than once: Thresher does not compute it")
        self.calls[layer] = LayerCall(q.shape[1], k.shape[1], q.shape[2], v.shape[2], scale, layer_window, blank)
        position = torch.arange(q.shape[0])
        seen = (position[None, :] <= position[:, None]) & (position[None, :] >= blank)
        if layer_window:
            seen &= position[None, :] > position[:, None] - layer_window
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
        return (out[0] * seen.any(-1)[None, :, None]).transpose(0, 1).contiguous()


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


@dataclass(frozen=True)
class Inspection:
    """What dry runs showed: each layer's call, and the linear layers whose weights other code reads directly."""

    calls: list[LayerCall]
    weights_read: frozenset[str]


def inspect_model(model: Any) -> Inspection:
    """Dry runs that show what each layer asks for. Refuses, by name, what we do not compute."""
    config = model.config.get_text_config()
    check_config(config)
    recorder = Recorder()
    with _watched_linears(model) as read:
        _dry_run(model, recorder)
    _dry_run(model, Recorder(masks=MaskRecorder(position_limit(config))))
    layers = attention_layers(config)
    missing = sorted(set(range(layers)) - set(recorder.calls))
    if missing:
        raise UnsupportedModelError(
            f"{type(model).__name__}: layers {missing[:8]} are not softmax attention (linear or state space)"
        )
    calls = [recorder.calls[i] for i in range(layers)]
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
    return Inspection(calls, frozenset(read))


@contextmanager
def _watched_linears(model: nn.Module) -> Iterator[set[str]]:
    """The names of linear layers whose weight or bias is looked at by other code than their own (a native layer has
    neither: a router that asks for `gate.weight.dtype`, say)."""
    read: set[str] = set()
    names = {id(m): name for name, m in model.named_modules() if type(m) is nn.Linear}

    class Watched(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return F.linear(input, self._parameters["weight"], self._parameters["bias"])  # type: ignore[arg-type]

        def __getattr__(self, name: str) -> Any:
            if name in ("weight", "bias"):
                read.add(names[id(self)])
            return super().__getattr__(name)

    watched = [m for m in model.modules() if id(m) in names]
    for module in watched:
        module.__class__ = Watched
    try:
        yield read
    finally:
        for module in watched:
            module.__class__ = nn.Linear


def _dry_run(model: Any, recorder: Recorder) -> None:
    global _recording
    tokens = torch.arange(5) % model.config.get_text_config().vocab_size
    recorder.states = StateBatch.fresh(state_shape_of(model), [5])
    _recording = recorder.masks
    try:
        with torch.inference_mode():
            logits = forward(model, tokens, torch.arange(5), recorder, torch.tensor([4]))
    except UnsupportedModelError:
        raise
    except Exception as error:  # of a model's own code anything may come
        raise UnsupportedModelError(
            f"{type(model).__name__} does not run as a flattened batch: {type(error).__name__}: {_line(error)}"
        ) from error
    finally:
        _recording = None
    if logits.dim() != 2 or logits.shape[0] != 1:
        raise UnsupportedModelError(f"{type(model).__name__} cannot give the logits of chosen tokens only")


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160]


def check_config(config: Any) -> None:
    """Refuse, by name, what a text configuration already says we do not compute."""
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


def attention_layers(config: Any) -> int:
    """Calls of attention in a pass, each with a KV cache of its own: most often one a layer."""
    return int(getattr(config, "num_attention_layers", config.num_hidden_layers))


def position_limit(config: Any) -> int:
    """Positions the model was trained for. Scaled RoPE that changes with the length stays within its first regime."""
    longest = getattr(config, "max_position_embeddings", None)
    if not isinstance(longest, int) or longest < 1:
        raise UnsupportedModelError(f"{config.model_type}: config.json does not say max_position_embeddings")
    limit = longest
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *(v for v in rope.values() if isinstance(v, dict))):
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            original = parameters.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", None)
            limit = min(limit, int(original or limit))
    return limit
