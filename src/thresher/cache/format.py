"""The layout of a KV file and its checks. Nothing in a file is believed before it is checked.

    magic (8) | version u32 | header bytes u32 | header JSON | xxh3_64 of all before u64 | zeros to 4096
    token ids int32 [length] | zeros to 4096
    of models with recurrent state: snapshots float32 [ceil(length / 2048), layers, size] | zeros to 4096
    keys and values [layers, 2, kv_heads, length, head_dim]
    optionally an index (cache/arrays.py)

The header says whose cache it is and holds one xxh3_64 for every block of 512 tokens, over their ids, all their rows,
and the snapshot after their last token if there is one: every 2,048 tokens and at the end. All
integers are little endian.
"""

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from thresher.cache.sequence import STATE_EVERY, KVLayout
from thresher.errors import KVFileDamagedError, KVFileVersionError, NotAKVFileError

MAGIC = b"THRESHKV"
PART_MAGIC = b"THRESHPT"  # in its place while the file is being written
INDEX_MAGIC = b"THRESHIX"  # of what may follow the rows
VERSION = 2
STATEFUL_VERSION = 3  # of files with snapshots
BLOCK = 512  # tokens under one checksum
PAGE = 4096
MOST_NAMES = 1 << 18  # bytes of a header's JSON without checksums
_LEAST_TOKEN = 8  # bytes of a token in any file: its id, and a key and a value of one number each
_HASHED = 1 << 18  # bytes, about, that are copied together to be hashed
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Identity:
    """Which model and tokenizer a cache belongs to. Fingerprints decide; the name is for people."""

    model: str
    model_fingerprint: str
    tokenizer_fingerprint: str


@dataclass(frozen=True)
class Source:
    """The text a cache was read from."""

    name: str
    sha256: str


