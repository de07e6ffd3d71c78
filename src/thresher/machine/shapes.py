"""Shapes of published decoders, for plans that need no weights."""

import difflib
from collections import Counter
from dataclasses import dataclass
from typing import Any

from thresher.errors import UsageError
from thresher.machine.cost import Experts, ModelShape


@dataclass(frozen=True)
class Decoder:
    """A decoder with gated MLPs, as its configuration has it.

    parameters: the number of weights a token uses that papers state, 0 where none does; it has both embeddings.
    experts, experts_used: of a layer; then `intermediate` is that of one expert, and shared_intermediate that of the
    one that all tokens use. windowed: of the layers, those that see a window, as (layers, tokens). recurrent: layers
    that keep a state of state_numbers numbers in place of a KV cache.
    """

    layers: int
    q_heads: int
    kv_heads: int
    hidden: int
    intermediate: int
    vocab: int
    head_dim: int = 0  # 0: hidden / q_heads
    parameters: float = 0
    experts: int = 0
    experts_used: int = 0
    shared_intermediate: int = 0
    windowed: tuple[tuple[int, int], ...] = ()
    recurrent: int = 0
    state_numbers: int = 0

    def shape(self, weight_bytes: float = 2.0, value_bytes: float = 2) -> ModelShape:
        """What it costs to run. weight_bytes, value_bytes: of one weight, and of one number in the KV cache. The input
        embedding is looked up and not read, so it does not count; a recurrent layer's projections count as those of
        attention."""
        dim = self.head_dim or self.hidden // self.q_heads
        attention = self.hidden * dim * 2 * (self.q_heads + self.kv_heads)
        gated = 3 * self.hidden * self.intermediate
        count = self.layers * attention + self.hidden * self.vocab
        experts = None
        if self.experts:
            one = self.layers * gated
            count += self.layers * self.hidden * (3 * self.shared_intermediate + self.experts)
            experts = Experts(self.experts, self.experts_used, one, round(one * weight_bytes))
        else:
            count += self.layers * gated
        return ModelShape(
            layers=self.layers - sum(n for n, _ in self.windowed) - self.recurrent,
            q_heads=self.q_heads,
            kv_heads=self.kv_heads,
            head_dim=dim,
            weight_bytes=round(count * weight_bytes),
            weight_count=count,
            value_bytes=value_bytes,
            windowed=self.windowed,
            state_bytes=self.recurrent * self.state_numbers * 4,  # kept in float32
            experts=experts,
        )


def _qwen3(layers: int, q_heads: int, hidden: int, intermediate: int, parameters: float) -> Decoder:
    return Decoder(layers, q_heads, 8, hidden, intermediate, 151936, 128, parameters)


# Head counts by their configurations on the hub; parameters of Qwen3 by the code of Kinetics (of 30B-A3B: its card).
DECODERS = {
    "llama-2-7b": Decoder(32, 32, 32, 4096, 11008, 32000, parameters=6.74e9),
    "llama-3.1-8b": Decoder(32, 32, 8, 4096, 14336, 128256, parameters=8.03e9),
    "llama-3.1-70b": Decoder(80, 64, 8, 8192, 28672, 128256, parameters=70.6e9),
    "llama-3.2-1b": Decoder(16, 32, 8, 2048, 8192, 128256, parameters=1.24e9),
    "llama-3.2-3b": Decoder(28, 24, 8, 3072, 8192, 128256, parameters=3.21e9),
    "tinyllama-1.1b": Decoder(22, 32, 4, 2048, 5632, 32000, parameters=1.1e9),
    "qwen2.5-0.5b": Decoder(24, 14, 2, 896, 4864, 151936, parameters=0.49e9),
    "qwen2.5-1.5b": Decoder(28, 12, 2, 1536, 8960, 151936, parameters=1.54e9),
    "qwen2.5-7b": Decoder(28, 28, 4, 3584, 18944, 152064, parameters=7.61e9),
    "qwen2.5-14b": Decoder(48, 40, 8, 5120, 13824, 152064, parameters=14.7e9),
    "qwen2.5-32b": Decoder(64, 40, 8, 5120, 27648, 152064, parameters=32.5e9),
    "qwen3-0.6b": _qwen3(28, 16, 1024, 3072, 0.752e9),
    "qwen3-1.7b": _qwen3(28, 16, 2048, 6144, 2.03e9),
    "qwen3-4b": _qwen3(36, 32, 2560, 9728, 4.02e9),
    "qwen3-8b": _qwen3(36, 32, 4096, 12288, 8.19e9),
    "qwen3-14b": _qwen3(40, 40, 5120, 17408, 14.77e9),
    "qwen3-32b": _qwen3(64, 64, 5120, 25600, 32.76e9),
    "qwen3-30b-a3b": Decoder(48, 32, 4, 2048, 768, 151936, 128, 3.3e9, experts=128, experts_used=8),
    "deepseek-r1-distill-qwen-1.5b": Decoder(28, 12, 2, 1536, 8960, 151936, parameters=1.78e9),
    "deepseek-r1-distill-qwen-7b": Decoder(28, 28, 4, 3584, 18944, 152064, parameters=7.62e9),
    "deepseek-r1-distill-qwen-14b": Decoder(48, 40, 8, 5120, 13824, 152064, parameters=14.8e9),
    "deepseek-r1-distill-qwen-32b": Decoder(64, 40, 8, 5120, 27648, 152064, parameters=32.8e9),
    "deepseek-r1-distill-llama-8b": Decoder(32, 32, 8, 4096, 14336, 128256, parameters=8.03e9),
    "smollm2-135m": Decoder(30, 9, 3, 576, 1536, 49152, parameters=0.135e9),
}

