"""Other engines on the same weights, each with its best switches, behind one small interface.

transformers gets a preallocated cache (its default copies the whole cache for every token) and grouped-query attention
without repeating keys. For llama.cpp see `llama_cpp.py`.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from thresher.cache.sequence import KVSequence
from thresher.errors import UsageError
from thresher.evaluation.llama_cpp import AS_IT_LIES, LlamaCpp
from thresher.models.load import WEIGHTS
from thresher.models.resolve import ModelSource

PEERS = ("transformers", "llama.cpp", "llama.cpp-file")


class Engine(Protocol):
    """An engine that holds one sequence, or several of the same length that it decodes together."""

    name: str
    weight_bytes: int  # read by one decode step

    def prefill(self, token_ids: Sequence[int]) -> None:
        """Forget everything and read a prompt into one sequence."""

    def adopt(self, sequence: KVSequence, batch: int = 1) -> None:
        """Forget everything and hold a cached sequence `batch` times, each with rows of its own in memory.

        Its rows are taken over if that is possible, else its tokens are read again.
        """

    def decode(self, token_id: int) -> None:
        """Append one token to every sequence, in one pass, and compute the logits after each."""


def make_peers(
    names: Sequence[str], source: ModelSource, weights: str, threads: int
) -> dict[str, Callable[[], Engine]]:
    """Constructors of the engines named, with every switch that may be the best on this machine."""
    made: dict[str, Callable[[], Engine]] = {}
    for name in names:
        if name == "transformers":
            for dtype in ("bf16", "float32"):
                made[f"transformers {dtype}"] = partial(Transformers, source, dtype)
        elif name in ("llama.cpp", "llama.cpp-file"):
            if source.gguf is None:
                raise UsageError(f"peer {name}: needs a model that comes from a GGUF file")
            kinds = ("Q8_0",) if weights == "int8" else ("F16", "BF16")
            for kind in kinds if name == "llama.cpp" else (AS_IT_LIES,):
                for flash in (False, True):
                    label = f"llama.cpp {kind}{' flash' if flash else ''}"
                    made[label] = partial(LlamaCpp, source.gguf, kind, flash, threads)
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
        self._batch = 1

    def prefill(self, token_ids: Sequence[int]) -> None:
        self._cache, self._batch = preallocated_cache(self._model.config, len(token_ids) + 256), 1
        self._forward(token_ids)  # at once: the fastest here, as its attention then needs no mask

    def adopt(self, sequence: KVSequence, batch: int = 1) -> None:
        self._cache = None  # before the next one takes memory
        self._cache, self._batch = preallocated_cache(self._model.config, sequence.length + 256), batch
        rows = sequence.rows(0, sequence.length).to(self._dtype)
        for layer, (keys, values) in enumerate(rows):
            self._cache.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), layer)

    def decode(self, token_id: int) -> None:
        self._forward([token_id])

    def _forward(self, token_ids: Sequence[int]) -> None:
        with torch.inference_mode():
            ids = torch.tensor([list(token_ids)] * self._batch)
            self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)


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
