"""What the kernel tells of this process's control group, of version 1 or 2: limits, the highest use, and whom it killed
for want of memory."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def read_memory_files(version_2: str, version_1: str) -> Iterator[str]:
    """The texts of a file of the memory controller, of this process's group and then of those that it is in; of a
    container, which sees neither, its own.  version_2, version_1: the file's names."""
    for folder, is_version_1 in _memory_folders():
        with suppress(OSError):
            yield (folder / (version_1 if is_version_1 else version_2)).read_text(encoding="utf-8").strip()


def _memory_folders() -> Iterator[tuple[Path, bool]]:
    """(folder, whether it is of version 1) of each such group."""
    for line in _OWN.read_text(encoding="utf-8").splitlines() if _OWN.exists() else []:
        controllers, path = line.split(":", 2)[1:]
        if controllers and "memory" not in controllers.split(","):
            continue
        root = _CGROUPS / controllers if controllers else _CGROUPS
        folder = root / path.lstrip("/")
        for place in (folder, *folder.parents):
            yield place, bool(controllers)
            if place == root:
                break


def memory_limits() -> list[float]:
    """Bytes, of each group that has a limit."""
    texts = read_memory_files("memory.max", "memory.limit_in_bytes")
    return [float(text) for text in texts if text.isdigit()]


def room_below_limits() -> list[float]:
    """Bytes that may still be taken in each group that has a limit. Files in the kernel's cache that were not used of
    late count as free: it drops them."""
    found = []
    for folder, is_version_1 in _memory_folders():
        limit, usage = ("limit_in_bytes", "usage_in_bytes") if is_version_1 else ("max", "current")
        with suppress(OSError, ValueError):  # "max" is no number
            left = float((folder / f"memory.{limit}").read_text()) - float((folder / f"memory.{usage}").read_text())
            cached = "total_inactive_file " if is_version_1 else "inactive_file "
            lines = (folder / "memory.stat").read_text().splitlines()
            found.append(left + sum(float(line.split()[1]) for line in lines if line.startswith(cached)))
    return found


def highest_use() -> float | None:
    """Bytes that this process's group has held at once; None where the kernel does not tell."""
    texts = read_memory_files("memory.peak", "memory.max_usage_in_bytes")
    return next((float(text) for text in texts if text.isdigit()), None)


def count_oom_kills() -> int:
    """Processes of this process's group that the kernel has killed for want of memory so far; 0 where it does not
    tell."""
    for text in read_memory_files("memory.events", "memory.oom_control"):
        for line in text.splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
