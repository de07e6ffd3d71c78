"""Swap a model's layers for native ones, by structure and proof: each swap is compared with the module it replaces.

A stock decoder layer spends more time on small operations than on its weights. Four shapes of module are known here:
linear, RMS norm, gated MLP, and attention with rotary embedding. What does not match, or does not give the stock
module's numbers on random input, stays as it is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from thresher.kernels import _native
from thresher.kernels.attention import AttentionPlan, Heads
from thresher.kernels.elementwise import rms_norm, rope_
from thresher.kernels.layer import LayerWeights, NativeLayer, Norm
from thresher.kernels.linear import ACTIVATIONS, PackedLinear, pack_linear
from thresher.models.interface import NAME, LayerCall, Recorder

# Largest relative difference (Frobenius) from the stock module that still counts as the same computation.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.int8: 6e-2}


class Linear(nn.Module):
    """nn.Linear on packed weights. `out_dtype`: float32 for the logits."""

    def __init__(self, packed: PackedLinear, out_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.packed = packed
        self.out_dtype = out_dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        return self.packed(flat, self.out_dtype).view(*x.shape[:-1], self.packed.out_features)


class RMSNorm(nn.Module):
    def __init__(self, gain: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.gain = gain
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.gain, self.eps)


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)): gate and up are one pass over x."""

    def __init__(self, gate_up: PackedLinear, down: PackedLinear) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.down = down

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.gate_up(x.view(-1, x.shape[-1]))).view(x.shape)


class Attention(nn.Module):
    """Attention of the Llama family: q, k, v in one product, rotary embedding (and norms of the heads) in one pass."""

    def __init__(
        self,
        layer: int,
        call: LayerCall,
        qkv: PackedLinear,
        out: PackedLinear,
        norms: tuple[torch.Tensor, torch.Tensor, float] | None,
    ) -> None:
        super().__init__()
        self.layer_idx = layer
        self.call = call
        self.qkv = qkv
        self.out = out
        self.norms = norms

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        call = self.call
        heads = (call.q_heads, call.kv_heads, call.head_dim)
        x = hidden_states.view(-1, hidden_states.shape[-1])
        qkv = self.qkv(x)
        cos, sin = position_embeddings
        rope_(qkv, cos[0], sin[0], heads, *(self.norms or ()))
        rows = qkv.view(x.shape[0], -1, call.head_dim)
        q, k, v = torch.split(rows, [call.q_heads, call.kv_heads, call.kv_heads], dim=1)
        mixed = kwargs[NAME].attend(self.layer_idx, q, k, v, call.scale, call.window)
        return self.out(mixed.view(x.shape[0], -1)).view(hidden_states.shape), None


class DecoderLayer(nn.Module):
    """A pre-norm layer whose parts are all native, in one call."""

    def __init__(self, native: NativeLayer) -> None:
        super().__init__()
        self.native = native

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], **kwargs: Any
    ) -> torch.Tensor:
        out = hidden_states.clone(memory_format=torch.contiguous_format)
        cos, sin = position_embeddings
        self.native.run_(out[0], cos[0].contiguous(), sin[0].contiguous(), kwargs[NAME])
        return out


