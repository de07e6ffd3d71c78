"""What known accelerators can do: peak operations and memory bandwidth, by their makers' data sheets."""

import math
from dataclasses import dataclass

from thresher.errors import UsageError


@dataclass(frozen=True)
class Device:
    """One device, computing in one number format. flops: dense operations a second; bandwidth: bytes a second; memory:
    bytes; watts: most that it draws; source: a link."""

    name: str
    flops: float
    bandwidth: float
    memory: float
    watts: float
    source: str

    @property
    def intensity(self) -> float:
        """Operations that take as long as reading one byte: the I of Kinetics."""
        return self.flops / self.bandwidth


def _family(
    name: str, bf16: float, fp8: float | None, terabytes: float, gigabytes: float, watts: float, page: str
) -> tuple[Device, ...]:
    """A device in bf16 under its name, and in fp8 under `NAME-fp8`. Teraflops without sparsity."""
    rates = {name: bf16} | ({f"{name}-fp8": fp8} if fp8 else {})
    source = f"https://www.nvidia.com/en-us/{page}"
    return tuple(Device(n, rate * 1e12, terabytes * 1e12, gigabytes * 1e9, watts, source) for n, rate in rates.items())


DEVICES = {
    device.name: device
    for family in (
        _family("a100", 312, None, 2.039, 80, 400, "data-center/a100/"),
        _family("h100", 989, 1979, 3.35, 80, 700, "data-center/h100/"),
        _family("h200", 989, 1979, 4.8, 141, 700, "data-center/h200/"),
        _family("b200", 2250, 4500, 8.0, 180, 1000, "data-center/dgx-b200/"),
        _family("l40", 181, 362, 0.864, 48, 300, "data-center/l40/"),
        _family("l40s", 362, 733, 0.864, 48, 350, "data-center/l40s/"),
        _family("4090", 165, 330, 1.008, 24, 450, "geforce/graphics-cards/40-series/rtx-4090/"),
    )
    for device in family
}


def device(name: str) -> Device:
    """By name, or `GFLOP/s:GB/s`, as 950:46. Raises UsageError if it is neither."""
    if ":" in name:
        return _own(name)
    if name not in DEVICES:
        raise UsageError(f"device '{name}': there is this, {', '.join(DEVICES)}; or GFLOP/s:GB/s, as 950:46")
    return DEVICES[name]


def _own(text: str) -> Device:
    try:
        flops, bandwidth = (1e9 * float(part) for part in text.split(":"))
    except ValueError:
        flops = bandwidth = 0.0
    if not (flops > 0 and bandwidth > 0 and math.isfinite(flops + bandwidth)):
        raise UsageError(f"device '{text}': give GFLOP/s:GB/s above 0, as 950:46")
    return Device(text, flops, bandwidth, math.inf, math.nan, "")
