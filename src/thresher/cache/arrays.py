"""Named arrays behind the rows of a KV file: what an attention method knows of the keys, so that it need not be
built again.

    magic (8) | JSON bytes u32 | JSON | xxh3_64 of all before u64 | zeros to 4096 | arrays, each from a multiple of 64

Arrays follow each other in the order of the JSON.

The JSON holds `meta`, which is the method's business, and for each array its dtype, shape, offset and xxh3_64.
Nothing is believed before it is checked; what the numbers of an array may be is for the method to check.
"""

import json
import math
import mmap
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash

from thresher.cache.format import INDEX_MAGIC, pages, raw, write_all
from thresher.errors import KVFileDamagedError

ALIGN = 64
_MOST_JSON = 1 << 16  # bytes, and one for each so many of the file: parsed JSON may take many times its size in memory
_BYTES_PER_JSON = 64
_MOST_DIMENSIONS = 8
_MOST_NUMBERS = 1 << 60  # also of an empty array, as its strides are computed from the other lengths
_DTYPES = {
    name: getattr(torch, name) for name in ("uint8", "uint16", "int32", "int64", "bfloat16", "float32")
}  # of what indexes are made of


def write_arrays(fd: int, at: int, meta: Mapping[str, Any], arrays: Mapping[str, torch.Tensor]) -> None:
    """Write contiguous arrays from byte `at` of the file, which ends behind them."""
    entries: dict[str, Any] = {}
    offset = 0
    for name, array in arrays.items():
        entries[name] = {
            "dtype": str(array.dtype).removeprefix("torch."),
            "shape": list(array.shape),
            "offset": offset,
            "xxh3": f"{xxhash.xxh3_64_intdigest(raw(array)):016x}",
        }
        offset += -(-array.numel() * array.itemsize // ALIGN) * ALIGN
    body = json.dumps({"meta": meta, "arrays": entries}).encode()
    head = INDEX_MAGIC + struct.pack("<I", len(body)) + body
    head += struct.pack("<Q", xxhash.xxh3_64_intdigest(head))
    first = at + pages(len(head))
    if len(body) > _most_json(first + offset):
        raise ValueError(f"{len(body)} bytes of JSON for an index of {offset} bytes")
    os.ftruncate(fd, first + offset)
    write_all(fd, memoryview(head), at)
    for name, array in arrays.items():
        write_all(fd, raw(array), first + entries[name]["offset"])


def read_arrays(memory: mmap.mmap, at: int, path: Path, verify: bool) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """`meta` and the arrays as views of the mapped file. verify: compare the checksums of the arrays too.

    Raises KVFileDamagedError.
    """
    damaged = KVFileDamagedError(f"{path} is damaged: its index makes no sense")
    end = len(memory)
    if end - at < 20 or memory[at : at + 8] != INDEX_MAGIC:
        raise KVFileDamagedError(f"{path} is damaged: what follows its rows is not an index")
    (size,) = struct.unpack("<I", memory[at + 8 : at + 12])
    if size > min(_most_json(end), end - at - 20):
        raise damaged
    head = memory[at : at + 12 + size]
    if struct.unpack("<Q", memory[at + 12 + size : at + 20 + size])[0] != xxhash.xxh3_64_intdigest(head):
        raise KVFileDamagedError(f"{path} is damaged: the checksum of its index does not match")
    first = at + pages(20 + size)
    arrays: dict[str, torch.Tensor] = {}
    reached = first
    try:
        parsed = json.loads(head[12:])
        for name, entry in parsed["arrays"].items():
            dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
            if type(shape) is not list or len(shape) > _MOST_DIMENSIONS or first + entry["offset"] != reached:
                raise ValueError(name)
            if not all(type(n) is int and 0 <= n <= end for n in shape):
                raise ValueError(name)
            count = math.prod(shape)
            if reached + count * dtype.itemsize > end or math.prod(max(n, 1) for n in shape) > _MOST_NUMBERS:
                raise ValueError(name)
            flat = (
                torch.frombuffer(memory, dtype=dtype, count=count, offset=reached)
                if count
                else torch.empty(0, dtype=dtype)
            )
            arrays[name] = flat.view(shape)
            reached += -(-count * dtype.itemsize // ALIGN) * ALIGN
            if verify and xxhash.xxh3_64_intdigest(raw(arrays[name])) != int(entry["xxh3"], 16):
                raise KVFileDamagedError(f"{path} is damaged: the checksum of its index ({name}) does not match")
        meta = parsed["meta"]
        if type(meta) is not dict or reached != end:
            raise ValueError("size")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, RuntimeError) as error:
        raise damaged from error
    return meta, arrays


def _most_json(file_bytes: int) -> int:
    return _MOST_JSON + file_bytes // _BYTES_PER_JSON
