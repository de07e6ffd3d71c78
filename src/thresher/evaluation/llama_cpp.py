"""llama.cpp as a peer: the GGUF file that our model was made from, or F16 or Q8_0 weights written from it."""

import ctypes
import logging
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from thresher.cache.sequence import KVSequence
from thresher.errors import UsageError
from thresher.files import replaced
from thresher.models.resolve import cache_folder

ROOM = 1024  # tokens that can be decoded behind a prompt
AS_IT_LIES = "file"  # the kind of weights that the GGUF file has, most often of 4 bits
_CHUNK = 512  # tokens of one pass through a prompt
_STATE_MAGIC = 0xAF143CD8
_F16 = 1  # ggml's number of the type


class LlamaCpp:
    """llama.cpp through llama-cpp-python, f16 keys and values.

    Sequences of a batch must not share rows: that would be another comparison. In a unified buffer
    `llama_memory_seq_cp` only marks the cells of one sequence as belonging to a second one too. So every sequence is
    filled for itself, and `unified` is free to be what is faster: False gives each sequence a buffer and an attention
    over that alone; True puts all in one buffer, where every query is multiplied with the keys of all sequences and
    what is not its own is masked.
    """

    def __init__(self, gguf: Path, kind: str, flash: bool, threads: int, unified: bool = False) -> None:
        try:
            import llama_cpp
        except ImportError as error:
            raise UsageError("peer llama.cpp: not installed; pip install 'thresher[peers]'") from error
        self._api: Any = llama_cpp
        self._context: Any = None
        path = gguf if kind == AS_IT_LIES else requantize(gguf, kind)
        self.name = f"llama.cpp {kind}{' flash' if flash else ''}"
        self.weight_bytes = path.stat().st_size
        self._flash, self._threads, self._unified = flash, threads, unified
        logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
        llama_cpp.llama_backend_init()
        self._model: Any = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise UsageError(f"peer llama.cpp: cannot load {path}")
        self._pass: Any = llama_cpp.llama_batch_init(_CHUNK, 0, 1)
        self._batch = self._capacity = self._length = 0

    def prefill(self, token_ids: Sequence[int]) -> None:
        self._open(len(token_ids), 1)
        self._read(token_ids, 0)

    def adopt(self, sequence: KVSequence, batch: int = 1) -> None:
        self._open(sequence.length, batch)
        if not self._takes_rows(sequence):
            for number in range(batch):
                self._read(sequence.token_ids, number)
            return
        interleaved = self._api.llama_model_rope_type(self._model) == self._api.LLAMA_ROPE_TYPE_NORM
        state = sequence_state(sequence, 1 if self._unified else batch, not self._flash, interleaved)
        data = ctypes.cast(ctypes.c_char_p(state), ctypes.POINTER(ctypes.c_uint8))
        for number in range(batch):
            if self._api.llama_state_seq_set_data(self._context, data, len(state), number) != len(state):
                raise RuntimeError("llama.cpp did not take the cache: its state format may have changed")
        self._length = sequence.length

    def decode(self, token_id: int) -> None:
        self._run((token_id, self._length, number, True) for number in range(self._batch))
        self._length += 1

    def logits(self, number: int) -> torch.Tensor:
        """`[vocab]` after the last token of a sequence."""
        size = self._api.llama_vocab_n_tokens(self._api.llama_model_get_vocab(self._model))
        pointer = self._api.llama_get_logits_ith(self._context, number - self._batch)  # the last pass asked for these
        return torch.from_numpy(np.ctypeslib.as_array(pointer, shape=(size,)).copy())

    def _open(self, length: int, batch: int) -> None:
        """An empty context with room for `batch` sequences; the one at hand if it will do."""
        api = self._api
        if self._context and self._batch == batch and length + ROOM <= self._capacity:
            api.llama_memory_clear(api.llama_get_memory(self._context), True)
        else:
            self._close()
            wanted = api.llama_context_default_params()
            self._capacity = -(-(length + ROOM) // 256) * 256
            wanted.n_ctx = batch * self._capacity  # may exceed the trained length: RoPE goes on as it is
            wanted.n_batch = wanted.n_ubatch = _CHUNK
            wanted.n_seq_max = batch
            wanted.n_threads = wanted.n_threads_batch = self._threads
            wanted.flash_attn_type = (
                api.LLAMA_FLASH_ATTN_TYPE_ENABLED if self._flash else api.LLAMA_FLASH_ATTN_TYPE_DISABLED
            )
            wanted.kv_unified = self._unified
            self._context = api.llama_init_from_model(self._model, wanted)
            if not self._context:
                raise RuntimeError(f"llama.cpp has no memory for {batch} x {length} tokens")
        self._batch, self._length = batch, 0

    def _takes_rows(self, sequence: KVSequence) -> bool:
        """Whether our rows can become its state: plain attention in every layer, of the same shape."""
        api, model, layout = self._api, self._model, sequence.layout
        shape = (api.llama_model_n_layer(model), api.llama_model_n_head_kv(model))
        ropes = (api.LLAMA_ROPE_TYPE_NORM, api.LLAMA_ROPE_TYPE_NEOX)
        return (
            shape == (layout.layers, layout.kv_heads)
            and api.llama_model_rope_type(model) in ropes
            and api.llama_model_n_swa(model) == 0
        )

    def _read(self, token_ids: Sequence[int], number: int) -> None:
        last = len(token_ids) - 1
        for begin in range(0, len(token_ids), _CHUNK):
            chunk = token_ids[begin : begin + _CHUNK]
            self._run((token, begin + i, number, begin + i == last) for i, token in enumerate(chunk))
        self._length = len(token_ids)

    def _run(self, tokens: Iterable[tuple[int, int, int, bool]]) -> None:
        """One pass over (token, position, sequence, whether its logits are wanted)."""
        this, n = self._pass, 0
        for n, (token, position, number, logits) in enumerate(tokens, 1):
            this.token[n - 1], this.pos[n - 1], this.logits[n - 1] = token, position, logits
            this.n_seq_id[n - 1], this.seq_id[n - 1][0] = 1, number
        this.n_tokens = n
        if self._api.llama_decode(self._context, this):
            raise RuntimeError("llama.cpp could not decode")

    def _close(self) -> None:
        if self._context:
            self._api.llama_free(self._context)
            self._context = None

    def __del__(self) -> None:
        if hasattr(self, "_pass"):
            self._close()
            self._api.llama_batch_free(self._pass)
            self._api.llama_model_free(self._model)


def sequence_state(sequence: KVSequence, streams: int, transposed: bool, interleaved: bool) -> bytes:
    """Our rows in the format of `llama_state_seq_get_data`, as f16, so that a context need not read the prompt again.

    Little-endian: magic u32, sequence i32 (ignored), streams u32, then for each stream its cells u32 (here all in the
    first) and if there are any: position i32, 1 u32, sequence i32 (ignored) of each; whether values are transposed
    u32; layers u32; of each layer type i32, bytes of a row u64, keys `[cells, kv_heads * head_dim]`; of each layer the
    same for values, or if transposed type i32, bytes of an element u32, rows u32, `[kv_heads * head_dim, cells]`.

    streams: buffers of the context, 1 if unified. transposed: it is so without flash attention. interleaved: RoPE
    turns neighbours (2i, 2i + 1), for which GGUF has the weights of Llama's keys reordered, where ours turns
    (i, i + head_dim / 2).
    """
    n, layout = sequence.length, sequence.layout
    width = layout.kv_heads * layout.head_dim
    kv = sequence.rows(0, n).half()
    cells = np.zeros((n, 3), dtype="<i4")
    cells[:, 0], cells[:, 1] = np.arange(n), 1
    parts: list[Any] = [
        struct.pack("<IiII", _STATE_MAGIC, 0, streams, n),
        cells,
        struct.pack("<II", transposed, layout.layers),
    ]
    for keys in kv[:, 0]:
        if interleaved:
            keys = keys.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        parts += [struct.pack("<iQ", _F16, 2 * width), keys.transpose(0, 1).contiguous().numpy()]
    for values in kv[:, 1]:
        if transposed:
            parts += [struct.pack("<iII", _F16, 2, width), values.transpose(1, 2).contiguous().numpy()]
        else:
            parts += [struct.pack("<iQ", _F16, 2 * width), values.transpose(0, 1).contiguous().numpy()]
    parts.append(struct.pack(f"<{streams - 1}I", *[0] * (streams - 1)))
    return b"".join(parts)


def requantize(source: Path, kind: str) -> Path:
    """The same model with F16 or Q8_0 matrices: quantised tensors are expanded and written anew. Kept in the cache."""
    target = cache_folder() / "peers" / f"{source.stem}-{source.stat().st_size}-{kind}.gguf"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    replaced(target, lambda part: _write_quantized(source, part, kind))
    return target


def _write_quantized(source: Path, part: Path, kind: str) -> None:
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(part, reader.fields["general.architecture"].contents())
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
