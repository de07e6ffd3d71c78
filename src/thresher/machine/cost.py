"""Cost as a value: operations and bytes, from the shape of a model."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Floating-point operations and bytes read from memory."""

    flops: float
    bytes: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, n: float) -> "Cost":
        return Cost(self.flops * n, self.bytes * n)


@dataclass(frozen=True)
class ModelShape:
    """What the cost of a decoder depends on. value_bytes: of one number in the KV cache."""

    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    weight_bytes: int
    weight_count: int
    value_bytes: int

    @property
    def kv_bytes_per_token(self) -> int:
        return self.layers * 2 * self.kv_heads * self.head_dim * self.value_bytes


def weights_cost(shape: ModelShape, tokens: int) -> Cost:
    """All linear layers for `tokens` tokens in one pass: the weights are read once."""
    return Cost(2.0 * shape.weight_count * tokens, shape.weight_bytes)


def attention_cost(shape: ModelShape, rows: float, queries: int = 1) -> Cost:
    """All layers' attention of `queries` tokens to `rows` cached rows each; the rows are read once for all of them."""
    flops = 4.0 * shape.layers * shape.q_heads * shape.head_dim * rows * queries
    return Cost(flops, float(rows * shape.kv_bytes_per_token))
