from typing import Any

import torch

panel: int
split: int
most_threads: int

class KernelSet:
    def __init__(self, name: str) -> None: ...
    @property
    def name(self) -> str: ...

class Workspace:
    def __init__(self) -> None: ...

class Plan:
    def __init__(
        self,
        kernels: KernelSet,
        workspace: Workspace,
        type: int,
        q_heads: int,
        kv_heads: int,
        head_dim: int,
        threads: int,
        /,
    ) -> None: ...
    def add(
        self,
        queries: int,
        past: int,
        window: int,
        sinks: int,
        layers: int,
        runs: list[tuple[int, int, int, int]],
        index: Index | None,
        end: int,
        budget: int,
        votes: int,
        votes_stride: int,
    ) -> None: ...
    def capture(self, queries: int, outputs: int, dense: int, /) -> None: ...
    def rows_read(self, layer_window: int, /) -> int: ...
    def attend(
        self,
        layer: int,
        q: int,
        q_token: int,
        q_head: int,
        k: int,
        k_token: int,
        k_head: int,
        v: int,
        v_token: int,
        v_head: int,
        out: int,
        scale: float,
        window: int,
        blank: int,
        /,
    ) -> None: ...

class Index:
    def __init__(
        self, type: int, q_heads: int, kv_heads: int, head_dim: int, slots: list[int], begin: int, /
    ) -> None: ...
    def set_method(self, method: dict[str, Any], /) -> None: ...
    def set_blocks(self, blocks: list[tuple[int, int, dict[str, torch.Tensor]]], /) -> None: ...
    def counters(self) -> tuple[int, int, int, int, int, int]: ...
    def clear_counters(self) -> None: ...

_Packed = tuple[int, int, int, int, int]

class Layer:
    def __init__(
        self,
        kernels: KernelSet,
        type: int,
        weight: int,
        activation: int,
        qkv: _Packed,
        out: _Packed,
        gate_up: _Packed,
        down: _Packed,
        norm: tuple[int, float],
        mlp_norm: tuple[int, float],
        head_norms: tuple[int, int, float],
        heads: tuple[int, int, int],
        index: int,
        scale: float,
        window: int,
        /,
    ) -> None: ...
    def run(
        self, plan: Plan, hidden: int, tokens: int, cos: int, sin: int, rotary_dim: int, threads: int, /
    ) -> None: ...

def isas() -> list[str]: ...
def linear(
    kernels: KernelSet,
    weight: int,
    activation: int,
    x: int,
    x_stride: int,
    rows: int,
    w: int,
    scale: int,
    bias: int,
    y: int,
    y_stride: int,
    out: int,
    in_: int,
    y_f32: bool,
    threads: int,
    /,
) -> None: ...
def rms_norm(
    kernels: KernelSet,
    type: int,
    x: int,
    y: int,
    weight: int,
    rows: int,
    width: int,
    eps: float,
    threads: int,
    /,
) -> None: ...
def rope(
    kernels: KernelSet,
    type: int,
    qkv: int,
    token_stride: int,
    tokens: int,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    cos: int,
    sin: int,
    q_norm: int,
    k_norm: int,
    eps: float,
    threads: int,
    /,
) -> None: ...
def sample_scratch_bytes(kernels: KernelSet, vocab: int, /) -> int: ...
def sample(
    kernels: KernelSet,
    logits: int,
    stride: int,
    rows: int,
    vocab: int,
    temperature: int,
    top_k: int,
    top_p: int,
    min_p: int,
    uniform: int,
    first_edit: int,
    edit_ids: int,
    edit_factors: int,
    edit_offsets: int,
    wants_logsumexp: int,
    logsumexp: int,
    wants_weights: int,
    weights: int,
    tokens: int,
    scratch: int,
    threads: int,
    /,
) -> None: ...
def persistent_memory(
    kernels: KernelSet,
    type: int,
    weight: int,
    x: int,
    y: int,
    rows: int,
    head_dim: int,
    pairs: int,
    keys: list[tuple[int, int]],
    values: list[tuple[int, int]],
    scores: int,
    weights: int,
    threads: int,
    /,
) -> None: ...
def memory_keys(
    kernels: KernelSet,
    type: int,
    starts: list[int],
    heads: int,
    head_dim: int,
    x: int,
    decay: int,
    decay_stride: int,
    before: int,
    scale: int,
    keys: int,
    averages: int,
    threads: int,
    /,
) -> None: ...
def memory_values(
    kernels: KernelSet,
    type: int,
    starts: list[int],
    heads: int,
    head_dim: int,
    x: int,
    before: int,
    share: int,
    scale: int,
    values: int,
    mixed: int,
    threads: int,
    /,
) -> None: ...
def read_memory(kernels: KernelSet, data: int, count: int, threads: int, /) -> float: ...
def project(
    kernels: KernelSet,
    type: int,
    keys: int,
    planes: int,
    rows: int,
    plane_stride: int,
    head_dim: int,
    mean: int,
    directions: int,
    count: int,
    bits: int,
    norms: int,
    absolute: int,
    threads: int,
    /,
) -> None: ...
def codes(
    kernels: KernelSet, bits: int, planes: int, rows: int, key_bits: int, tables: int, codes: int, threads: int, /
) -> None: ...
def tables(
    kernels: KernelSet,
    codes: int,
    planes: int,
    rows: int,
    key_bits: int,
    tables: int,
    heads: int,
    ids: int,
    threads: int,
    /,
) -> None: ...
def watch(begin: int, bytes: int) -> int: ...
def unwatch(mapping: int) -> None: ...
def was_cut(mapping: int) -> bool: ...
