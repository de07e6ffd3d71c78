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

# What a file may ask its readers to keep. Tiny entries cost more memory than bytes of the file; no model comes near.
MAX_ENTRIES = 16_384
MAX_TENSORS = 65_536
MAX_LISTED = 2_500_000  # all lists together: 0.3 million tokens with a score and a type each, 0.6 million merges
MAX_NUMBERS = 4_096  # a longer list of numbers is only counted (the scores and types of tokens)
MAX_NAME = 256  # bytes of a key or of a tensor's name
MAX_TEXT = 4_096  # bytes; a longer text is only counted (chat templates, another format of the tokenizer)


@dataclass(frozen=True)
class TensorInfo:
    name: str
    dims: tuple[int, ...]  # the fastest first
    type: int  # GGML's number
    begin: int  # bytes from the beginning of the file
    bytes: int
    path: Path  # of a model in several files, the one it lies in


@dataclass(frozen=True)
class Counted:
    """A text, or a list of texts or of many numbers, whose content was not kept."""

    kind: int  # GGUF's type of the elements
    length: int


@dataclass(frozen=True)
class Header:
    """`values` has numbers, short texts, tuples of numbers, and Counted for the rest."""

    path: Path
    values: dict[str, Any]
    tensors: tuple[TensorInfo, ...]


def check_header(path: Path) -> Header:
    """Read the header of a GGUF file. Raises ModelError for all that is not one, or points outside of the file."""
    try:
        with path.open("rb") as file:
            if path.stat().st_size < 24 or file.read(4) != b"GGUF":
                raise ModelError(f"{path} is not a GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Parser(path, data).header()
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from error
    except (ValueError, struct.error) as error:  # struct.error: beyond the end
        raise ModelError(f"{path} is not a readable GGUF file: {error}") from None


class _Parser:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at, self.size, self.listed = path, data, 4, len(data), 0

    def header(self) -> Header:
        version, tensor_count, entries = self.number("I"), self.number("Q"), self.number("Q")
        if version not in (2, 3):
            raise ValueError(f"version {version} is not known (2 and 3 are)")
        if tensor_count > MAX_TENSORS or entries > MAX_ENTRIES or (tensor_count + entries) * 12 > self.size:
            raise ValueError(f"{tensor_count} tensors, {entries} entries in {self.size} bytes")
        values: dict[str, Any] = {}
        for _ in range(entries):
            key = self.name()
            if key in values:
                raise ValueError(f"the key {key[:80]!r} is there twice")
            values[key] = self.value(self.number("I"))
        alignment = values.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1) or alignment > self.size:
            raise ValueError(f"an alignment of {alignment!r:.40}")
        infos = [(self.name(), self.dims(), self.number("I"), self.number("Q")) for _ in range(tensor_count)]
        return Header(self.path, values, self.tensors(infos, alignment))

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def skip(self, count: int) -> None:
        if count > self.size - self.at:
            raise ValueError(f"{count} bytes at {self.at}, beyond its end")
        self.at += count

    def name(self) -> str:
        name = self.text(MAX_NAME)
        if isinstance(name, Counted):
            raise ValueError(f"a name of {name.length} bytes before {self.at}")
        if not name.isprintable():  # it may be shown, in one line
            raise ValueError(f"the name {name[:80]!r}")
        return name

    def text(self, longest: int = MAX_TEXT) -> str | Counted:
        length = self.number("Q")
        self.skip(length)
        # UnicodeDecodeError is a ValueError.
        return Counted(_STRING, length) if length > longest else self.data[self.at - length : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self.array()
        raise ValueError(f"a value of type {kind}")

    def array(self) -> tuple[Any, ...] | Counted:
        kind, count = self.number("I"), self.number("Q")
        self.listed += count
        if self.listed > MAX_LISTED:
            raise ValueError(f"a list of {count} elements at {self.at}, more than any vocabulary")
        if kind in _SCALARS:
            begin, form = self.at, f"<{count}{_SCALARS[kind]}"
            self.skip(struct.calcsize(form))
            return struct.unpack_from(form, self.data, begin) if count <= MAX_NUMBERS else Counted(kind, count)
        if kind != _STRING:  # lists of lists are allowed by the format and used by no model
            raise ValueError(f"a list of values of type {kind}")
        data, at, length_at = self.data, self.at, struct.Struct("<Q").unpack_from
        for _ in range(count):  # written out: a vocabulary would take a second of calls
            at += 8 + length_at(data, at)[0]
            if at > self.size:
                raise ValueError(f"a text that ends at {at}, beyond its end")
        self.at = at
        return Counted(kind, count)

    def dims(self) -> tuple[int, ...]:
        count = self.number("I")
        if not 1 <= count <= 4:
            raise ValueError(f"a tensor of {count} dimensions")
        return tuple(self.number("Q") for _ in range(count))

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
            found[name] = TensorInfo(name, dims, kind, data + offset, length, self.path)
        return tuple(found.values())