@dataclass(frozen=True)
class KVFileInfo:
    """What the header of a KV file says.

    weights: number format of the model that wrote it; framing: how the text was wrapped; model: where that model was
    found, a hub id or an absolute path ("" in files of before this was kept).
    """

    identity: Identity
    layout: KVLayout
    length: int
    weights: str
    framing: str
    source: Source | None
    model: str = ""

    @property
    def blocks(self) -> int:
        return -(-self.length // BLOCK)


def pages(n: int) -> int:
    return -(-n // PAGE) * PAGE


@dataclass(frozen=True)
class Offsets:
    """Where the parts of a file begin, and where its rows end, in bytes."""

    tokens: int
    states: int
    rows: int
    end: int


def offsets(info: KVFileInfo, header_bytes: int) -> Offsets:
    tokens = pages(16 + header_bytes + 8)
    states = tokens + pages(4 * info.length)
    rows = states + pages(info.layout.state_bytes * len(state_positions(info)))
    return Offsets(tokens, states, rows, rows + info.length * info.layout.bytes_per_token)


def state_positions(info: KVFileInfo) -> list[int]:
    """Numbers of tokens after which the file keeps a snapshot of the recurrent state, in order."""
    if not info.layout.state_bytes:
        return []
    return [*range(STATE_EVERY, info.length, STATE_EVERY), info.length]


def describe(info: KVFileInfo) -> dict[str, Any]:
    """The header as JSON values, without checksums."""
    layout = info.layout
    return {
        "identity": asdict(info.identity),
        "layers": layout.layers,
        "kv_heads": layout.kv_heads,
        "head_dim": layout.head_dim,
        "dtype": str(layout.dtype).removeprefix("torch."),
        "length": info.length,
        "weights": info.weights,
        "framing": info.framing,
        "source": asdict(info.source) if info.source else None,
        "model": info.model,
    } | ({"state": list(layout.state)} if layout.state_bytes else {})


def encode_header(info: KVFileInfo, checksums: list[int]) -> bytes:
    """Magic to header checksum. Its size depends on the info alone."""
    fields = describe(info) | {"checksums": encode_checksums(checksums)}  # last: see `checksums_at`
    body = json.dumps(fields, ensure_ascii=True).encode()
    version = STATEFUL_VERSION if info.layout.state_bytes else VERSION
    head = MAGIC + struct.pack("<II", version, len(body)) + body
    return head + struct.pack("<Q", xxhash.xxh3_64_intdigest(head))


def encode_checksums(checksums: list[int]) -> str:
    return "".join(f"{c:016x}" for c in checksums)


def checksums_at(info: KVFileInfo) -> int:
    """Where in the file the digits of the first block's checksum are; what comes before depends on the info alone."""
    return 16 + header_size(info) - len('"}') - 16 * info.blocks


def header_size(info: KVFileInfo) -> int:
    """Bytes of the header's JSON."""
    return len(encode_header(info, [0] * info.blocks)) - 24


def decode_header(fd: int, path: Path, file_bytes: int) -> tuple[KVFileInfo, list[int], Offsets]:
    """Read and check a header. Raises NotAKVFileError, KVFileVersionError or KVFileDamagedError."""
    head = read_at(fd, 16, 0)
    if len(head) < 16 or head[:8] != MAGIC:
        raise NotAKVFileError(f"{path} is not a KV file; make one with: thresher read")
    version, size = struct.unpack("<II", head[8:])
    if version not in (VERSION, STATEFUL_VERSION):
        raise KVFileVersionError(
            f"{path} has format version {version}; this Thresher reads versions {VERSION} and {STATEFUL_VERSION}"
        )
    # Parsed JSON may take many times its size in memory, so no more is read than a file of this size can need.
    if size > MOST_NAMES + 16 * (file_bytes // (_LEAST_TOKEN * BLOCK) + 1):
        raise KVFileDamagedError(f"{path} is damaged: its header is larger than such a file needs")
    rest = read_at(fd, size + 8, 16)
    if len(rest) < size + 8:
        raise KVFileDamagedError(f"{path} is damaged: its header is cut")
    body, check = rest[:size], rest[size:]
    if struct.unpack("<Q", check)[0] != xxhash.xxh3_64_intdigest(head + body):
        raise KVFileDamagedError(f"{path} is damaged: the checksum of its header does not match")
    try:
        fields = json.loads(body)
        info = decode_info(fields)
        checksums = decode_checksums(fields["checksums"], info.blocks)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise KVFileDamagedError(f"{path} is damaged: its header makes no sense ({error!s:.80})") from error
    where = offsets(info, size)
    indexed = file_bytes > where.end and read_at(fd, len(INDEX_MAGIC), where.end) == INDEX_MAGIC
    if file_bytes != where.end and not indexed:
        raise KVFileDamagedError(f"{path} is damaged: it has {file_bytes} bytes, its header says {where.end}")
    return info, checksums, where


def decode_checksums(text: str, blocks: int) -> list[int]:
    """The inverse of `encode_checksums`. Raises ValueError or TypeError."""
    if len(text) != 16 * blocks:
        raise ValueError("checksums")
    return [int(text[i : i + 16], 16) for i in range(0, len(text), 16)]


def decode_info(fields: Mapping[str, Any]) -> KVFileInfo:
    """The inverse of `describe`. Raises ValueError, KeyError or TypeError on anything unexpected."""

    def number(name: str, low: int, high: int) -> int:
        value = fields[name]
        if type(value) is not int or not low <= value <= high:
            raise ValueError(name)
        return value

    def state(values: Any) -> tuple[int, int]:
        layers, size = values
        if not all(type(n) is int and 0 <= n <= 1 << 24 for n in (layers, size)) or layers * size > 1 << 28:
            raise ValueError("state")
        return layers, size

    def texts(values: Any) -> dict[str, str]:
        if not isinstance(values, dict) or not all(isinstance(v, str) for v in values.values()):
            raise ValueError("text expected")
        return dict(values)

    layout = KVLayout(
        layers=number("layers", 1, 1 << 16),
        kv_heads=number("kv_heads", 1, 1 << 16),
        head_dim=number("head_dim", 1, 1 << 16),
        dtype=_DTYPES[fields["dtype"]],
        state=state(fields.get("state", [0, 0])),
    )
    named = texts({name: fields[name] for name in ("weights", "framing")} | {"model": fields.get("model", "")})
    if named["framing"] not in ("chat", "plain"):
        raise ValueError("framing")
    return KVFileInfo(
        identity=Identity(**texts(fields["identity"])),
        layout=layout,
        length=number("length", 1, 1 << 32),
        source=Source(**texts(fields["source"])) if fields["source"] else None,
        **named,
    )


def raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy."""
    array: Any = tensor.flatten().view(torch.uint8).numpy()
    return memoryview(array)


def write_all(fd: int, data: memoryview, at: int) -> None:
    while data:
        written = os.pwrite(fd, data, at)
        data, at = data[written:], at + written


def read_at(fd: int, n: int, at: int) -> bytes:
    """n bytes from byte `at` of a file, fewer if it ends before."""
    data = bytearray(n)
    return bytes(data[: read_into(fd, memoryview(data), at)])


def read_into(fd: int, data: memoryview, at: int) -> int:
    """Fill memory from byte `at` of a file; returns how many bytes there were."""
    done = 0
    while done < len(data) and (n := os.preadv(fd, [data[done:]], at + done)):
        done += n
    return done


def block_checksum(token_ids: np.ndarray, rows: torch.Tensor, state: torch.Tensor | None = None) -> int:
    """xxh3_64 over int32 token ids, the rows `[layers, 2, kv_heads, n, head_dim]` plane by plane, and a snapshot."""
    digest = xxhash.xxh3_64(token_ids.tobytes())
    planes = rows.flatten(0, 2)
    for some in torch.split(planes, max(1, _HASHED // (rows[0, 0, 0].numel() * rows.itemsize))):
        digest.update(raw(some.contiguous()))
    if state is not None:
        digest.update(raw(state.contiguous()))
    return digest.intdigest()
