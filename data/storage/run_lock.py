"""The owner of a run folder: the one start of a run that may write there.

    owner-<n>.json    who it is. The highest n is the owner: the fencing token, one more with each of them

A new owner makes its file by link, which fails where the name is taken, on NFS too; then it looks whether its number is
the highest, and deletes the lower ones. So of many that start at once one wins, nobody deletes what a living owner has,
and one that was taken for dead finds its own file gone. The last file stays, marked as ended, so that numbers grow.

Whether an owner lives: on its own machine its processes are looked up, so after kill -9 the same command goes on at
once. Elsewhere its file's time must move, a heartbeat: by the file server's clock alone, as machines' clocks differ. A
job that SLURM has started again was ended by SLURM before. `fluxfill train` or the batch script takes the folder,
before anything else, and names it to its rank 0 ($FLUXFILL_OWNER), which joins; without them rank 0 takes it.
"""

import errno
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from configs.errors import AlreadyRunning, InputError, StorageFailed, is_of_storage
from data.storage.atomic_write import fsync_folder, part_path, write_text_atomically
from data.storage.processes import is_hidden, parent_of, process_start, this_place
from data.storage.retry import retry_if_stale

VARIABLE = "FLUXFILL_OWNER"
HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 180.0  # above heartbeat, an NFS client's 60 s of cached times, and some patience with a busy server
# For one whose launcher is gone: its ranks may be saving. Above what `fluxfill train` gives them for it, 600 s.
END_SECONDS = 660.0
_LEASE_SECONDS = STALE_SECONDS / 3  # after a heartbeat nobody can have taken the folder for so long

_NAME = re.compile(r"owner-(\d+)\.json")


@dataclass(frozen=True)
class Process:
    """A process of an owner.  place: where `pid` is one.  start: in the kernel's ticks.  parent: of the launcher with
    which it ends; 0: it outlives whoever started it."""

    what: str
    host: str
    place: str
    pid: int
    start: int
    parent: int

    def is_here(self) -> bool:
        """Whether this machine tells whether it runs."""
        return self.place == this_place() != "" and not is_hidden(self.pid)

    def runs(self) -> bool:
        """Of a process that is here."""
        return process_start(self.pid) == self.start

    def is_orphan(self) -> bool:
        """Of one that runs here: whether its launcher is gone."""
        return self.parent not in (0, parent_of(self.pid))


@dataclass(frozen=True)
class Owner:
    """The content of an owner's file.  job, restarts: of SLURM, else "" and 0.  meets: address and port of its ranks,
    once they are known.  since: for people."""

    id: str
    job: str
    restarts: int
    since: str
    processes: tuple[Process, ...]
    meets: str = ""
    ended: bool = False

    def __str__(self) -> str:
        job = f"job {self.job}, " if self.job else ""
        process = self.processes[-1]
        return f"{job}{process.what}, process {process.pid} on {process.host}, since {self.since}"


def _process(what: str, pid: int, parent: int = 0) -> Process:
    return Process(what, socket.gethostname(), this_place(), pid, process_start(pid) or 0, parent)


def _rank_0(environment: Mapping[str, str]) -> tuple[Process, ...]:
    """This process, behind torch's launcher, if that is its parent: it ends the other ranks when rank 0 is gone."""
    rank = _process("rank 0", os.getpid(), os.getppid())
    return (_process("launcher", os.getppid()), rank) if "TORCHELASTIC_RUN_ID" in environment else (rank,)


class RunLock:
    """A run folder that is this process's own, until `end`."""

    def __init__(self, folder: Path, number: int, owner: Owner, *, joined: bool) -> None:
        self._folder, self._number, self.owner, self._joined = folder, number, owner, joined
        self._file = _file_of(folder, number)
        self._beat_time = _now()
        self._over = threading.Event()

    def start_heartbeat(self, lost: Callable[[AlreadyRunning], None]) -> None:
        """Show from now on that the owner lives.  lost: called, in a thread, once another has taken the folder."""

        def beat() -> None:
            while not self._over.wait(HEARTBEAT_SECONDS):
                try:
                    self._touch()
                except AlreadyRunning as error:
                    return lost(error)
                except (StorageFailed, OSError):
                    pass  # a server that is away for a moment: the next beat tells

        threading.Thread(target=beat, name="run-owner", daemon=True).start()

    def _touch(self) -> None:
        try:
            os.utime(self._file)
            self._beat_time = _now()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                raise
            self.refuse_loss()
            raise

    def require(self) -> None:
        """Raises AlreadyRunning if another may have taken the folder: before every write that matters. Looks at the
        disk only where no heartbeat was heard lately (a machine that was suspended)."""
        if _now() - self._beat_time > _LEASE_SECONDS:
            self.refuse_loss()

    def refuse_loss(self) -> None:
        """Raises AlreadyRunning if another has taken the folder; StorageFailed or OSError if its disk does not tell."""
        number, owner = _newest(self._folder)
        if number > self._number or (owner is not None and owner.id != self.owner.id):
            raise AlreadyRunning(
                f"{self._folder}: this start of the run was silent for minutes and was taken for dead; the folder "
                f"belongs to {owner} now. It stops here, and writes nothing more."
            )

    def end(self) -> None:
        """Give the folder back; one that has only joined leaves that to who took it, if that lives."""
        self._over.set()
        if self._joined and not (self.owner.processes[0].is_here() and not self.owner.processes[0].runs()):
            return
        with suppress(InputError, OSError):  # lost, or a server that is away: then the processes tell, or silence
            self.refuse_loss()
            write_text_atomically(self._file, _text_of(replace(self.owner, ended=True)))


