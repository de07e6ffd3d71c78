"""What known accelerators can do: peak operations and memory bandwidth, by their makers' data sheets."""

from dataclasses import dataclass

from thresher.errors import UsageError


@dataclass(frozen=True)
class Device:
    """One device. flops: dense bf16 operations a second; bandwidth: bytes a second; memory: bytes; source: a link."""

    name: str
    flops: float
    bandwidth: float
    memory: float
    source: str


_NVIDIA = "https://www.nvidia.com/en-us/data-center"
DEVICES = {
    device.name: device
    for device in (
        Device("a100", 312e12, 2.039e12, 80e9, f"{_NVIDIA}/a100/"),
        Device("h100", 989e12, 3.35e12, 80e9, f"{_NVIDIA}/h100/"),
        Device("h200", 989e12, 4.8e12, 141e9, f"{_NVIDIA}/h200/"),
        Device("b200", 2250e12, 8.0e12, 180e9, f"{_NVIDIA}/dgx-b200/"),
        Device("l40", 181e12, 0.864e12, 48e9, f"{_NVIDIA}/l40/"),
        Device(
            "4090", 165e12, 1.008e12, 24e9, "https://www.nvidia.com/en-us/geforce/graphics-cards/40-series/rtx-4090/"
        ),
    )
}


def device(name: str) -> Device:
    """Raises UsageError if it is not known."""
    if name not in DEVICES:
        raise UsageError(f"machine '{name}': there is this, {', '.join(DEVICES)}")
    return DEVICES[name]
