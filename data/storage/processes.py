"""Processes by name: where a process id means one process, and whether that one still runs."""

import os
from pathlib import Path


def this_place() -> str:
    """Where a process id means one process: this start of this machine's kernel, and this container. "" where that
    cannot be told (no Linux)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def process_start(pid: int) -> int | None:
    """When a running process started, in the kernel's ticks; None if there is none, or it is hidden. Numbers are given
    out again."""
    fields = _stat(pid)
    return None if fields is None or fields[0] in "ZX" else int(fields[19])


def parent_of(pid: int) -> int | None:
    """The id of a running process's parent; None if there is no such process, or it is hidden."""
    fields = _stat(pid)
    return None if fields is None else int(fields[1])


def is_hidden(pid: int) -> bool:
    """Whether a process of this place runs of which /proc tells nothing, so that it may be any: another user's, where
    /proc is mounted with hidepid."""
    if _stat(pid) is not None:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/<pid>/stat behind the name: state, parent, ..."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
