"""The processes that work on one cache, and which of them works on what: files in a folder that all of them see.

No lock of the filesystem is used (flock and the like are missing or wrong on many a cluster), only files that one
process writes and others list. A member is alive while its file in workers/ is touched; on its own machine also only
while its process runs, so after kill -9 the same command goes on at once. A claim is a file <what>@<member>:

    claim: list; if a living member has it, leave it. Else write one's own and list again: if a living other has one
    too, take one's own back (both do, and try again later). Claims of the dead are deleted on sight.

A member that was stopped for minutes (a suspended machine) may be taken for dead, and be alive again. Who plans, and
who clears up, removes the files of the dead: one that finds its own gone goes by a plan that others no longer go by, so
it stops. Otherwise it goes on; its claims, if somebody has deleted them, are no longer its own.

A name holds its owner, so nobody ever deletes what a living member has, nor needs to take anything over. Ages are told
by the file server's clock alone. Linux's NFS client forgets its copy of a folder when it makes a file in it, so the
second listing is the server's; were it not, a piece of work would be done twice, which is why work on a claim must be
published whole, under the same name and with the same bytes by whoever does it.
"""

import json
import os
import secrets
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from configs.errors import InputError
from data.storage.atomic_write import write_text_atomically
from data.storage.disk_full import DiskFull, raise_disk_full
from data.storage.stale_files import retry_if_stale

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 180.0  # above heartbeat, an NFS client's 60 s of cached times, and some patience with a busy server


class Evicted(InputError):
    """This process was, while it was stopped for minutes: others have gone on without it."""


_FOLDERS = ("workers", "claims", "failed")


