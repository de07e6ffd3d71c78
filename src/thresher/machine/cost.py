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
class Experts:
    """Experts, of which every token uses a few. weight_count, weight_bytes: of one expert in all layers."""

    count: int
    used: int
    weight_count: int
    weight_bytes: int

    def touched(self, tokens: float) -> float:
        """Experts of a layer that a pass of so many tokens is expected to use, if tokens choose independently."""
        return self.count * (1 - float((1 - self.used / self.count) ** tokens))


@dataclass(frozen=True)
class ModelShape:
    """What the cost of a decoder depends on. layers: those that attend to the whole context. weight_count,
    weight_bytes: what every token uses. value_bytes: of one number in the KV cache. windowed: further layers as
    (layers, tokens that they see). state_bytes: of recurrent layers, of one sequence."""

    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    weight_bytes: int
    weight_count: int
    value_bytes: float
    windowed: tuple[tuple[int, int], ...] = ()
    state_bytes: float = 0
    experts: Experts | None = None

    @property
    def kv_bytes_per_token(self) -> int:
        """Of the layers that attend to the whole context."""
        return round(self.layers * self.kv_bytes_per_layer)

    @property
    def kv_bytes_per_layer(self) -> float:
        """Of one token."""
        return 2 * self.kv_heads * self.head_dim * self.value_bytes

    @property
    def active_count(self) -> int:
        """Weights that a token is multiplied by."""
        return self.weight_count + (self.experts.used * self.experts.weight_count if self.experts else 0)

    @property
    def stored_bytes(self) -> int:
        """Of all weights, experts that are not used included."""
        return self.weight_bytes + (self.experts.count * self.experts.weight_bytes if self.experts else 0)

    def kv_bytes(self, tokens: float) -> float:
        """What a sequence of so many tokens keeps."""
        windows = sum(layers * min(window, tokens) for layers, window in self.windowed)
        return tokens * self.kv_bytes_per_token + windows * self.kv_bytes_per_layer + self.state_bytes


def weights_cost(shape: ModelShape, tokens: float) -> Cost:
    """All linear layers for `tokens` tokens in one pass: the weights are read once, and of the experts those that some
    token uses."""
    weight_bytes = float(shape.weight_bytes)
    if shape.experts:
        weight_bytes += shape.experts.touched(tokens) * shape.experts.weight_bytes
    return Cost(2.0 * shape.active_count * tokens, weight_bytes)


def attention_cost(shape: ModelShape, rows: float, queries: int = 1) -> Cost:
    """Attention of `queries` tokens to `rows` cached rows each, in all layers that see the whole context; the rows are
    read once for all of them."""
    flops = 4.0 * shape.layers * shape.q_heads * shape.head_dim * rows * queries
    return Cost(flops, float(rows * shape.kv_bytes_per_token))


def bounded_cost(shape: ModelShape, context: float, queries: int = 1) -> Cost:
    """`queries` tokens in the layers whose memory does not grow with the context: sliding windows, and recurrent
    states, which are read and written. Memory is read once for all of them."""
    flops, size = 0.0, 2.0 * shape.state_bytes
    for layers, window in shape.windowed:
        rows = layers * min(window, context)
        flops += 4.0 * shape.q_heads * shape.head_dim * rows
        size += rows * shape.kv_bytes_per_layer
    return Cost((flops + shape.state_bytes) * queries, size)
