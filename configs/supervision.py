"""Exit codes, the signals that stop a run, and who ends with whom: alike in a supervisor and what it starts."""

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.errors import AlreadyRunning, InputError, StorageFailed

FAILED = 1  # anything but the following
BAD_INPUT = 2
ALREADY_RUNNING = 3  # the run folder belongs to another start, which lives
STOPPED = 75  # on purpose; the same command line goes on


def exit_code(error: InputError) -> int:
    """Of a program that ends with this error."""
    if isinstance(error, StorageFailed):
        return FAILED
    return ALREADY_RUNNING if isinstance(error, AlreadyRunning) else BAD_INPUT


# Windows hands no signal to another process: it has no USR1 and USR2, and Ctrl-C reaches all processes of a console.
SIGNALS_CAN_BE_SENT = hasattr(signal, "SIGUSR1")
_NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2") if SIGNALS_CAN_BE_SENT else ("SIGTERM", "SIGINT")
STOP_SIGNALS: tuple[signal.Signals, ...] = tuple(getattr(signal, name) for name in _NAMES)

SUPERVISOR = "FLUXFILL_SUPERVISOR"  # variable: the process id of who has started the launcher

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def _find_prctl() -> Callable[[int, int], int] | None:
    try:
        return getattr(ctypes.CDLL(None), "prctl", None)
    except TypeError:  # Windows
        return None


_PRCTL = _find_prctl()  # now: stop_with_parent also runs between fork and exec


def stop_with_parent(*, at_once: bool = False) -> None:
    """From now on a TERM for this process when its parent dies, however it dies (kill -9, a closed terminal); with
    `at_once` a KILL. Only Linux does that; elsewhere nothing changes."""
    if _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGKILL if at_once else signal.SIGTERM)


def stop_with_starter(starter: int) -> None:
    """`stop_with_parent` between fork and exec, for a child of process `starter`: at once, if that is dead already."""
    stop_with_parent()
    if os.getppid() != starter:
        os._exit(FAILED)


def hold_stop_signals() -> None:
    """From now on stop signals wait until somebody listens (`launch/supervise.py`), also where they were ignored."""
    if SIGNALS_CAN_BE_SENT:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


@contextmanager
def heard_stop_signals() -> Iterator[None]:
    """A time in which stop signals reach their handlers, those that were held first."""
    held = signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS) if SIGNALS_CAN_BE_SENT else ()
    try:
        yield
    finally:
        if SIGNALS_CAN_BE_SENT:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)


def adopt_orphans() -> None:
    """From now on processes that this one's children leave behind are its own children; on Linux alone."""
    if _PRCTL is not None:
        _PRCTL(_PR_SET_CHILD_SUBREAPER, 1)


def list_children() -> set[int]:
    """Ids of this process's children. Empty where there is no /proc."""
    return list_children_of(os.getpid())


def list_children_of(process: int) -> set[int]:
    """Ids of a process's children. Empty where there is no /proc."""
    children = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1]
        except OSError:  # it has ended
            continue
        if int(parent) == process:
            children.add(int(stat.parent.name))
    return children


def wait_for_orphans(others: set[int], *, seconds: float) -> None:
    """Return when no child is left but `others`; after so many seconds those that are left are killed."""
    deadline = time.monotonic() + seconds
    while orphans := list_children() - others:
        for orphan in orphans:
            if time.monotonic() > deadline:
                os.kill(orphan, signal.SIGKILL)
            os.waitpid(orphan, os.WNOHANG)
        time.sleep(0.1)
