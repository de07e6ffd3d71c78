"""What commands that plan have in common: models of which only the shape counts, and devices."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thresher.cli.terminal import say, stderr
from thresher.errors import ModelError, UsageError

if TYPE_CHECKING:
    from thresher.machine.cost import ModelShape
    from thresher.machine.shapes import Decoder

# Bytes of a weight, and of a number in the KV cache. q4: blocks of 32 with a scale, as GGUF's Q4_0.
SIZES = {"bf16": (2.0, 2.0), "fp8": (1.0, 2.0), "int8": (1.0, 2.0), "q4": (0.5625, 2.0), "float32": (4.0, 4.0)}
KV_SIZES = {"bf16": 2.0, "fp8": 1.0, "int8": 1.0, "float32": 4.0}

PlannedModel = Annotated[
    str,
    typer.Option(
        help="A published shape (--model list shows them), or a model as everywhere: only its config is read."
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        "--machine",
        help="this (measured now); a100, h100, h200, b200, l40, l40s, 4090, all but the first also as NAME-fp8; or "
        "GFLOP/s:GB/s, as 950:46.",
    ),
]


def planned_decoder(name: str) -> "Decoder":
    """Of a published decoder, or by the configuration of a model that is here. Raises UsageError or ModelError."""
    from thresher.machine.shapes import DECODERS, decoder_of, nearest, published

    if name == "list":
        raise UsageError(f"--model: there is {', '.join(DECODERS)}; or a hub id, a folder or a .gguf file")
    if known := published(name):
        return known
    from transformers import AutoConfig

    import thresher.models.mosaic  # noqa: F401  (registers its configuration)
    from thresher.models.resolve import resolve

    try:
        return decoder_of(AutoConfig.from_pretrained(resolve(name, say).folder))
    except ModelError as error:
        if "/" in name or Path(name).exists():
            raise
        raise UsageError(f"--model {name}: no published shape ({nearest(name)}), and no model: {error}") from None


def planned_shape(name: str, weights: str, kv: str | None = None) -> "ModelShape":
    """In a number format of the weights, and of the KV cache where it is another. Raises UsageError or ModelError."""
    if weights not in SIZES:
        raise UsageError(f"--weights {weights}: choose from {', '.join(SIZES)}")
    if kv is not None and kv not in KV_SIZES:
        raise UsageError(f"--kv {kv}: choose from {', '.join(KV_SIZES)}")
    weight_bytes, value_bytes = SIZES[weights]
    return planned_decoder(name).shape(weight_bytes, KV_SIZES[kv] if kv else value_bytes)


def rates_of(device: str) -> tuple[float, float]:
    """Operations and bytes a second of a device; "this" is measured, about a second. Raises UsageError."""
    from thresher.machine.devices import device as known_device

    if device != "this":
        known = known_device(device)
        return known.flops, known.bandwidth
    from thresher.evaluation.machine import measure_machine

    with stderr.status("measuring this machine"):
        measured = measure_machine()
    return measured.matmul, measured.read


def lengths_in(path: Path) -> list[float]:
    """Numbers of tokens, one a line. Raises UsageError that names the line."""
    found = []
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {getattr(error, 'strerror', None) or 'not text'}") from None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            length = float(line)
        except ValueError:
            length = -1.0
        if not 0 <= length <= 1e12:
            raise UsageError(f"{path}, line {number}: {line.strip()[:40]!r} is not a number of tokens")
        found.append(length)
    if not found:
        raise UsageError(f"{path}: no lengths; give one a line")
    return found
