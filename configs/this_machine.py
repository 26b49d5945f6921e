"""What this machine has for a process: cores and memory."""

import os
from pathlib import Path

from configs.cgroup import room_below_limits

_MEMINFO = Path("/proc/meminfo")


def count_cores() -> int:
    """Cores that the scheduler lets this process run on: fewer than the machine's under taskset, SLURM or a cpuset.

    A container's quota of time (`docker --cpus`) is not among it. All of the machine's where a system does not tell
    (Windows, macOS).
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int | None:
    """The machine's memory. None where a system does not tell (Windows)."""
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def available_memory_bytes() -> float | None:
    """Memory that a process can still take without another being swapped out, or killed by its control group's limit.
    None where a system does not tell (Windows, macOS)."""
    if not _MEMINFO.exists():
        return None
    lines = dict(line.split(":", 1) for line in _MEMINFO.read_text(encoding="utf-8").splitlines())
    return min(float(lines["MemAvailable"].split()[0]) * 1024, *room_below_limits(), float("inf"))
