"""Other engines on the same weights, each with its best switches, behind one small interface.

transformers gets a preallocated cache (its default copies the whole cache for every token) and grouped-query attention
without repeating keys. llama.cpp gets F16 or Q8_0 weights written from the very GGUF file that our model was made from.
"""

import ctypes
import gc
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from thresher.cache.sequence import KVSequence
from thresher.errors import UsageError
from thresher.models.load import WEIGHTS
from thresher.models.resolve import ModelSource, cache_folder

PEERS = ("transformers", "llama.cpp")


class Engine(Protocol):
    """An engine that holds one sequence."""

    name: str
    weight_bytes: int  # read by one decode step

    def prefill(self, token_ids: Sequence[int]) -> None:
        """Forget everything and read a prompt."""

    def adopt(self, sequence: KVSequence) -> None:
        """Forget everything and take over a cached sequence (its values if that is possible, else by reading it)."""

    def decode(self, token_id: int) -> None:
        """Append one token and compute the logits after it."""


def make_peers(
    names: Sequence[str], source: ModelSource, weights: str, positions: int, threads: int
) -> dict[str, Callable[[], Engine]]:
    """Constructors of the engines named, with every switch that may be the best on this machine."""
    made: dict[str, Callable[[], Engine]] = {}
    for name in names:
        if name == "transformers":
            for dtype in ("bf16", "float32"):
                made[f"transformers {dtype}"] = partial(Transformers, source, dtype)
        elif name == "llama.cpp":
            if source.gguf is None:
                raise UsageError("peer llama.cpp: needs a model that comes from a GGUF file")
            kind = "Q8_0" if weights == "int8" else "F16"
            for flash in (False, True):
                label = f"llama.cpp {kind}{' flash' if flash else ''}"
                made[label] = partial(LlamaCpp, source.gguf, kind, flash, positions, threads)
        else:
            raise UsageError(f"peer '{name}': choose from {', '.join(PEERS)}")
    return made


class Transformers:
    """Hugging Face transformers with SDPA and a preallocated cache."""

    def __init__(self, source: ModelSource, dtype: str) -> None:
        os.environ["TRANSFORMERS_SDPA_FORCE_GQA"] = "1"
        from transformers import AutoModelForCausalLM

        self.name = f"transformers {dtype}"
        self._dtype = WEIGHTS[dtype]
        self._model: Any = AutoModelForCausalLM.from_pretrained(source.folder, dtype=self._dtype).eval()
        table = self._model.get_input_embeddings().weight
        tied = table is self._model.get_output_embeddings().weight
        self.weight_bytes = sum(
            p.numel() * p.element_size() for p in self._model.parameters() if tied or p is not table
        )
        self._cache: Any = None

    def prefill(self, token_ids: Sequence[int]) -> None:
        self._cache = preallocated_cache(self._model.config, len(token_ids) + 256)
        self._forward(token_ids)  # at once: the fastest here, as its attention then needs no mask

    def adopt(self, sequence: KVSequence) -> None:
        self._cache = preallocated_cache(self._model.config, sequence.length + 256)
        rows = sequence.rows(0, sequence.length).to(self._dtype)
        for layer, (keys, values) in enumerate(rows):
            self._cache.update(keys[None], values[None], layer)

    def decode(self, token_id: int) -> None:
        self._forward([token_id])

    def _forward(self, token_ids: Sequence[int]) -> None:
        with torch.inference_mode():
            self._model(
                input_ids=torch.tensor([list(token_ids)]), past_key_values=self._cache, use_cache=True, logits_to_keep=1
            )


def preallocated_cache(config: Any, capacity: int) -> Any:
    """A transformers cache whose layers write into one buffer each and hand out views of it."""
    from transformers.cache_utils import Cache, DynamicLayer

    class PreallocatedLayer(DynamicLayer):  # type: ignore[misc]
        length = 0

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            n = key_states.shape[-2]
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                shape = (*key_states.shape[:-2], capacity, key_states.shape[-1])
                self._k, self._v = key_states.new_empty(shape), value_states.new_empty(shape)
            self._k[..., self.length : self.length + n, :] = key_states
            self._v[..., self.length : self.length + n, :] = value_states
            self.length += n
            self.keys, self.values = self._k[..., : self.length, :], self._v[..., : self.length, :]
            return self.keys, self.values

    return Cache(layers=[PreallocatedLayer() for _ in range(config.num_hidden_layers)])


class LlamaCpp:
    """llama.cpp through llama-cpp-python, f16 keys and values."""

    def __init__(self, gguf: Path, kind: str, flash: bool, positions: int, threads: int) -> None:
        try:
            import llama_cpp
        except ImportError as error:
            raise UsageError("peer llama.cpp: not installed; pip install 'thresher[peers]'") from error
        self._api: Any = llama_cpp
        path = requantize(gguf, kind)
        self.name = f"llama.cpp {kind}{' flash' if flash else ''}"
        self._llama: Any = llama_cpp.Llama(
            str(path),
            n_ctx=positions,
            n_batch=512,
            n_ubatch=512,
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn=flash,
            verbose=False,
        )
        self.weight_bytes = path.stat().st_size

    def prefill(self, token_ids: Sequence[int]) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._llama.ctx), True)
        for begin in range(0, len(token_ids), 512):
            self._decode(token_ids[begin : begin + 512])

    def adopt(self, sequence: KVSequence) -> None:
        self.prefill(sequence.token_ids)

    def decode(self, token_id: int) -> None:
        self._decode([token_id])

    def _decode(self, token_ids: Sequence[int]) -> None:
        tokens = (ctypes.c_int32 * len(token_ids))(*token_ids)
        if self._api.llama_decode(self._llama.ctx, self._api.llama_batch_get_one(tokens, len(token_ids))):
            raise RuntimeError("llama.cpp could not decode")

    def __del__(self) -> None:
        if hasattr(self, "_llama"):
            self._llama.close()
            gc.collect()


def requantize(source: Path, kind: str) -> Path:
    """The same model with F16 or Q8_0 matrices: quantised tensors are expanded and written anew. Kept in the cache."""
    import gguf

    target = cache_folder() / "peers" / f"{source.stem}-{source.stat().st_size}-{kind}.gguf"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    reader = gguf.GGUFReader(source)
    making = target.with_suffix(f".{os.getpid()}.making")
    writer = gguf.GGUFWriter(making, reader.fields["general.architecture"].contents())
    kinds = gguf.GGMLQuantizationType
    for field in reader.fields.values():
        if field.name in ("general.architecture", "general.file_type") or field.name.startswith("GGUF."):
            continue
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        wanted = kinds[kind] if values.ndim > 1 else kinds.F32
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(making, target)
    return target
