"""Whether a job that ended starts again: by how it ended, and how often it came no further; and the jobs of a run."""

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

from configs.errors import InputError, StorageFailed, is_of_storage
from configs.supervision import FAILED, STOPPED
from data.cache_layout import INDEX, SHARDS
from launch.supervise import Outcome

_RESTARTABLE = (FAILED, STOPPED)

# left: somebody else ends the job.
Decision = Literal["done", "restart", "stop", "left"]


@dataclass(frozen=True)
class End:
    """One end of a job.

    start, progress: how far the work was when it began, and when it ended (the step of the newest checkpoint, or the
    shards finished since the job began).  since: of preprocessing, the newest shard's time when the job began.
    """

    job: str
    restarts: int
    code: int
    reason: str
    start: int
    progress: int
    decision: Decision
    time: float = 0.0
    since: int = 0


@dataclass(frozen=True)
class JobEvent:
    """A job of a run that was submitted or started.  nodes: a list such as n[01-03]; "" before it starts."""

    job: str
    what: Literal["submitted", "started"]
    nodes: str = ""
    restarts: int = 0
    time: float = 0.0


def count_shards(cache: Path, since: int) -> int:
    """Shards of a cache that were finished later. All of them say little: those of other settings, or captions, are
    encoded again in their places, and those that no plan names are deleted.  since: nanoseconds since 1970."""
    return sum(time > since for time in _shard_times(cache))


def newest_shard(cache: Path) -> int:
    """When the last shard of a cache was finished, in nanoseconds since 1970; 0: it has none."""
    return max(_shard_times(cache), default=0)


def _shard_times(cache: Path) -> Iterator[int]:
    """Of their indexes, which come last. One may go meanwhile."""
    for folder in (SHARDS, INDEX):  # a cache of format 1 has them beside its tars
        for index in (cache / folder).glob("*/*.index"):
            with suppress(FileNotFoundError):
                yield index.stat().st_mtime_ns


def end_log(run: Path, work: str, job: str) -> Path:
    """Where the ends of a job are kept.  job: its id, or what the jobs of a chain share."""
    return run / "slurm" / f"{work}-{job}.jsonl"


def read_ends(log: Path) -> list[End]:
    """The earlier ends of a job, or of the jobs of a chain, oldest first."""
    return _read_lines(log, End)


def read_all_ends(run: Path) -> list[End]:
    """The ends of all jobs that have trained a run, oldest first."""
    ends = [end for log in (run / "slurm").glob("train-*.jsonl") for end in read_ends(log)]
    return sorted(ends, key=lambda end: end.time)


def write_end(log: Path, end: End) -> None:
    """Add a line to the log. Raises InputError if it cannot be written."""
    _append(log, replace(end, time=time.time()))


def read_job_events(run: Path) -> list[JobEvent]:
    """The jobs of a run as they were submitted and started, oldest first."""
    return _read_lines(_job_log(run), JobEvent)


def write_job_event(run: Path, event: JobEvent) -> None:
    """Add a job to those of a run, for `fluxfill status`. Raises InputError if it cannot be written."""
    _append(_job_log(run), replace(event, time=time.time()))


def _job_log(run: Path) -> Path:
    return run / "slurm" / "jobs.jsonl"


_Line = TypeVar("_Line", End, JobEvent)


def _read_lines(log: Path, kind: type[_Line]) -> list[_Line]:
    try:
        lines = log.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    read = []
    for line in lines:
        try:
            read.append(kind(**json.loads(line)))
        except (ValueError, TypeError):  # the machine went down while it was written
            continue
    return read


def _append(log: Path, line: End | JobEvent) -> None:
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(line)) + "\n")
    except OSError as error:
        kind = StorageFailed if is_of_storage(error) else InputError
        raise kind(f"{log}: cannot be written ({error.strerror}). Make room there, or set run.dir.") from error


def note_silent_ends(
    log: Path, earlier: list[End], job: str, restarts: int, progress: int, since: int = 0
) -> list[End]:
    """The ends with one more, also in the log, for each start of the job that left no word: it was lost with its node.

    restarts: how often SLURM has started the job again.  progress: how far the work is now. How far it was before the
    first of them nobody has noted, so that one counts as a start in vain.
    """
    ends = list(earlier)
    for number in range(sum(end.job == job for end in earlier), restarts):
        start = ends[-1].progress if ends else progress
        reason = "left no word: its node may be lost"
        ends.append(End(job, number, FAILED, reason, start, progress, "restart", since=since))
        write_end(log, ends[-1])
    return ends


def count_vain(ends: list[End]) -> int:
    """How many of the last starts in a row brought no progress; those that somebody else ended do not count."""
    own = [end for end in ends if end.decision != "left"]
    return next((index for index, end in enumerate(reversed(own)) if end.progress > end.start), len(own))


def decide(
    outcome: Outcome, earlier: list[End], start: int, progress: int, max_restarts: int, unit: str = ""
) -> tuple[Decision, str]:
    """(decision, why for people): "done", "restart" or "stop".  unit: behind the progress.

    What failed or was stopped starts again; bad input and a run folder of another job would end the same way. After
    `max_restarts` restarts in a row without progress the job stops.
    """
    if outcome.code == 0:
        return "done", "done"
    if outcome.code not in _RESTARTABLE:
        return "stop", f"exit code {outcome.code} would be the same after a restart"
    if progress > start:
        return "restart", f"goes on from {progress}{unit}"
    vain = count_vain(earlier) + 1
    if vain > max_restarts:
        return "stop", explain_stop(vain, progress, max_restarts, unit)
    return "restart", f"came no further than {progress}{unit}; restart {vain} of {max_restarts} without progress"


def explain_stop(vain: int, progress: int, max_restarts: int, unit: str = "") -> str:
    """Why a job is not started again after so many starts in vain."""
    return (
        f"{vain} starts in a row came no further than {progress}{unit} (slurm.max_restarts is {max_restarts}). See "
        "what the log says of them, mend it and submit the job again"
    )