@dataclass
class _Fuser:
    model: Any
    weights: torch.dtype
    calls: list[LayerCall]

    def __post_init__(self) -> None:
        self.dtype: torch.dtype = next(self.model.parameters()).dtype
        self.random = torch.Generator().manual_seed(0)

    def same(self, stock: Callable[[], torch.Tensor], fused: Callable[[], torch.Tensor]) -> bool:
        try:
            expected, got = stock().float(), fused().float()
        except (TypeError, KeyError, AttributeError, ValueError, RuntimeError):
            return False
        if expected.shape != got.shape:
            return False
        return bool((got - expected).norm() <= TOLERANCE[self.weights] * expected.norm())

    def sample(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random).to(self.dtype)

    def pack(self, *layers: nn.Linear, activation: Any = "none") -> PackedLinear:
        biases = [m.bias for m in layers]
        bias = None
        if any(b is not None for b in biases):
            parts = [torch.zeros(m.out_features) if m.bias is None else m.bias.float() for m in layers]
            bias = torch.cat(parts)
        return pack_linear([m.weight for m in layers], self.weights, bias, activation)

    def norm(self, module: Any) -> RMSNorm | None:
        weight = getattr(module, "weight", None)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if "RMSNorm" not in type(module).__name__ or weight is None or weight.dim() != 1 or eps is None:
            return None
        x = self.sample(1, 3, weight.shape[0])
        for gain in (weight.float(), 1 + weight.float()):
            fused = RMSNorm(gain, float(eps))
            if self.same(lambda: module(x), lambda: fused(x)):  # noqa: B023
                return fused
        return None

    def mlp(self, module: nn.Module) -> GatedMLP | None:
        gate_up = _linears(module, "gate_up_proj") or _linears(module, "gate_proj", "up_proj")
        down = _linears(module, "down_proj")
        if (
            not gate_up
            or not down
            or len(list(module.parameters())) != sum(len(list(m.parameters())) for m in (*gate_up, *down))
        ):
            return None
        x = self.sample(1, 3, gate_up[0].in_features)
        for activation in ACTIVATIONS[1:]:
            fused = GatedMLP(self.pack(*gate_up, activation=activation), self.pack(*down))
            if self.same(lambda: module(x), lambda: fused(x)):  # noqa: B023
                return fused
        return None

    def attention(self, module: Any, rotary: list[tuple[torch.Tensor, torch.Tensor]]) -> Attention | None:
        layer = module.layer_idx
        qkv = _linears(module, "qkv_proj") or _linears(module, "q_proj", "k_proj", "v_proj")
        out = _linears(module, "o_proj") or _linears(module, "dense")
        if not isinstance(layer, int) or not qkv or not out:
            return None
        norms = None
        if hasattr(module, "q_norm") and hasattr(module, "k_norm"):
            q_norm, k_norm = self.norm(module.q_norm), self.norm(module.k_norm)
            if not q_norm or not k_norm or q_norm.eps != k_norm.eps:
                return None
            if not q_norm.gain.numel() == k_norm.gain.numel() == self.calls[layer].head_dim:
                return None  # a norm over all heads together
            norms = (q_norm.gain, k_norm.gain, q_norm.eps)
        fused = Attention(layer, self.calls[layer], self.pack(*qkv), self.pack(*out), norms)
        x = self.sample(1, rotary[0][0].shape[1], qkv[0].in_features)
        for cos_sin in rotary:
            arguments = {"position_embeddings": cos_sin, "attention_mask": None, NAME: Recorder()}
            if not self.same(lambda: module(x, **arguments)[0], lambda: fused(x, **arguments)[0]):  # noqa: B023
                return None
        return fused

    def layer(self, module: Any, rotary: list[tuple[torch.Tensor, torch.Tensor]]) -> DecoderLayer | None:
        """For a layer whose parts have been swapped already: the stock forward over native parts is the measure."""
        attention, mlp = getattr(module, "self_attn", None), getattr(module, "mlp", None)
        norms: list[Any] = [getattr(module, n, None) for n in ("input_layernorm", "post_attention_layernorm")]
        if type(attention) is not Attention or type(mlp) is not GatedMLP or any(type(n) is not RMSNorm for n in norms):
            return None
        call = attention.call
        heads = Heads(call.q_heads, call.kv_heads, call.head_dim)
        parts = LayerWeights(
            norm=Norm(norms[0].gain, norms[0].eps),
            qkv=attention.qkv,
            head_norms=None if attention.norms is None else _head_norms(*attention.norms),
            out=attention.out,
            mlp_norm=Norm(norms[1].gain, norms[1].eps),
            gate_up=mlp.gate_up,
            down=mlp.down,
        )
        index = attention.layer_idx
        fused = DecoderLayer(NativeLayer(parts, heads, self.dtype, index, call.scale, call.window))
        tokens = rotary[0][0].shape[1]
        # Small, so that what a layer adds is not lost beside what it is added to: norms make that the same size.
        x = 0.03 * self.sample(1, tokens, attention.qkv.in_features)
        rows = torch.zeros(index + 1, 2, heads.kv_heads, tokens, heads.head_dim, dtype=self.dtype)
        plan = AttentionPlan(heads, self.dtype, _native.Workspace())
        plan.add(tokens, 0, [(rows, tokens)])
        for cos_sin in rotary:
            arguments = {"position_embeddings": cos_sin, "attention_mask": None, NAME: plan}
            if not self.same(lambda: module(x, **arguments), lambda: fused(x, **arguments)):  # noqa: B023
                return None
        return fused


