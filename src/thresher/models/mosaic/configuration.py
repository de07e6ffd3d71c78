"""What a Memory Mosaic is made of. Papers: v1 arXiv 2405.06394, v2 arXiv 2507.03285."""

from typing import Any

from transformers import PretrainedConfig

KEYS = ("leaky", "gated")
BANDWIDTHS = ("fixed", "adaptive")
PERSISTENTS = ("memory", "swiglu")
INITIALIZERS = ("library", "nano", "v2")


class MemoryMosaicConfig(PretrainedConfig):
    """Defaults are the first paper's layer; `v2` gives the second's.

    hidden_size is d, num_attention_heads H, the size of a head h = d / H.

    persistent: "memory" (P learned pairs per head, `persistent_size`, by default 3.5 d, which makes a block as large as
    GPT-2's) or "swiglu" (an MLP of `intermediate_size`). keys: "leaky" (a decay per head) or "gated" (gate and decay
    computed from each token). bandwidth: "fixed" (learned per head) or "adaptive" (grows with the pairs in memory).
    short_window: 0 for one memory of all pairs; else a short-term memory of the newest so many pairs, and a long-term
    memory of all but the newest `long_delay - 1`. long_delay_train: that delay is drawn from this range in each step
    of training. initializer: the published starts, of nanoMosaics ("nano"), of the Library ("library": embeddings as
    large as what the norms give, and logits divided by sqrt(d); it begins by predicting the present token again, and
    needs long to forget that), or of v2. trained_length: context that the model was trained with; there are no
    positions, so any length runs, and what it is worth beyond is a question of the bandwidth.

    Raises ValueError if sizes do not fit each other.
    """

    model_type = "memory_mosaic"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size: int = 50257,
        hidden_size: int = 128,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 8,
        persistent_size: int | None = None,
        persistent: str = "memory",
        intermediate_size: int | None = None,
        keys: str = "leaky",
        bandwidth: str = "fixed",
        short_window: int = 0,
        long_delay: int = 64,
        long_delay_train: tuple[int, int] | None = None,
        dropout: float = 0.05,
        layer_norm_eps: float = 1e-5,
        trained_length: int = 0,
        max_position_embeddings: int = 1 << 20,
        initializer: str = "nano",
        tie_word_embeddings: bool = True,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        if hidden_size % num_attention_heads or hidden_size // num_attention_heads % 2:
            raise ValueError(f"hidden_size {hidden_size} has no even part for each of {num_attention_heads} heads")
        for name, value, known in (
            ("keys", keys, KEYS),
            ("bandwidth", bandwidth, BANDWIDTHS),
            ("persistent", persistent, PERSISTENTS),
            ("initializer", initializer, INITIALIZERS),
        ):
            if value not in known:
                raise ValueError(f"{name} '{value}': choose one of {', '.join(known)}")
        if (
            short_window < 0
            or long_delay < 1
            or (long_delay_train and not 1 <= long_delay_train[0] <= long_delay_train[1])
        ):
            raise ValueError("short_window, long_delay and long_delay_train count pairs")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.persistent = persistent
        self.persistent_size = persistent_size or 7 * hidden_size // 2
        self.intermediate_size = intermediate_size or 3 * hidden_size
        self.keys = keys
        self.bandwidth = bandwidth
        self.short_window = short_window
        self.long_delay = long_delay
        self.long_delay_train = tuple(long_delay_train) if long_delay_train else None
        self.dropout = dropout
        self.layer_norm_eps = layer_norm_eps
        self.trained_length = trained_length
        self.max_position_embeddings = max_position_embeddings
        self.initializer = initializer
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    @classmethod
    def v2(cls, **kwargs: Any) -> "MemoryMosaicConfig":
        """The layer of "Memory Mosaics at scale": gated keys, adaptive bandwidth, three memories."""
        second: dict[str, Any] = {
            "persistent": "swiglu",
            "keys": "gated",
            "bandwidth": "adaptive",
            "short_window": 256,
            "long_delay_train": (64, 256),
            "initializer": "v2",
            "dropout": 0.0,
        }
        return cls(**second | kwargs)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def memories(self) -> tuple[tuple[int, int], ...]:
        """The contextual memories of a layer as (delay, window): a memory holds the pairs that are at least `delay`
        tokens old, and with a window only so many of them."""
        if not self.short_window:
            return ((1, 0),)
        return ((1, self.short_window), (self.long_delay, 0))

    @property
    def num_attention_layers(self) -> int:
        """Calls of attention in a pass, each with a KV cache of its own."""
        return self.num_hidden_layers * len(self.memories)
