"""How much memory this process may still take: what the machine has free, and what its control groups leave it."""

from collections.abc import Iterator
from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")


def available_memory(root: Path = _CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes. Containers see the whole machine's memory but may not take it."""
    left = psutil.virtual_memory().available
    for limit, used in _limits(root, membership):
        left = min(left, max(limit - used, 0))
    return int(left)


def _limits(root: Path, membership: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) bytes of every control group above this process that has a limit, versions 2 and 1."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        folder = base / path.lstrip("/")
        for group in (folder, *folder.parents):
            limit, used = (_number(group / name) for name in names)
            if limit is not None and used is not None:
                yield limit, used - _cached(group / "memory.stat")
            if group == base:
                break


def _cached(file: Path) -> int:
    """Bytes of files in memory, which the kernel gives back when they are needed."""
    try:
        entries = dict(line.split() for line in file.read_text().splitlines())
        return int(entries.get("total_inactive_file", entries.get("inactive_file", 0)))
    except (OSError, ValueError):
        return 0


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # no such group here, or "max"
        return None
