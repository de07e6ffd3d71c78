"""Swap a model's layers for native ones, by structure and proof: each swap is compared with the module it replaces.

A stock decoder layer spends more time on small operations than on its weights. Four shapes of module are known here:
linear, RMS norm, gated MLP, and attention with rotary embedding. A candidate is compared with the stock module's own
code, both in float32 whatever the weights are packed as, element by element; what is not equal to within rounding
stays as it is. Norms are compared on their own weights. The code of an MLP, of attention and of a layer is run on small
stand-ins for its weights, chosen so that nothing averages out: what it computes does not depend on their size.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from thresher.kernels.attention import Heads
from thresher.kernels.elementwise import rms_norm, rope_
from thresher.kernels.layer import LayerWeights, NativeLayer, Norm
from thresher.kernels.linear import ACTIVATIONS, Activation, PackedLinear, pack_linear
from thresher.models.interface import NAME, LayerCall
from thresher.models.mosaic.memory import PersistentMemory
from thresher.models.mosaic.native import NativePersistentMemory, native_persistent_memory

# Largest relative difference of an element, in float32, that still counts as the same computation; and the size below
# which a number is compared as if it had this one.
TOLERANCE = 1e-5
FLOOR = 1e-30


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
        out: Any,
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
        rope_(qkv, cos[0].to(x.dtype), sin[0].to(x.dtype), heads, *(self.norms or ()))
        rows = qkv.view(x.shape[0], -1, call.head_dim)
        q, k, v = torch.split(rows, [call.q_heads, call.kv_heads, call.kv_heads], dim=1)
        mixed = kwargs[NAME].attend(self.layer_idx, q, k, v, call.scale, call.window)
        return self.out(mixed.view(x.shape[0], -1)).view(*hidden_states.shape[:-1], -1), None


class DecoderLayer(nn.Module):
    """A pre-norm layer whose parts are all native, in one call."""

    def __init__(self, native: NativeLayer) -> None:
        super().__init__()
        self.native = native

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], **kwargs: Any
    ) -> torch.Tensor:
        out = hidden_states.clone(memory_format=torch.contiguous_format)
        cos, sin = (t[0].to(out.dtype).contiguous() for t in position_embeddings)
        self.native.run_(out[0], cos, sin, kwargs[NAME])
        return out


@dataclass(frozen=True)
class _Probe:
    """Stands in for a plan in a proof: keeps what attention is handed and answers with fixed numbers."""

    asked: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, float, int]]
    answer: torch.Tensor  # float32 `[tokens, q_heads, head_dim]`

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
        if blank:
            raise ValueError("native layers have no blank rows")
        self.asked.append((q.clone(), k.clone(), v.clone(), scale, layer_window))
        return self.answer


class _Stub(nn.Module):
    """A part of a layer in a proof: a known function of each element, which notes how it was called."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], pair: bool = False) -> None:
        super().__init__()
        self.function = function
        self.pair = pair  # attention returns (output, weights)
        self.keywords: dict[str, Any] = {}

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args:
            raise TypeError("positional arguments are not handed on")
        self.keywords = kwargs
        out = self.function(hidden_states)
        return (out, None) if self.pair else out


def _near(stock: torch.Tensor, fused: torch.Tensor, scale: torch.Tensor | None = None) -> float:
    """The largest error of an element beside its own size (or `scale`, where sums cancel); infinite if not a number."""
    if stock.shape != fused.shape or stock.dtype != torch.float32 or fused.dtype != torch.float32:
        return math.inf
    size = stock.abs() if scale is None else torch.maximum(stock.abs(), scale)
    error = ((fused - stock).abs() / size.clamp_min(FLOOR)).max().item()
    return error if math.isfinite(error) else math.inf


def _attempt(error: Callable[[], float]) -> float:
    """What a proof measured; a module that is called another way than ours proves nothing."""
    try:
        return error()
    except Exception:
        return math.inf


