"""The workers on one cache, and their claims: files in a folder that all of them see.

No lock of the filesystem is used (flock and the like are missing or wrong on many a cluster), only files that one
process writes and others list. A worker is alive while its file in workers/ is touched; on its own machine also only
while its process runs, so after kill -9 the same command goes on at once. A claim is a file <what>@<worker>:

    claim: list; if a living worker has it, leave it. Else write one's own and list again: if a living other has one
    too, take one's own back (both do, and try again later). Claims of the dead are deleted on sight.

A worker that was stopped for minutes (a suspended machine) may be taken for dead, and be alive again. Who plans, and
who clears up, removes the files of the dead: one that finds its own gone goes by a plan that others no longer go by, so
it stops. Otherwise it goes on; its claims, if somebody has deleted them, are no longer its own.

A name holds its owner, so nobody ever deletes what a living worker has, nor needs to take anything over. Ages are told
by the file server's clock alone. Linux's NFS client forgets its copy of a folder when it makes a file in it, so the
second listing is the server's; were it not, a piece of work would be done twice, which is why work on a claim must be
published atomically, under the same name and with the same bytes by whoever does it.

The last worker removes all of it. One that is killed while nobody else is there leaves its files to the next comer.
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

from pydantic import TypeAdapter

from configs.errors import InputError, StorageFailed, is_of_storage, os_errors_named
from data.storage.atomic_write import write_text_atomically
from data.storage.disk_full import DiskFull, raise_disk_full
from data.storage.processes import is_hidden, process_start, this_place
from data.storage.retry import retry_if_stale

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 180.0  # above heartbeat, an NFS client's 60 s of cached times, and some patience with a busy server


_FOLDERS = ("workers", "claims", "failed")
_PLAN = "plan-"


class Evicted(InputError):
    """This worker was stopped for minutes and taken for dead: others have gone on without it."""


@dataclass(frozen=True)
class WorkerInfo:
    """The content of a worker's file.  place: where `pid` is a process.  settings: of its job, by key.  plan: file, if
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


_INFO = TypeAdapter(WorkerInfo)