_FULL = ("full_attention", "attention")
_SLIDING = ("sliding_attention", "chunked_attention")
_LINEAR = "linear_attention"


def published(name: str) -> Decoder | None:
    """By its name as papers have it, in any case; tuning to instructions does not change a shape."""
    return DECODERS.get(name.lower().removesuffix("-instruct"))


def nearest(name: str) -> str:
    """What a user may have meant: for the end of an error message."""
    near = difflib.get_close_matches(name.lower(), list(DECODERS), n=1)
    return f"did you mean {near[0]}?" if near else f"there is {', '.join(DECODERS)}"


def decoder_of(config: Any) -> Decoder:
    """Of a transformers configuration. Raises UsageError if it is not that of a decoder whose cost is known here."""
    config = config.get_text_config()
    try:
        if getattr(config, "kv_lora_rank", 0):
            raise AttributeError("it keeps latent attention, not keys and values")
        if getattr(config, "num_attention_layers", None):  # models/mosaic
            raise AttributeError("it is made of associative memories")
        q_heads = config.num_attention_heads
        experts = getattr(config, "num_experts", 0) or getattr(config, "num_local_experts", 0) or 0
        windowed, recurrent, state = _bounded_layers(config)
        return Decoder(
            layers=config.num_hidden_layers,
            q_heads=q_heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or q_heads,
            hidden=config.hidden_size,
            intermediate=(experts and getattr(config, "moe_intermediate_size", 0)) or config.intermediate_size,
            vocab=config.vocab_size,
            head_dim=getattr(config, "head_dim", None) or 0,
            experts=experts,
            experts_used=config.num_experts_per_tok if experts else 0,
            shared_intermediate=getattr(config, "shared_expert_intermediate_size", 0) or 0,
            windowed=windowed,
            recurrent=recurrent,
            state_numbers=state,
        )
    except AttributeError as error:
        raise UsageError(f"{type(config).__name__} is not a decoder that a plan can be made for: {error}") from None


def _bounded_layers(config: Any) -> tuple[tuple[tuple[int, int], ...], int, int]:
    """Layers that do not see the whole context: windows, how many are recurrent, numbers of a recurrent layer's state.
    Raises AttributeError on a kind of layer that is not known."""
    kinds = Counter(getattr(config, "layer_types", None) or ())
    if not kinds:
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        return (((config.num_hidden_layers, window),) if window else ()), 0, 0
    if unknown := set(kinds) - {*_FULL, *_SLIDING, _LINEAR}:
        raise AttributeError(f"layers of the kind '{min(unknown)}' are not known")
    sliding = sum(kinds[kind] for kind in _SLIDING)
    size = int(getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None) or 0)
    if sliding and not size:
        raise AttributeError("it has sliding layers and no sliding_window")
    state = 0
    if kinds[_LINEAR]:
        heads, dims = config.linear_num_value_heads, (config.linear_key_head_dim, config.linear_value_head_dim)
        state = heads * dims[0] * dims[1]
    return (((sliding, size),) if sliding else ()), kinds[_LINEAR], state