def _clone(module: Any, **children: nn.Module) -> Any:
    """The module itself, its code and settings, on other children: none of its weights are copied."""
    clone = copy.copy(module)
    clone._modules = {**module._modules, **children}
    return clone


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    out, width = weight.shape
    with torch.device("meta"):
        made = nn.Linear(width, out, bias=bias is not None)
    made.weight = nn.Parameter(weight.float(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.float(), requires_grad=False)
    return made


def _pack(layers: Sequence[nn.Linear], weights: torch.dtype, activation: Any = "none") -> PackedLinear:
    bias = None
    if any(m.bias is not None for m in layers):
        bias = torch.cat([torch.zeros(m.out_features) if m.bias is None else m.bias.float() for m in layers])
    return pack_linear([m.weight for m in layers], weights, bias, activation)


# What MLPs are tried on: an activation is a function, and two of them may differ in its tails only.
_GRID = torch.cat([torch.linspace(-30, 30, 957), torch.tensor([-1e4, -1e3, -100, -60, 60, 100, 1e3, 1e4, 0])])


@dataclass
class _Fuser:
    model: Any
    weights: torch.dtype
    calls: list[LayerCall]

    def __post_init__(self) -> None:
        self.dtype: torch.dtype = next(self.model.parameters()).dtype
        self.random = torch.Generator().manual_seed(0)
        self.activations: dict[Any, Activation | None] = {}  # of MLPs of the same code and settings

    def sample(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random)

    def norm(self, module: Any) -> RMSNorm | None:
        """The nearer of gain w and 1 + w: with large w both are near on average, but one drops channels of w = 0."""
        weight = getattr(module, "weight", None)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if "RMSNorm" not in type(module).__name__ or weight is None or weight.dim() != 1 or not isinstance(eps, float):
            return None
        width = weight.shape[0]
        x = self.sample(1, 6, width) * torch.tensor([1e-4, 1e-2, 1.0, 1.0, 30.0, 1000.0])[:, None]
        x[0, 3] = 0
        x[0, 3, width // 2] = 50.0
        stock = copy.deepcopy(module).float()
        candidates = [RMSNorm(gain, eps) for gain in (weight.float().clone(), 1 + weight.float())]
        errors = [_attempt(lambda c=c: _near(stock(x), c(x))) for c in candidates]  # type: ignore[misc]
        best = min(range(2), key=errors.__getitem__)
        return candidates[best] if errors[best] <= TOLERANCE else None

    def mlp(self, module: nn.Module) -> GatedMLP | None:
        """The module's own code is tried on diagonal weights: each output is then one value of its activation."""
        names = ("gate_up_proj",) if hasattr(module, "gate_up_proj") else ("gate_proj", "up_proj")
        gate_up, down = _linears(module, *names), _linears(module, "down_proj")
        if not gate_up or not down or {*module._modules.values()} - {*gate_up, *down} - _activations(module):
            return None
        key = (_settings(module), *((name, _settings(child)) for name, child in module.named_children()))
        if key not in self.activations:
            self.activations[key] = self.activation(module, names, gate_up, down[0])
        activation = self.activations[key]
        if activation is None:
            return None
        return GatedMLP(_pack(gate_up, self.weights, activation), _pack(down, self.weights))

    def activation(
        self, module: nn.Module, names: Sequence[str], gate_up: list[nn.Linear], down: nn.Linear
    ) -> Activation | None:
        """The activation of an MLP if it is one of ours, and all else what GatedMLP computes."""
        n = len(_GRID)
        gate, up = torch.eye(n), 0.75 * torch.eye(n)
        biases = [0.1 * self.sample(n), 0.1 * self.sample(n)]
        has_bias = gate_up[0].bias is not None
        merged = len(gate_up) == 1
        rows = [torch.cat([gate, up])] if merged else [gate, up]
        bias = [torch.cat(biases)] if merged else biases
        small = {k: _linear(w, b if has_bias else None) for k, w, b in zip(names, rows, bias, strict=True)}
        small_down = _linear(torch.diag(0.5 + self.sample(n).abs()), None if down.bias is None else biases[0])
        # The stock side in float64: torch's float32 GELU loses digits where 1 + tanh cancels.
        double = {k: copy.deepcopy(m).double() for k, m in (*small.items(), ("down_proj", small_down))}
        clone = _clone(module, **double)
        x = torch.stack([_GRID, _GRID.flip(0), 0.01 * self.sample(n)])[None]
        linears, errors = list(small.values()), []
        for activation in ACTIVATIONS[1:]:
            fused = GatedMLP(_pack(linears, torch.float32, activation), _pack([small_down], torch.float32))
            errors.append(_attempt(lambda f=fused: _near(clone(x.double()).float(), f(x), torch.tensor(0.1))))  # type: ignore[misc]
        best = min(range(len(errors)), key=errors.__getitem__)
        if errors[best] > TOLERANCE or any((m.bias is None) == has_bias for m in gate_up):
            return None
        return ACTIVATIONS[1 + best]

    def attention(self, module: Any, rotary: list[tuple[torch.Tensor, torch.Tensor]]) -> Attention | None:
        """q, k, v, scale and window that both hand to attention are compared, and what becomes of its answer."""
        layer = module.layer_idx
        names = ("qkv_proj",) if hasattr(module, "qkv_proj") else ("q_proj", "k_proj", "v_proj")
        last = "o_proj" if hasattr(module, "o_proj") else "dense"
        qkv, out = _linears(module, *names), _linears(module, last)
        if not isinstance(layer, int) or not qkv or not out:
            return None
        call = self.calls[layer]
        rows = (call.q_heads + 2 * call.kv_heads) * call.head_dim
        if sum(m.out_features for m in qkv) != rows or out[0].in_features != call.q_heads * call.head_dim:
            return None
        norms = None
        if hasattr(module, "q_norm") and hasattr(module, "k_norm"):
            q_norm, k_norm = self.norm(module.q_norm), self.norm(module.k_norm)
            if not q_norm or not k_norm or q_norm.eps != k_norm.eps:
                return None
            if not q_norm.gain.numel() == k_norm.gain.numel() == call.head_dim:
                return None  # a norm over all heads together
            norms = (q_norm.gain, k_norm.gain, q_norm.eps)
        width = min(64, qkv[0].in_features)  # of the inputs: enough to tell the code, and cheap
        small = {k: _linear(m.weight[:, :width], m.bias) for k, m in zip(names, qkv, strict=True)}
        plain = _linear(torch.eye(out[0].in_features), None)
        parts = {n: copy.deepcopy(m).float() for n, m in module.named_children() if m not in {*qkv, *out}}
        clone = _clone(module, **parts, **small, **{last: plain})
        fused = Attention(layer, call, _pack(list(small.values()), torch.float32), _Plain(), norms)
        tokens = rotary[0][0].shape[1]
        x = 3 * self.sample(1, tokens, width)
        x[0, -1] = 0
        x[0, -1, width // 2] = 20.0
        answer = self.sample(tokens, call.q_heads, call.head_dim)
        for cos_sin in rotary:

            def error(cos_sin: tuple[torch.Tensor, torch.Tensor] = cos_sin) -> float:
                probe = _Probe([], answer)
                arguments = {"position_embeddings": cos_sin, "attention_mask": None, NAME: probe}
                outputs = [m(x, **arguments)[0] for m in (clone, fused)]
                stock, ours = probe.asked
                if stock[3:] != ours[3:]:
                    return math.inf
                pairs = [*zip(stock[:3], ours[:3], strict=True), (outputs[0], outputs[1])]
                # A rotation takes a difference, which may cancel: its size is that of the row.
                return max(_near(a, b, a.abs().amax(-1, keepdim=True)) for a, b in pairs)

            if _attempt(error) > TOLERANCE:
                return None
        return Attention(layer, call, _pack(qkv, self.weights), _pack(out, self.weights), norms)

    def layer(self, module: Any) -> DecoderLayer | None:
        """For a layer whose parts have been swapped already: its own code is tried on stand-ins of the parts."""
        attention, mlp = getattr(module, "self_attn", None), getattr(module, "mlp", None)
        names = ("input_layernorm", "post_attention_layernorm")
        norms: list[Any] = [getattr(module, n, None) for n in names]
        if type(attention) is not Attention or type(mlp) is not GatedMLP or any(type(n) is not RMSNorm for n in norms):
            return None

        stubs = [_Stub(f) for f in (lambda x: 1.5 * x, lambda x: 0.7 * x + 0.1, torch.sin)]
        attend = _Stub(torch.cos, pair=True)
        parts = dict(zip((*names, "mlp"), stubs, strict=True))
        clone = _clone(module, self_attn=attend, **parts)
        x = self.sample(1, 5, attention.qkv.in_features) * torch.tensor([0.01, 1.0, 10.0, 100.0, 3.0])[:, None]
        arguments = {"position_embeddings": (x, x), "attention_mask": None, NAME: object()}

        def error() -> float:
            middle = x + (1.5 * x).cos()
            return _near(clone(x, **arguments), middle + (0.7 * middle + 0.1).sin(), torch.tensor(1.0))

        if _attempt(error) > TOLERANCE or any(attend.keywords.get(k) is not v for k, v in arguments.items()):
            return None
        call = attention.call
        heads = Heads(call.q_heads, call.kv_heads, call.head_dim)
        weights = LayerWeights(
            norm=Norm(norms[0].gain, norms[0].eps),
            qkv=attention.qkv,
            head_norms=None if attention.norms is None else _head_norms(*attention.norms),
            out=attention.out,
            mlp_norm=Norm(norms[1].gain, norms[1].eps),
            gate_up=mlp.gate_up,
            down=mlp.down,
        )
        return DecoderLayer(NativeLayer(weights, heads, self.dtype, attention.layer_idx, call.scale, call.window))


class _Plain:
    """Stands in for the last product of attention in a proof."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x


def _head_norms(q_gain: torch.Tensor, k_gain: torch.Tensor, eps: float) -> tuple[Norm, Norm]:
    return Norm(q_gain, eps), Norm(k_gain, eps)


def _linears(module: nn.Module, *names: str) -> list[nn.Linear]:
    """The named children if all are linear layers we can pack, else nothing."""
    found: list[Any] = [getattr(module, name, None) for name in names]
    return found if all(map(_packable, found)) else []


def _packable(module: Any) -> bool:
    return type(module) is nn.Linear and module.in_features % 2 == 0 and not _hooked(module)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _activations(module: nn.Module) -> set[nn.Module]:
    """Children without weights, such as an activation: the proof runs them as they are."""
    return {m for m in module.children() if next(m.parameters(), None) is None}


_OF_ANY_MODULE = frozenset(vars(nn.Module()))


def _settings(module: nn.Module) -> Any:
    """All that a module's code can depend on beside its weights: with equal settings, modules are the same function."""
    own = {name: value for name, value in vars(module).items() if name not in _OF_ANY_MODULE}
    plain = (bool, int, float, str, type(None))
    values = tuple((name, v if isinstance(v, plain) else id(v)) for name, v in sorted(own.items()))
    return type(module), values, tuple(name for name, p in module._parameters.items() if p is not None)


def text_model(model: Any) -> Any:
    """The module that holds the decoder layers: the base model, or its language model if it also sees or hears."""
    base = model.base_model
    return base if hasattr(base, "layers") else getattr(base, "language_model", base)


def layer_types(model: Any) -> list[str]:
    """The kind of each layer, as transformers names them."""
    config = model.config.get_text_config()
    return list(getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)


def rotary_arguments(model: Any) -> dict[str, tuple[str, ...]]:
    """For each kind of layer that is rotated, what the rotary embedding takes beside x and positions: the kind, or
    nothing."""
    rotary: Any = getattr(text_model(model), "rotary_emb", None)
    found: dict[str, tuple[str, ...]] = {}
    for kind in sorted(set(layer_types(model))) if rotary is not None else ():
        for arguments in ((kind,), ()):
            try:
                tables = rotary(torch.zeros(1, 6, 2), torch.arange(6)[None], *arguments)
            except Exception:  # another signature, or a kind that is not rotated: its layers stay stock
                continue
            if isinstance(tables, tuple) and len(tables) == 2 and all(isinstance(t, torch.Tensor) for t in tables):
                found[kind] = arguments
                break
    return found


def _rotary_samples(model: Any) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
    """float32 cos, sin near and far from the start, for each kind of layer."""
    x, positions = torch.zeros(1, 6, 2), [torch.arange(6)[None], torch.arange(1000, 1006)[None]]
    rotary: Any = getattr(text_model(model), "rotary_emb", None)  # not None where it has arguments
    return {kind: [rotary(x, p, *arguments) for p in positions] for kind, arguments in rotary_arguments(model).items()}


def fuse(model: Any, weights: torch.dtype, calls: list[LayerCall], keep: frozenset[str] = frozenset()) -> list[str]:
    """Replace what can be replaced, in place; weights: bf16, float32 or int8. Returns the kinds of module left.

    keep: names of linear layers that stay, as code beside them reads their weights (interface.inspect_model).
    """
    fuser = _Fuser(model, weights, calls)
    kinds = layer_types(model)
    left: set[str] = set()
    with torch.inference_mode():
        rotary = _rotary_samples(model)
        kept = {id(model.get_submodule(name)) for name in keep}
        head = id(model.get_output_embeddings())

        def kept_inside(module: nn.Module) -> bool:
            return any(id(m) in kept for m in module.modules())

        def swapped(child: Any) -> nn.Module | None:
            if _hooked(child) or kept_inside(child):
                return None
            if isinstance(getattr(child, "layer_idx", None), int) and hasattr(child, "o_proj"):
                kind = kinds[child.layer_idx]
                return fuser.attention(child, rotary[kind]) if kind in rotary else None
            if "RMSNorm" in type(child).__name__:
                return fuser.norm(child)
            if type(child) is PersistentMemory and (memory := native_persistent_memory(child, weights, TOLERANCE)):
                visit(memory)  # its key extractor
                return memory
            if isinstance(getattr(child, "down_proj", None), nn.Linear):
                return fuser.mlp(child)
            if _packable(child):
                return Linear(_pack([child], weights), torch.float32 if id(child) == head else None)
            return None

        def visit(parent: nn.Module) -> None:
            for name, child in list(parent.named_children()):
                if (fused := swapped(child)) is not None:
                    setattr(parent, name, fused)
                    continue
                if not isinstance(child, nn.Embedding) and next(child.parameters(recurse=False), None) is not None:
                    left.add(type(child).__name__)
                visit(child)
                if not _hooked(child) and (layer := fuser.layer(child)):
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
        if isinstance(module, NativePersistentMemory):
            total += sum(packed.bytes for packed in module.packed)
        if not isinstance(module, nn.Embedding):
            total += sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))
    return total
