"""The launcher of this rank, by whose death it ends: at once while it starts, after a save once there is one to make.

A rank that waits for others in init_process_group runs no Python, so the kernel ends it (PR_SET_PDEATHSIG). Left alone
it would wait for half an hour, hold its GPU, and on a fixed port join the ranks of the next start.

Imports nothing heavy: it is in force before torch is imported.
"""

import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from configs.supervision import FAILED, SIGNALS_CAN_BE_SENT, SUPERVISOR, list_children_of, stop_with_parent

_DEFAULT_SECONDS = 30.0  # that torch's launcher gives its ranks to end
# Processes that adopt those whose parent is dead; pid 1 is one anywhere.
_REAPERS = {"systemd", "slurmstepd", "containerd-shim", "conmon", "tini", "dumb-init", "docker-init", "catatonit"}
_TORCH = "pt_elastic"  # how torch's launcher calls itself, from whichever command
_LAUNCHERS = ("python", "accelerate", "torchrun", "deepspeed", _TORCH)

_parent: int | None = None
_is_training = False


def end_with_launcher() -> None:
    """From now on this process ends when its launcher dies, and now, if that is dead already: there is nothing to save
    yet. On Linux alone; on Windows `fluxfill train` starts it without one."""
    global _parent
    if not SIGNALS_CAN_BE_SENT:
        return
    _parent = os.getppid()
    stop_with_parent(at_once=True)
    if os.getppid() != _parent or _had_died(_parent, os.environ):
        told = f"fluxfill: the launcher of process {os.getpid()} is gone (its parent is {os.getppid()}), and so it ends"
        print(told, file=sys.stderr, flush=True)
        os._exit(FAILED)


def save_before_the_end() -> None:
    """From now on the launcher's death asks the run to stop, as TERM does, and `is_training` is true."""
    global _is_training
    _is_training = True
    if _parent is not None:
        stop_with_parent()
        if os.getppid() != _parent:
            os.kill(os.getpid(), signal.SIGTERM)


def is_training() -> bool:
    """Whether the run has something to save."""
    return _is_training


def has_lost_ranks() -> bool:
    """Whether torch's launcher has fewer processes than it started; False where the parent is another (a script around
    each rank has one child), and where nobody tells."""
    there = list_children_of(os.getppid())
    few = len(there) < int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return few and os.getpid() in there and _name_of(os.getppid()) == _TORCH


class PatienceWithOrphan:
    """How long this rank may live on without its launcher: as long as that would have waited for it to end."""

    def __init__(self) -> None:
        self._seconds = float(os.environ.get("PET_SHUTDOWN_TIMEOUT") or _DEFAULT_SECONDS)
        self._since: float | None = None

    def is_over(self) -> bool:
        """Asked again and again."""
        if _parent is None or os.getppid() == _parent:
            return False
        self._since = self._since or time.monotonic()
        return time.monotonic() - self._since > self._seconds


def _had_died(parent: int, environment: Mapping[str, str]) -> bool:
    """Whether the launcher had died before this process could ask to be told: its parent is whoever adopts orphans."""
    if not {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & environment.keys():
        return False  # started by something else, perhaps a shell
    if str(parent) == environment.get(SUPERVISOR):
        return True  # it started a launcher, not this process
    name = _name_of(parent)
    return name in _REAPERS or (parent == 1 and name != "" and not name.startswith(_LAUNCHERS))


def _name_of(process: int) -> str:
    """Empty where nobody tells."""
    try:
        return Path(f"/proc/{process}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
