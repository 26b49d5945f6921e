"""The watchdog of a rank: where no step ends within a bound, it leaves every thread's stack, and ends the process.

Ranks that wait for one another for ever hold their GPUs until somebody looks. Their own collectives give up after half
an hour, and say nothing about who was waited for.

Imports nothing heavy.
"""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from configs.supervision import FAILED, list_children_of
from trainer.process.disk_room import told_if_not_written
from trainer.process.json_lines import write_event
from trainer.process.outcome import outcome_file, write_failure

STACKS = "stacks"
LONGER = 6  # times the bound: for the first step and pictures, which may compile, for a save and for a rollback
_TICK_SECONDS = 1.0
_TO_WRITE_SECONDS = 10.0  # the run's disk may be what hangs


class _Watchdog:
    """The watch over one process.  limit: seconds without a beat.  stacks: open, for this rank's."""

    def __init__(self, run: Path, rank: int, limit: float, outcome: Path | None, stacks: TextIO) -> None:
        self._run, self._rank, self._limit, self._outcome, self._stacks = run, rank, limit, outcome, stacks
        self._beats, self._allowed, self._kinds = 0, limit, set[str]()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, kind: str) -> None:
        self._beats += 1  # first: what was waited under the longer bound does not count against a shorter one
        self._allowed = self._limit * (1 if kind in self._kinds else LONGER)
        self._kinds.add(kind)
        if self._beats == 1:
            self._thread.start()

    @contextmanager
    def longer(self) -> Iterator[None]:
        before, self._allowed = self._allowed, self._limit * LONGER
        try:
            yield
        finally:
            self._beats += 1
            self._allowed = before

    def end(self) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        seen, waited = 0, 0.0
        while not self._ended.wait(_TICK_SECONDS):
            allowed = self._allowed  # before the beats, which a shorter bound comes after
            # Counted in ticks of its own: a run that is suspended as a whole (scontrol suspend) is not late after it.
            seen, waited = self._beats, waited + _TICK_SECONDS if self._beats == seen else 0.0
            if waited >= allowed:
                self._leave(waited)

    def _leave(self, waited: float) -> None:
        siblings = _siblings()
        stopped = [pid for pid in siblings if _state(pid) == "T"]
        reason = (
            f"no step for {waited / 60:.3g} minutes (guard.step_timeout_minutes): the run hangs. What the ranks did "
            f"is in {self._run / STACKS}"
        )
        if stopped:
            reason += f"; processes {', '.join(map(str, stopped))} were stopped by a signal (SIGSTOP)"
        print(f"rank {self._rank}: {reason}", file=sys.stderr, flush=True)
        writing = threading.Thread(target=self._write, args=(reason,), daemon=True)
        writing.start()
        for pid in siblings:  # one of them may be unable to do it by itself; a stopped one has to run for it
            _send(pid, signal.SIGQUIT, signal.SIGCONT)
        writing.join(_TO_WRITE_SECONDS)
        time.sleep(_TICK_SECONDS)
        for pid in siblings:  # else the launcher waits ten minutes for one that hears nothing
            _send(pid, signal.SIGKILL)
        os._exit(FAILED)

    def _write(self, reason: str) -> None:
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        with told_if_not_written("the hang"):
            if write_failure(self._outcome, FAILED, reason, again="hang"):
                write_event(self._run, "hang", rank=self._rank, why=reason)


_watchdog: _Watchdog | None = None


@contextmanager
def watch_for_hangs(run: Path, minutes: float | None) -> Iterator[None]:
    """A time in which this process ends with code 1, resumable, once no beat has come for so many minutes; None: it
    waits for ever. Its stacks, and those of the other ranks here, are in <run>/stacks/rank-<n>.txt then.

    SIGQUIT leaves the stacks there at any moment, and changes nothing.
    """
    global _watchdog
    if minutes is None or not hasattr(faulthandler, "register"):  # Windows has no signal to ask others by
        yield
        return
    rank = int(os.environ.get("RANK", "0"))
    path = run / STACKS / f"rank-{rank:05d}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("a", encoding="utf-8") as stacks:
            faulthandler.register(signal.SIGQUIT, stacks, all_threads=True)
            _watchdog = _Watchdog(run, rank, 60 * minutes, outcome_file(), stacks)
            try:
                yield
            finally:
                _watchdog.end()
                _watchdog = None
                faulthandler.unregister(signal.SIGQUIT)
    finally:  # once it is closed: of a file that is still open NFS leaves another one (.nfs*), and so the folder
        with suppress(OSError):  # of the folder, where others' are there; of the disk that ended the run
            if path.stat().st_size == 0:
                path.unlink()
                path.parent.rmdir()


def beat(kind: str) -> None:
    """Tell the watchdog, if there is one, that something was done.  kind: the first of each may take LONGER."""
    if _watchdog is not None:
        _watchdog.beat(kind)


@contextmanager
def longer() -> Iterator[None]:
    """A time in which a beat may take LONGER times as long to come."""
    if _watchdog is None:
        yield
        return
    with _watchdog.longer():
        yield


def _siblings() -> list[int]:
    """Ids of the other ranks on this machine: what the same torch launcher has started."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return []
    return sorted(list_children_of(os.getppid()) - {os.getpid()})


def _state(pid: int) -> str:
    """Of a process, a letter: T is stopped. Empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _send(pid: int, *numbers: int) -> None:
    for number in numbers:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return