def _head_norms(q_gain: torch.Tensor, k_gain: torch.Tensor, eps: float) -> tuple[Norm, Norm]:
    return Norm(q_gain, eps), Norm(k_gain, eps)


def _linears(module: nn.Module, *names: str) -> list[nn.Linear]:
    """The named children if all are linear layers we can pack, else nothing."""
    found = [getattr(module, name, None) for name in names]
    return [m for m in found if type(m) is nn.Linear and m.in_features % 2 == 0] if all(found) else []


def _rotary_samples(model: Any, fuser: _Fuser) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
    """cos, sin near and far from the start, for each kind of layer (a model may have one rotary embedding a kind)."""
    body = model.base_model
    rotary = getattr(body, "rotary_emb", None)
    if rotary is None:
        return {}
    positions = [torch.arange(6)[None], torch.arange(1000, 1006)[None]]
    x = fuser.sample(1, 6, 2)
    kinds = sorted(set(getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"]))
    samples = {}
    for kind in kinds:
        try:
            samples[kind] = [rotary(x, p, kind) for p in positions]
        except (TypeError, AttributeError, KeyError):
            samples[kind] = [rotary(x, p) for p in positions]
    return samples


def fuse(model: Any, weights: torch.dtype, calls: list[LayerCall]) -> list[str]:
    """Replace what can be replaced, in place; weights: bf16, float32 or int8. Returns the kinds of module left."""
    fuser = _Fuser(model, weights, calls)
    layer_types = getattr(model.config.get_text_config(), "layer_types", None)
    left: set[str] = set()
    with torch.inference_mode():
        rotary = _rotary_samples(model, fuser)

        def visit(parent: nn.Module) -> None:
            for name, child in list(parent.named_children()):
                fused: nn.Module | None = None
                if hasattr(child, "layer_idx") and hasattr(child, "o_proj"):
                    kind = layer_types[child.layer_idx] if layer_types else "full_attention"
                    fused = fuser.attention(child, rotary[kind]) if kind in rotary else None
                elif "RMSNorm" in type(child).__name__:
                    fused = fuser.norm(child)
                elif hasattr(child, "down_proj") and isinstance(child.down_proj, nn.Linear):
                    fused = fuser.mlp(child)
                elif type(child) is nn.Linear and child.in_features % 2 == 0:
                    logits = child is model.get_output_embeddings()
                    fused = Linear(fuser.pack(child), torch.float32 if logits else None)
                if fused is not None:
                    setattr(parent, name, fused)
                    continue
                if not isinstance(child, nn.Embedding) and next(child.parameters(recurse=False), None) is not None:
                    left.add(type(child).__name__)
                visit(child)
                attention = getattr(child, "self_attn", None)
                if isinstance(attention, Attention):
                    kind = layer_types[attention.layer_idx] if layer_types else "full_attention"
                    if layer := fuser.layer(child, rotary[kind]):
                        setattr(parent, name, layer)

        visit(model)
    return sorted(left)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of weights that one decode step reads: all but the embedding table (one row of it)."""
    total = 0
    for module in model.modules():
        if isinstance(module, DecoderLayer):
            parts = module.native.weights
            total += sum(p.bytes for p in (parts.qkv, parts.out, parts.gate_up, parts.down))
        for packed in vars(module).values():
            if isinstance(packed, PackedLinear):
                total += packed.bytes
        if not isinstance(module, nn.Embedding):
            total += sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))
    return total
