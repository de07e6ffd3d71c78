"""How many processors this process may use, by its affinity and the quotas of its control groups."""

import math
import os
from pathlib import Path


def available_cores(root: Path = Path("/")) -> int:
    """At least 1. root: where /proc and /sys are looked for."""
    quotas = [q for directory in _cpu_groups(root) if (q := _quota(directory)) is not None]
    return max(1, min([len(os.sched_getaffinity(0)), *map(math.ceil, quotas)]))


def _cpu_groups(root: Path) -> list[Path]:
    """Directories of this process's control groups that may limit processors, with all their parents."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        mounts = ["sys/fs/cgroup", "sys/fs/cgroup/unified"] if not controllers else ["sys/fs/cgroup/cpu"]
        if controllers and "cpu" not in controllers.split(","):
            continue
        for mount in mounts:
            # Inside a container the path may be the host's: then only the mount itself is there.
            group = root / mount / path.lstrip("/")
            found += [group, *(p for p in group.parents if p.is_relative_to(root / mount))]
    return found


def _quota(directory: Path) -> float | None:
    """Processors' worth of time that a control group grants (version 2, then 1); None for no limit."""
    try:
        limit, period = (directory / "cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        pass
    try:
        limit, period = ((directory / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return None if int(limit) < 0 else int(limit) / int(period)
    except (OSError, ValueError):
        return None
