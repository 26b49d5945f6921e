"""The queue of unfinished shards, as one of the workers sees it."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from configs.errors import InputError
from data.cache.shard_index import ShardIndex, ShardSummary, read_index
from data.cache_layout import MANIFEST, index_path
from data.preprocessing.plan_file import PlanFile
from data.preprocessing.worker import Worker
from data.preprocessing.worker_group import WorkerGroup
from data.samples.shard_plan import PlannedShard, ShardSpec
from data.storage.retry import retry_if_stale

_LOOK_SECONDS = 20.0
_READ_THREADS = 16

SHARD_CLAIMS = "shards."  # what the names of their claims begin with


def read_finished(cache: Path, plan: ShardSpec) -> ShardIndex | None:
    """The index of a shard that is finished and made from this plan; else None."""
    path = index_path(cache / plan.path, plan.format_version)
    return retry_if_stale(path, partial(_read_finished, cache / plan.path, path, plan))


def _read_finished(tar: Path, path: Path, plan: ShardSpec) -> ShardIndex | None:
    try:
        index = read_index(path)
        is_finished = tar.stat().st_size == index.tar_bytes and index.plan == plan.plan
    except (FileNotFoundError, InputError):
        return None
    return index if is_finished and index.num_samples == plan.num_samples else None


def read_finished_of(cache: Path, plans: Sequence[ShardSpec]) -> list[ShardSummary | None]:
    """Summaries of the finished shards, None for the others; read by threads: on a network's filesystem it is all
    waiting."""

    def read(plan: ShardSpec) -> ShardSummary | None:
        index = read_finished(cache, plan)
        return ShardSummary.of(index) if index is not None else None

    with ThreadPoolExecutor(_READ_THREADS) as pool:
        return list(pool.map(read, plans))


class ShardQueue:
    """Unfinished shards, dealt by claims: whichever worker comes first takes a shard, so that a slow, late or dead one
    holds nobody up. Each begins at a place of its own, which keeps them out of each other's way.

    advance: called with the number of samples that are done, here or elsewhere.
    """

    def __init__(self, cache: Path, plan: PlanFile, group: WorkerGroup, worker: Worker) -> None:
        finished = read_finished_of(cache, plan.specs)
        unfinished = [spec for spec, row in zip(plan.specs, finished, strict=True) if row is None]
        first = len(unfinished) * worker.index // worker.count
        self.remaining = {spec.path: spec for spec in [*unfinished[first:], *unfinished[:first]]}
        self.num_samples = sum(spec.num_samples for spec in unfinished)
        self.num_encoded = 0
        self.advance: Callable[[int], object] = lambda count: None
        self._cache, self._plan, self._group = cache, plan, group
        self._in_work: set[str] = set()
        self._problems: dict[str, str] = {}
        self._folders = sorted({self._index(spec).parent for spec in unfinished})
        self._inodes, self._looked = self._list_indexes(), time.monotonic()

    # --- taking

    def claim_shards(self) -> Iterator[PlannedShard]:
        """One pass over the queue: every shard that no living worker has, claimed when it is asked for."""
        held = self._group.claims_of_others(
            SHARD_CLAIMS
        )  # as of now; to ask for each again would be thousands of requests
        for plan in list(self.remaining.values()):
            self._look_around()
            free = plan.path in self.remaining and plan.path not in self._in_work and _claim_name(plan) not in held
            if free and self._claim(plan):
                yield self._plan.load(plan)

    def _claim(self, plan: ShardSpec) -> bool:
        name = _claim_name(plan)
        if problem := self._group.failure(name):
            self._drop(plan)
            self._problems[plan.path] = str(problem)
            return False
        if read_finished(self._cache, plan):
            self._drop(plan)
            return False
        if not self._group.claim(name):
            return False
        if read_finished(self._cache, plan):  # by one that gave it back between our look and our claim
            self._group.release(name)
            self._drop(plan)
            return False
        self._in_work.add(plan.path)
        for path in (self._cache / plan.path, self._index(plan)):
            for part in path.parent.glob(f"{path.name}.*part"):
                part.unlink(missing_ok=True)  # of a worker that died: a living one would have the claim
        # A manifest describes a finished cache: there is none while anything in it changes.
        (self._cache / MANIFEST).unlink(missing_ok=True)
        return True

    def _index(self, plan: ShardSpec) -> Path:
        return index_path(self._cache / plan.path, plan.format_version)

    def _drop(self, plan: ShardSpec) -> None:
        if self.remaining.pop(plan.path, None):
            self.advance(plan.num_samples)

    def _look_around(self) -> None:
        """Now and then, see what others have finished, by one listing: for the bar, and not to try each."""
        if time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        inodes = self._list_indexes()
        for plan in list(self.remaining.values()):
            index = os.fspath(self._index(plan))
            changed = inodes.get(index) != self._inodes.get(index)
            if changed and plan.path not in self._in_work and read_finished(self._cache, plan):
                self._drop(plan)
        self._inodes, self._looked = inodes, time.monotonic()

    def _list_indexes(self) -> dict[str, int]:
        """Path -> inode of every index: one that is written again is another file."""
        found: dict[str, int] = {}
        for folder in self._folders:
            if folder.is_dir():
                with os.scandir(folder) as entries:
                    found |= {entry.path: entry.inode() for entry in entries if entry.name.endswith(".index")}
        return found

    # --- giving back

    def still_holds(self, plan: ShardSpec) -> bool:
        """Whether a shard's claim still holds. Not if this process was stopped so long that it was taken for dead;
        raises Evicted if others go by another plan since."""
        return self._group.still_holds(_claim_name(plan))

    def finish(self, plan: ShardSpec) -> None:
        """Give back a shard that was published, or was lost to another worker, which shows in the next pass."""
        if read_finished(self._cache, plan):
            self.remaining.pop(plan.path, None)
            self.num_encoded += plan.num_samples
        self._give_back(plan)

    def fail(self, plan: ShardSpec, problem: str) -> None:
        """Report a shard that cannot be made of the pictures there are: the others need not try."""
        self._group.report_failure(_claim_name(plan), InputError(problem))
        self.remaining.pop(plan.path, None)
        self._problems[plan.path] = problem
        self._give_back(plan)

    def _give_back(self, plan: ShardSpec) -> None:
        self._in_work.discard(plan.path)
        self._group.release(_claim_name(plan))

    def raise_problems(self) -> None:
        """Raise one InputError that lists all pictures at fault, whoever found them, and says how the cache is
        completed: one that was complete before has lost its manifest by now."""
        if self._problems:
            cure = (
                f"data.cache {self._cache} cannot be trained from until it is complete. Mend what is named or "
                "remove it, and run the same command again: what is encoded is kept. `fluxfill preprocess CONFIG "
                "--dry-run --thorough` finds what cannot be decoded before anything is encoded."
            )
            raise InputError("\n".join([*(self._problems[path] for path in sorted(self._problems)), cure]))

    def waiting_for(self) -> str:
        """The worker that has a shard of the queue, as a phrase for people."""
        for plan in self.remaining.values():
            if holder := self._group.holder(_claim_name(plan)):
                return f"{holder}, which has the last shards"
        return "another worker"


def _claim_name(plan: ShardSpec) -> str:
    return plan.path.removesuffix(".tar").replace("/", ".")
