"""The header of a GGUF file, read with every count bounded by the file: before a library trusts it."""

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from thresher.errors import ModelError

_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # GGUF's type numbers, as struct spells them
_STRING, _ARRAY = 8, 9
_MAX_DEPTH = 2  # arrays in arrays; no known key has any


@dataclass(frozen=True)
class TensorInfo:
    name: str
    dims: tuple[int, ...]  # the fastest first
    type: int  # GGML's number
    begin: int  # bytes from the beginning of the file
    bytes: int


@dataclass(frozen=True)
class Header:
    """`values` has scalars and strings; of arrays, whose lengths were checked, only the number of elements."""

    values: dict[str, Any]
    tensors: tuple[TensorInfo, ...]


def check_header(path: Path) -> Header:
    """Read the header of a GGUF file. Raises ModelError for all that is not one, or points outside of the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size < 24 or file.read(4) != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Parser(data).header()
            except (ValueError, struct.error) as error:  # struct.error: beyond the end
                raise ModelError(f"{path} is not a readable GGUF file: {error}") from None


class _Parser:
    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.size = data, 4, len(data)

    def header(self) -> Header:
        version, tensor_count, entries = self.number("I"), self.number("Q"), self.number("Q")
        if version not in (2, 3):
            raise ValueError(f"version {version} is not known (2 and 3 are)")
        if (tensor_count + entries) * 12 > self.size:
            raise ValueError(f"{tensor_count} tensors, {entries} entries in {self.size} bytes")
        values: dict[str, Any] = {}
        for _ in range(entries):
            key = self.text()
            if key in values:
                raise ValueError(f"the key {key[:80]!r} is there twice")
            values[key] = self.value(self.number("I"))
        self.check_values(values, tensor_count)
        infos = [(self.text(), self.dims(), self.number("I"), self.number("Q")) for _ in range(tensor_count)]
        return Header(values, self.tensors(infos, values.get("general.alignment", 32)))

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def skip(self, count: int) -> None:
        if count > self.size - self.at:
            raise ValueError(f"{count} bytes at {self.at}, beyond its end")
        self.at += count

    def text(self) -> str:
        length = self.number("Q")
        begin = self.at
        self.skip(length)
        return self.data[begin : self.at].decode()  # UnicodeDecodeError is a ValueError

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY or depth > _MAX_DEPTH:
            raise ValueError(f"a value of type {kind}, {depth} arrays deep")
        element, count = self.number("I"), self.number("Q")
        if element in _SCALARS:
            self.skip(count * struct.calcsize("<" + _SCALARS[element]))
        elif count * 8 > self.size - self.at:
            raise ValueError(f"an array of {count} elements, beyond its end")
        elif element == _STRING:
            for _ in range(count):
                self.skip(self.number("Q"))
        else:
            for _ in range(count):
                self.value(element, depth + 1)
        return count

    def dims(self) -> tuple[int, ...]:
        count = self.number("I")
        if not 1 <= count <= 4:
            raise ValueError(f"a tensor of {count} dimensions")
        return tuple(self.number("Q") for _ in range(count))

    def check_values(self, values: dict[str, Any], tensor_count: int) -> None:
        """The few values whose size decides how much is made of them, and those that are read here."""
        for key in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre"):
            if not isinstance(values.get(key, ""), str):
                raise ValueError(f"{key} is no string")
        layers = values.get(f"{values.get('general.architecture')}.block_count", 0)
        if not isinstance(layers, int) or not 0 <= layers <= tensor_count:
            raise ValueError(f"{layers} layers of {tensor_count} tensors")
        if not isinstance(values.get("split.count", 0), int):
            raise ValueError("split.count is no number")
        alignment = values.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1) or alignment > self.size:
            raise ValueError(f"an alignment of {alignment}")

    def tensors(self, infos: list[tuple[str, tuple[int, ...], int, int]], alignment: int) -> tuple[TensorInfo, ...]:
        from gguf import GGML_QUANT_SIZES

        sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
        data = -(-self.at // alignment) * alignment
        found: dict[str, TensorInfo] = {}
        total = 0
        for name, dims, kind, offset in infos:
            if name in found:
                raise ValueError(f"the tensor {name[:80]!r} is there twice")
            if kind not in sizes:
                raise ValueError(f"{name[:80]!r} is of type {kind}, which is not known")
            block, block_bytes = sizes[kind]
            if 0 in dims or dims[0] % block:
                raise ValueError(f"{name[:80]!r} is of shape {dims}")
            length = prod(dims) // block * block_bytes
            total += length
            if offset % alignment or data + offset + length > self.size or data + total > self.size:
                raise ValueError(f"{name[:80]!r} has {length} bytes at {offset}, beyond its end")
            found[name] = TensorInfo(name, dims, kind, data + offset, length)
        return tuple(found.values())