def take_run_folder(
    folder: Path,
    environment: Mapping[str, str],
    *,
    supervisor: str | None = None,
    say: Callable[[str], None] | None = None,
) -> RunLock:
    """The folder as this process's own; made if it is not there.

    supervisor: what this process is called, where it is one; else it is rank 0.  Joins the owner that $FLUXFILL_OWNER
    names.  An owner that is dead is replaced, and `say` is told; one elsewhere is watched for up to three minutes, one
    whose ranks still save is waited for.  Raises AlreadyRunning if one lives, before anything is written; InputError if
    the folder cannot be written to, StorageFailed if its disk fails.
    """
    say = say or _print
    processes = _rank_0(environment) if supervisor is None else (_process(supervisor, os.getpid()),)
    watched: dict[int, tuple[int, float]] = {}
    told, deadline = False, time.monotonic() + END_SECONDS
    while True:
        with _told_if_unwritable(folder):
            number, owner = _newest(folder)
        if owner is not None and not owner.ended and owner.id == environment.get(VARIABLE):
            return _join(folder, number, owner, processes, environment)
        fate = "dead" if number == 0 else _fate(folder, number, owner, environment, watched)
        if fate == "lives" or (fate != "dead" and time.monotonic() > deadline):
            raise AlreadyRunning(
                f"{folder}: belongs to another start of this run ({owner or 'of unknown name'}). Wait for it, or stop "
                "it; a run of its own takes another run.name."
            )
        if fate == "dead":
            with _told_if_unwritable(folder):
                lock = _take(folder, number + 1, processes, environment)
            if lock is not None:
                if owner is not None and not owner.ended:
                    say(f"{folder}: taken over from {owner}, which is gone")
                return lock
            continue
        if not told:
            why = "whose launcher is gone: its ranks may be saving" if fate == "ends" else "which may be gone"
            say(f"{folder}: waiting for {owner}, {why}")
            told = True
        time.sleep(1)


@contextmanager
def own_run_folder(folder: Path, environment: Mapping[str, str], *, supervisor: str) -> Iterator[RunLock]:
    """`take_run_folder` for a supervisor, until the end of the block. If another takes it meanwhile, rank 0 ends by
    itself; `RunLock.refuse_loss` tells."""
    lock = take_run_folder(folder, environment, supervisor=supervisor)
    lock.start_heartbeat(lambda _: None)
    try:
        yield lock
    finally:
        lock.end()


def is_of_another(folder: Path, environment: Mapping[str, str]) -> bool:
    """Whether a run folder belongs to another start than this one: for ranks that own nothing. They know their owner by
    its name, or by where they meet: rank 0 of a start whose owner is gone has taken the folder under a new name."""
    _, owner = _newest(folder)
    if owner is None or owner.ended or owner.id == environment.get(VARIABLE):
        return False
    meets = _meets(environment)
    if VARIABLE in environment:
        return not meets or owner.meets != meets
    return owner.meets not in ("", meets)  # "": an owner whose ranks have not met yet


def _join(
    folder: Path, number: int, owner: Owner, processes: tuple[Process, ...], environment: Mapping[str, str]
) -> RunLock:
    owner = replace(owner, processes=(owner.processes[0], *processes), meets=_meets(environment))
    with _told_if_unwritable(folder):
        write_text_atomically(_file_of(folder, number), _text_of(owner))
    return RunLock(folder, number, owner, joined=True)