@dataclass(frozen=True)
class WorkerInfo:
    """What a member's file says.  place: where `pid` is a process.  settings: of its job, by key.  plan: file, once
    it has one."""

    token: str
    host: str
    place: str
    pid: int
    process_start: int
    settings: dict
    plan: str | None = None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class WorkerGroup:
    """Membership of the workers at one folder, from `join`.  joined: the file server's time of it, in ns."""

    def __init__(self, folder: Path, settings: Mapping[str, object]) -> None:
        self.folder = folder
        self.token = secrets.token_hex(8)
        self._me = WorkerInfo(
            token=self.token,
            host=socket.gethostname(),
            place=_this_place(),
            pid=os.getpid(),
            process_start=_process_start(os.getpid()) or 0,
            settings=dict(settings),
        )
        self._file = self._file_of(self.token)
        self._write()
        self.joined = self._file.stat().st_mtime_ns

    def _file_of(self, token: str) -> Path:
        return self.folder / "workers" / f"{token}.json"

    def _write(self) -> None:
        for attempt in range(10):
            try:
                for name in _FOLDERS:
                    (self.folder / name).mkdir(parents=True, exist_ok=True)
                return write_text_atomically(self._file, json.dumps(asdict(self._me)))
            except FileNotFoundError:  # a member that takes itself for the last one clears up just now
                if attempt == 9:
                    raise

    # --- members

    def others(self) -> list[WorkerInfo]:
        """The other members that are alive."""
        return self._others(self.touch())

    def _others(self, now: int) -> list[WorkerInfo]:
        tokens = [name.removesuffix(".json") for name in _names_in(self.folder / "workers") if name.endswith(".json")]
        found = (self._living(token, now) for token in tokens if token != self.token)
        return [member for member in found if member]

    def _living(self, token: str, now: int) -> WorkerInfo | None:
        file = self._file_of(token)
        try:
            text = retry_if_stale(file, lambda: file.read_text(encoding="utf-8"))  # it is replaced by `announce_plan`
            member = WorkerInfo(**json.loads(text))
            age = now - file.stat().st_mtime_ns
        except (FileNotFoundError, ValueError, TypeError):
            return None
        here = member.place == self._me.place and member.place != ""
        if here and _process_start(member.pid) != member.process_start:
            return None
        return member if age < STALE_SECONDS * 1e9 else None

    def is_confirmed_alive(self, other: WorkerInfo) -> bool:
        """Whether a member is known to be alive, not only not known to be dead: it runs here, or its file was touched
        since this process joined."""
        if other.place == self._me.place and other.place != "":
            return True  # else it were not among the others
        try:
            return self._file_of(other.token).stat().st_mtime_ns > self.joined
        except FileNotFoundError:
            return False

    def refuse_other_settings(self, other: WorkerInfo) -> None:
        """Raises InputError, naming the keys, if another member works by other settings."""
        mine, theirs = self._me.settings, other.settings
        if mine and theirs and not mine.keys() & theirs.keys():
            raise InputError(f"data.cache {self.folder.parent}: {other} is at work in it. Wait for it or stop it.")
        differing = [key for key in sorted(mine.keys() | theirs.keys()) if mine.get(key) != theirs.get(key)]
        if differing:
            listing = "\n  ".join(f"{key} is {mine.get(key)!r} here, {theirs.get(key)!r} there" for key in differing)
            raise InputError(
                f"data.cache {self.folder.parent}: another job is encoding into it by other settings ({other}):\n  "
                f"{listing}\nWait for it or stop it, or give this config a data.cache of its own."
            )

    def touch(self) -> int:
        """Say that this process is alive; returns the file server's time in ns. Raises Evicted."""
        try:
            os.utime(self._file)
            return self._file.stat().st_mtime_ns
        except FileNotFoundError:
            raise self._evicted() from None

    def _evicted(self) -> Evicted:
        return Evicted(
            f"data.cache {self.folder.parent}: this worker ({self._me}) was silent for minutes and was taken for dead; "
            "others have gone on without it. Start the same command again: it does what is left."
        )

    def announce_plan(self, plan: str) -> None:
        """Tell the others which plan this one works by. Raises Evicted."""
        self.touch()
        self._me = replace(self._me, plan=plan)
        self._write()

    def evict_dead(self) -> None:
        """Have members that are taken for dead stop, should they be alive again."""
        now = self.touch()
        for name in _names_in(self.folder / "workers"):
            if name.endswith(".json") and not self._living(name.removesuffix(".json"), now):
                (self.folder / "workers" / name).unlink(missing_ok=True)

    # --- claims

    def claim(self, what: str) -> bool:
        """Whether `what` ([A-Za-z0-9_.-]+) is this process's own from now on. False: a living other has it.

        Raises Evicted.
        """
        self.touch()
        if self.holder(what):
            return False
        mine = self._claim_file(what)
        with raise_disk_full(mine):
            try:
                mine.touch()
            except FileNotFoundError:  # the folder went with a member that took itself for the last one
                mine.parent.mkdir(exist_ok=True)
                mine.touch()
        if self.holder(what):
            mine.unlink(missing_ok=True)
            return False
        return True

    def holder(self, what: str) -> WorkerInfo | None:
        """The living other that claims something."""
        return next((member for _, member in self._claims(f"{what}@")), None)

    def claims_of_others(self, prefix: str) -> set[str]:
        """What other living workers claim, of all whose names begin with `prefix`."""
        return {what for what, _ in self._claims(prefix)}

    def _claims(self, prefix: str) -> Iterator[tuple[str, WorkerInfo]]:
        """(what, who) of the claims of living others whose files begin so. Deletes the claims of the dead."""
        names = [name for name in _names_in(self.folder / "claims") if name.startswith(prefix)]
        owners = {name.rpartition("@")[2] for name in names} - {self.token}
        now = self.touch() if owners else 0
        members = {token: self._living(token, now) for token in owners}
        for name in names:
            what, _, token = name.rpartition("@")
            if token in members and (member := members[token]):
                yield what, member
            elif token in members:
                (self.folder / "claims" / name).unlink(missing_ok=True)

    def still_holds(self, what: str) -> bool:
        """Whether a claim is still this process's own: not after it was taken for dead. Raises Evicted."""
        self.touch()
        return self._claim_file(what).exists()

    def require_claim(self, what: str) -> None:
        """Raises Evicted if a claim is no longer this process's own."""
        if not self.still_holds(what):
            raise self._evicted()

    def release(self, what: str) -> None:
        self._claim_file(what).unlink(missing_ok=True)

    def _claim_file(self, what: str) -> Path:
        return self.folder / "claims" / f"{what}@{self.token}"

    # --- failures

    def report_failure(self, what: str, problem: str) -> None:
        """Tell the others that something cannot be done, so that not each of them finds out by itself."""
        file = self.folder / "failed" / f"{what}.txt"
        with suppress(DiskFull):  # then each does
            file.parent.mkdir(exist_ok=True)  # it went with a member that took itself for the last one
            write_text_atomically(file, problem)

    def failure(self, what: str) -> str | None:
        """A problem reported since this process joined. What was wrong before may have been mended."""
        file = self.folder / "failed" / f"{what}.txt"
        try:
            text = retry_if_stale(file, lambda: file.read_text(encoding="utf-8"))
            return text if file.stat().st_mtime_ns > self.joined else None
        except FileNotFoundError:
            return None

    # --- the end

    def leave(self) -> None:
        """Give everything back; the last one alive clears up behind all of them."""
        try:
            now = self.touch()
        except Evicted:
            return  # by one that has cleared up, or will
        self._file.unlink(missing_ok=True)
        for name in _names_in(self.folder / "claims"):
            token = name.rpartition("@")[2]
            if token == self.token or not self._living(token, now):
                (self.folder / "claims" / name).unlink(missing_ok=True)
        if self._others(now):  # looked up after one's own end: of two that leave together, one at least is the last
            return
        # Files one by one, folders only if they are empty: what a member that joins just now has written stays.
        for folder in [*(self.folder / name for name in _FOLDERS), self.folder]:
            for name in _names_in(folder):
                owner = name.removesuffix(".json").rpartition("@")[2]
                if folder.name not in ("workers", "claims") or not self._living(owner, now):
                    with suppress(OSError):  # a folder, or gone with another that clears up
                        (folder / name).unlink()
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def join(folder: Path, settings: Mapping[str, object]) -> Iterator[WorkerGroup]:
    """Be one of the workers at `folder` (made if need be), alive until the end of the block.

    settings: what members must agree in, as JSON.  Raises InputError if a living member has others, or if the folder
    cannot be written to.
    """
    try:
        group = WorkerGroup(folder, json.loads(json.dumps(settings)))
    except DiskFull:
        for empty in [*(folder / name for name in _FOLDERS), folder]:
            with suppress(OSError):  # others are there
                empty.rmdir()
        raise
    except OSError as error:
        raise InputError(
            f"data.cache {folder.parent}: cannot be written to ({error.strerror}). "
            "Point data.cache at a folder that can."
        ) from error
    left = threading.Event()

    def beat() -> None:
        while not left.wait(HEARTBEAT_SECONDS):
            with suppress(OSError, Evicted):  # a server that is away for a moment, the next beat tells; the work
                group.touch()  # itself finds out that it was taken for dead

    heart = threading.Thread(target=beat, name="heartbeat", daemon=True)
    heart.start()
    try:
        for other in group.others():
            group.refuse_other_settings(other)
        yield group
    finally:
        left.set()
        heart.join()
        group.leave()


def _names_in(folder: Path) -> list[str]:
    try:
        return retry_if_stale(folder, lambda: os.listdir(folder))
    except FileNotFoundError:
        return []


def _this_place() -> str:
    """Where a process number means one process: this start of this machine's kernel, and this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux: only heartbeats tell
        return ""


def _process_start(pid: int) -> int | None:
    """When a running process started, in the kernel's ticks; None if there is none. Numbers are given out again."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])