class WorkerGroup:
    """One worker's membership of those at a folder, from `join`.  joined: the file server's time of it, in ns."""

    def __init__(self, folder: Path, settings: Mapping[str, object]) -> None:
        self.folder = folder
        self.token = secrets.token_hex(8)
        self._me = WorkerInfo(
            token=self.token,
            host=socket.gethostname(),
            place=this_place(),
            pid=os.getpid(),
            process_start=process_start(os.getpid()) or 0,
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
            except FileNotFoundError:  # a worker that takes itself for the last one clears up just now
                if attempt == 9:
                    raise

    # --- workers

    def others(self) -> list[WorkerInfo]:
        """The other workers that are alive."""
        return self._others(self.touch())

    def _others(self, now: int) -> list[WorkerInfo]:
        tokens = [name.removesuffix(".json") for name in _names_in(self.folder / "workers") if name.endswith(".json")]
        found = (self._living(token, now) for token in tokens if token != self.token)
        return [other for other in found if other]

    def _living(self, token: str, now: int) -> WorkerInfo | None:
        file = self._file_of(token)
        cure = " It says who is at work in data.cache: have it made readable to you, or point that at another folder."
        with os_errors_named(file, "read", path_cure=cure):
            try:
                worker = _INFO.validate_json(retry_if_stale(file, file.read_bytes))  # `announce_plan` replaces it
                age = now - file.stat().st_mtime_ns
            except (FileNotFoundError, ValueError):
                return None
        if self._is_here(worker) and process_start(worker.pid) != worker.process_start:
            return None
        return worker if age < STALE_SECONDS * 1e9 else None

    def _is_here(self, worker: WorkerInfo) -> bool:
        """Whether this machine tells whether a worker runs."""
        return worker.place == self._me.place and worker.place != "" and not is_hidden(worker.pid)

    def is_confirmed_alive(self, other: WorkerInfo) -> bool:
        """Whether another worker is known to be alive, not only not known to be dead: it runs here, or its file was
        touched since this process joined."""
        if self._is_here(other):
            return True  # else it were not among the others
        try:
            return self._file_of(other.token).stat().st_mtime_ns > self.joined
        except FileNotFoundError:
            return False

    def refuse_other_settings(self, other: WorkerInfo) -> None:
        """Raises InputError, naming the keys, if another worker goes by other settings."""
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
        """The heartbeat of this worker. Returns the file server's time in ns. Raises Evicted."""
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

    @property
    def plan_path(self) -> Path:
        """The file for a plan of this worker's, which the last one removes unless its maker lives."""
        return self.folder / f"{_PLAN}{self.token}"

    def announce_plan(self, plan: str) -> None:
        """Tell the others which plan (its file's name) this one goes by. Raises Evicted."""
        self.touch()
        self._me = replace(self._me, plan=plan)
        self._write()

    def evict_dead(self) -> None:
        """Remove the files of dead workers: one that is alive after all stops, as it finds its own gone."""
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
            except FileNotFoundError:  # the folder went with a worker that took itself for the last one
                mine.parent.mkdir(exist_ok=True)
                mine.touch()
        if self.holder(what):
            mine.unlink(missing_ok=True)
            return False
        return True

    def holder(self, what: str) -> WorkerInfo | None:
        """The living other that claims `what`."""
        return next((other for _, other in self._claims(f"{what}@")), None)

    def claims_of_others(self, prefix: str) -> set[str]:
        """What other living workers claim, of all whose names begin with `prefix`."""
        return {what for what, _ in self._claims(prefix)}

    def _claims(self, prefix: str) -> Iterator[tuple[str, WorkerInfo]]:
        """(what, who) of the claims of living others whose files begin so. Deletes the claims of the dead."""
        names = [name for name in _names_in(self.folder / "claims") if name.startswith(prefix)]
        owners = {name.rpartition("@")[2] for name in names} - {self.token}
        now = self.touch() if owners else 0
        others = {token: self._living(token, now) for token in owners}
        for name in names:
            what, _, token = name.rpartition("@")
            if token in others and (other := others[token]):
                yield what, other
            elif token in others:
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
        """Give a claim back."""
        self._claim_file(what).unlink(missing_ok=True)

    def _claim_file(self, what: str) -> Path:
        return self.folder / "claims" / f"{what}@{self.token}"

    # --- failures

    def report_failure(self, what: str, error: InputError) -> None:
        """Tell the others why `what` cannot be done, so that not each of them finds out by itself."""
        file = self.folder / "failed" / f"{what}.txt"
        with suppress(DiskFull):  # then each does
            file.parent.mkdir(exist_ok=True)  # it went with a worker that took itself for the last one
            kind = StorageFailed if isinstance(error, StorageFailed) else InputError
            write_text_atomically(file, f"{kind.__name__}\n{error}")

    def failure(self, what: str) -> InputError | None:
        """The problem with `what` that was reported since this process joined; an earlier one may have been mended.
        One of a storage is StorageFailed here too: every worker of a job may start again then, not its finder alone."""
        file = self.folder / "failed" / f"{what}.txt"
        try:
            text = retry_if_stale(file, lambda: file.read_text(encoding="utf-8"))
            if file.stat().st_mtime_ns <= self.joined:
                return None
        except FileNotFoundError:
            return None
        kind, _, problem = text.partition("\n")
        return (StorageFailed if kind == StorageFailed.__name__ else InputError)(problem)

    # --- the end

    def leave(self) -> None:
        """End this worker's membership and its claims; the last one alive clears up behind all of them."""
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
        # Files one by one, folders only if they are empty: what a worker that joins just now has written stays.
        for folder in [*(self.folder / name for name in _FOLDERS), self.folder]:
            for name in _names_in(folder):
                if not self._living(_owner(name), now):
                    with suppress(OSError):  # a folder, or gone with another that clears up
                        (folder / name).unlink()
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def join(folder: Path, settings: Mapping[str, object]) -> Iterator[WorkerGroup]:
    """Membership of the workers at `folder` (made if need be), alive until the end of the block.

    settings: what workers must agree in, as JSON.  Raises InputError if a living one has others, if the folder cannot
    be written to, or if something else than workers is in it.
    """
    try:
        _refuse_strangers(folder)
        group = WorkerGroup(folder, json.loads(json.dumps(settings)))
    except DiskFull:
        for empty in [*(folder / name for name in _FOLDERS), folder]:
            with suppress(OSError):  # others are there
                empty.rmdir()
        raise
    except OSError as error:
        raise (StorageFailed if is_of_storage(error) else InputError)(
            f"data.cache {folder.parent}: cannot be written to ({error.strerror}). Point data.cache at a folder that "
            "can; a complete cache is trained on as it is with data.preprocess=never."
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


def _refuse_strangers(folder: Path) -> None:
    """Raises InputError if there is a file in the place of a folder, or what no worker has made: the last one to leave
    would delete it."""
    strangers = [place for place in (folder, *(folder / name for name in _FOLDERS)) if place.is_file()]
    names = [name for name in _names_in(folder) if name not in _FOLDERS]
    strangers += [folder / name for name in names if not name.startswith((_PLAN, "."))]
    if strangers:
        raise InputError(
            f"data.cache {folder.parent}: {strangers[0]} is there, which no job of fluxfill has made. Point data.cache "
            "at a folder of its own, or move it away."
        )


def _owner(name: str) -> str:
    """The token in the name of a file: <token>.json, <what>@<token> or plan-<token>, perhaps half written."""
    return name.rpartition("@")[2].removeprefix(_PLAN).partition(".")[0]


def _names_in(folder: Path) -> list[str]:
    try:
        return retry_if_stale(folder, lambda: os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