def _take(folder: Path, number: int, processes: tuple[Process, ...], environment: Mapping[str, str]) -> RunLock | None:
    """The lock of this number; None if another was faster."""
    owner = Owner(
        id=secrets.token_hex(8),
        job=environment.get("SLURM_JOB_ID", ""),
        restarts=_restarts(environment),
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
        processes=processes,
        meets=_meets(environment),
    )
    folder.mkdir(parents=True, exist_ok=True)
    file = _file_of(folder, number)
    make_file(file, _text_of(owner))
    newest, its_owner = _newest(folder)
    if its_owner is None or its_owner.id != owner.id:
        if newest > number:  # of a listing that was old, a number that had been given before
            file.unlink(missing_ok=True)
        return None
    for lower in _numbers(folder):
        if lower < number:
            _file_of(folder, lower).unlink(missing_ok=True)
    fsync_folder(folder)
    return RunLock(folder, number, owner, joined=False)


def make_file(file: Path, text: str) -> None:
    """Write a file unless there is one of the name."""
    temporary = part_path(file)
    try:
        with temporary.open("x", encoding="utf-8") as opened:
            opened.write(text)
            opened.flush()
            os.fsync(opened.fileno())
        try:
            os.link(temporary, file)
        except FileExistsError:
            pass  # by another; or by this process, whose question NFS has asked twice: its content tells
        except OSError:  # a filesystem without links
            with suppress(FileExistsError), file.open("x", encoding="utf-8") as opened:
                opened.write(text)
    finally:
        temporary.unlink(missing_ok=True)


def _fate(
    folder: Path,
    number: int,
    owner: Owner | None,
    environment: Mapping[str, str],
    watched: dict[int, tuple[int, float]],
) -> Literal["lives", "ends", "dead", "unclear"]:
    """What has become of an owner.  watched: number -> (its file's time, when that was first seen)."""
    if owner is not None and (owner.ended or _was_requeued(owner, environment)):
        return "dead"
    processes = owner.processes if owner is not None else ()
    here = [process for process in processes if process.is_here()]
    alive = [process for process in here if process.runs()]
    if processes and len(here) == len(processes):
        if not alive or (alive == [processes[0]] and alive[0].what == "launcher" and alive[0].pid == os.getppid()):
            return "dead"  # of a launcher that starts its ranks again, this one's parent: so is the rank 0 before
        return "ends" if len(alive) < len(here) or any(process.is_orphan() for process in alive) else "lives"
    try:
        with _file_of(folder, number).open("rb") as file:  # opened, so that NFS asks its server
            modified = os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return "unclear"  # another takes it just now
    first, seen = watched.setdefault(number, (modified, time.monotonic()))
    if modified != first:
        return "lives"
    silent = time.monotonic() - seen >= STALE_SECONDS or _server_time(folder) - modified >= STALE_SECONDS * 1e9
    return "unclear" if not silent else "ends" if alive else "dead"


def _was_requeued(owner: Owner, environment: Mapping[str, str]) -> bool:
    return owner.job == environment.get("SLURM_JOB_ID") and owner.restarts < _restarts(environment)


def _server_time(folder: Path) -> int:
    """Of the machine that the folder is on, in ns: of a file that is made there and goes again."""
    probe = part_path(folder / "owner.time")
    with _told_if_unwritable(folder):
        probe.touch()
        try:
            return probe.stat().st_mtime_ns
        finally:
            probe.unlink()


@contextmanager
def _told_if_unwritable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise (StorageFailed if is_of_storage(error) else InputError)(
            f"{folder}: the run's folder cannot be written to ({error.strerror}). Make room or give run.dir another "
            "place."
        ) from error


def _newest(folder: Path) -> tuple[int, Owner | None]:
    """(number, owner) of the highest number, (0, None) without one; None too for a file that cannot be understood."""
    while True:
        number = max(_numbers(folder), default=0)
        if number == 0:
            return 0, None
        file = _file_of(folder, number)
        try:
            told = json.loads(retry_if_stale(file, partial(file.read_text, encoding="utf-8")))
            processes = tuple(Process(**process) for process in told.pop("processes"))
            return number, Owner(**told, processes=processes)
        except FileNotFoundError:  # its successor has just deleted it
            continue
        except (ValueError, TypeError, KeyError):
            return number, None


def _numbers(folder: Path) -> list[int]:
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [int(match[1]) for name in names if (match := _NAME.fullmatch(name))]


def _file_of(folder: Path, number: int) -> Path:
    return folder / f"owner-{number}.json"


def _text_of(owner: Owner) -> str:
    return json.dumps(asdict(owner), indent=1) + "\n"


def _meets(environment: Mapping[str, str]) -> str:
    address, port = environment.get("MASTER_ADDR", ""), environment.get("MASTER_PORT", "")
    return f"{address}:{port}" if port else ""


def _restarts(environment: Mapping[str, str]) -> int:
    return int(environment.get("SLURM_RESTART_COUNT") or 0)


def _now() -> float:
    """Seconds, those in which the machine was suspended too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _print(text: str) -> None:
    print(f"fluxfill: {text}", file=sys.stderr, flush=True)
