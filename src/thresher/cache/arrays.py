"""Named arrays behind the rows of a KV file: what an attention method knows of the keys, so that it need not be
built again.

    magic (8) | JSON bytes u32 | JSON | xxh3_64 of all before u64 | zeros to 4096 | arrays, each from a multiple of 64

The JSON holds `meta`, which is the method's business, and for each array its dtype, shape, offset and xxh3_64.
Nothing is believed before it is checked; what the numbers of an array may be is for the method to check.
"""

import json
import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash

from thresher.cache.format import INDEX_MAGIC, pages, raw, write_all
from thresher.errors import KVFileDamagedError

ALIGN = 64
_MAX_JSON = 1 << 24
_DTYPES = {
    name: getattr(torch, name) for name in ("uint8", "uint16", "int32", "int64", "bfloat16", "float32")
}  # of what indexes are made of


def write_arrays(file: BinaryIO, at: int, meta: Mapping[str, Any], arrays: Mapping[str, torch.Tensor]) -> None:
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
    file.truncate(first + offset)
    write_all(file, memoryview(head), at)
    for name, array in arrays.items():
        write_all(file, raw(array), first + entries[name]["offset"])


def read_arrays(memory: mmap.mmap, at: int, path: Path, verify: bool) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """`meta` and the arrays as views of the mapped file. verify: compare the checksums of the arrays too.

    Raises KVFileDamagedError.
    """
    damaged = KVFileDamagedError(f"{path} is damaged: its index makes no sense")
    end = len(memory)
    if end - at < 20 or memory[at : at + 8] != INDEX_MAGIC:
        raise KVFileDamagedError(f"{path} is damaged: what follows its rows is not an index")
    (size,) = struct.unpack("<I", memory[at + 8 : at + 12])
    if size > min(_MAX_JSON, end - at - 20):
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
            dtype, shape, offset = _DTYPES[entry["dtype"]], entry["shape"], first + entry["offset"]
            if not all(type(n) is int and 0 <= n < 1 << 40 for n in (*shape, entry["offset"])) or offset % ALIGN:
                raise ValueError(name)
            count = math.prod(shape)
            if offset + count * dtype.itemsize > end:
                raise ValueError(name)
            flat = (
                torch.frombuffer(memory, dtype=dtype, count=count, offset=offset)
                if count
                else torch.empty(0, dtype=dtype)
            )
            arrays[name] = flat.view(shape)
            reached = max(reached, offset + -(-count * dtype.itemsize // ALIGN) * ALIGN)
            if verify and xxhash.xxh3_64_intdigest(raw(arrays[name])) != int(entry["xxh3"], 16):
                raise KVFileDamagedError(f"{path} is damaged: the checksum of its index ({name}) does not match")
        meta = parsed["meta"]
        if type(meta) is not dict or reached != end:
            raise ValueError("size")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, RuntimeError) as error:
        raise damaged from error
    return meta, arrays
