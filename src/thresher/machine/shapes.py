"""Shapes of published decoders, for plans that need no weights."""

from dataclasses import dataclass
from typing import Any

from thresher.errors import UsageError
from thresher.machine.cost import ModelShape


@dataclass(frozen=True)
class Decoder:
    """A dense decoder with a gated MLP, as its configuration has it."""

    layers: int
    q_heads: int
    kv_heads: int
    hidden: int
    intermediate: int
    vocab: int
    head_dim: int = 0  # 0: hidden / q_heads

    def shape(self, weight_bytes: float = 2.0, value_bytes: int = 2) -> ModelShape:
        """What it costs to run. weight_bytes, value_bytes: of one weight, and of one number in the KV cache. The input
        embedding is looked up and not read, so it does not count."""
        dim = self.head_dim or self.hidden // self.q_heads
        attention = self.hidden * dim * 2 * (self.q_heads + self.kv_heads)
        count = self.layers * (attention + 3 * self.hidden * self.intermediate) + self.hidden * self.vocab
        return ModelShape(
            layers=self.layers,
            q_heads=self.q_heads,
            kv_heads=self.kv_heads,
            head_dim=dim,
            weight_bytes=round(count * weight_bytes),
            weight_count=count,
            value_bytes=value_bytes,
        )


DECODERS = {
    "llama-2-7b": Decoder(32, 32, 32, 4096, 11008, 32000),
    "llama-3.1-8b": Decoder(32, 32, 8, 4096, 14336, 128256),
    "llama-3.1-70b": Decoder(80, 64, 8, 8192, 28672, 128256),
    "llama-3.2-1b": Decoder(16, 32, 8, 2048, 8192, 128256),
    "tinyllama-1.1b": Decoder(22, 32, 4, 2048, 5632, 32000),
    "qwen2.5-0.5b": Decoder(24, 14, 2, 896, 4864, 151936),
    "qwen2.5-1.5b": Decoder(28, 12, 2, 1536, 8960, 151936),
    "qwen2.5-7b": Decoder(28, 28, 4, 3584, 18944, 152064),
    "qwen2.5-14b": Decoder(48, 40, 8, 5120, 13824, 152064),
    "qwen2.5-32b": Decoder(64, 40, 8, 5120, 27648, 152064),
    "smollm2-135m": Decoder(30, 9, 3, 576, 1536, 49152),
}


def decoder_of(config: Any) -> Decoder:
    """Of a transformers configuration. Raises UsageError if it is not that of a dense decoder."""
    config = config.get_text_config()
    try:
        if getattr(config, "num_experts", 0) or getattr(config, "num_local_experts", 0):
            raise AttributeError("it has experts")
        q_heads = config.num_attention_heads
        return Decoder(
            layers=config.num_hidden_layers,
            q_heads=q_heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or q_heads,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            vocab=config.vocab_size,
            head_dim=getattr(config, "head_dim", None) or 0,
        )
    except AttributeError as error:
        raise UsageError(
            f"{type(config).__name__} is not a dense decoder that a plan can be made for: {error}"
        ) from None
