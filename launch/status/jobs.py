"""A run's jobs, as SLURM knows them where there is one: a job's id -> the run's folder, and what becomes of it."""

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from configs.errors import InputError
from launch.slurm.restarts import read_job_events
from launch.status.run import RunStatus, find_runs, is_run

_TIMEOUT_SECONDS = 30
_SEPARATOR = "\x1f"  # in no name and no path that anybody writes
# Id, state, reason, nodes, and what may hold anything: name, folder of submission, script.
_QUEUE_FORMAT = _SEPARATOR.join(("%i", "%T", "%r", "%N", "%j", "%Z", "%o"))
_NEVER = ("DependencyNeverSatisfied",)
_PENDING, _STOPPING = ("PENDING", "CONFIGURING", "REQUEUED"), ("COMPLETING",)


@dataclass(frozen=True)
class SlurmJob:
    """A job in the queue.  reason: why it waits, SLURM's word.  folder: where it was submitted from."""

    id: str
    state: str
    reason: str
    nodes: str
    folder: Path
    script: str

    @property
    def can_never_start(self) -> bool:
        return self.state in _PENDING and self.reason in _NEVER


def ask_queue(jobs: Sequence[str], *options: str) -> list[SlurmJob] | None:
    """Those of the jobs that wait or run; None where there is no SLURM to ask.  options: of squeue, further ones."""
    if not jobs:
        return []
    # The last word of the format is the script with its arguments.
    told = _ask(["squeue", "--noheader", f"--jobs={','.join(jobs)}", f"--format={_QUEUE_FORMAT}", *options])
    if told is None:
        return None
    found = []
    for line in told.splitlines():
        fields = line.split(_SEPARATOR)
        if len(fields) == 7:
            id, state, reason, nodes, _, folder, script = fields
            found.append(SlurmJob(id, state, reason, nodes, Path(folder), script))
    return found


def find_run_of(job: str, root: Path) -> Path:
    """The folder of the run that a job trains or has trained: as runs below `root` have noted it, else by what SLURM
    says of where the job came from. Raises InputError if neither tells."""
    number = re.match(r"\d+", job)
    assert number is not None
    job = number[0]
    roots = [root]
    if queued := ask_queue([job], "--states=all"):  # those, too, that ended some minutes ago
        script = Path(queued[0].script.partition(" ")[0])
        if script.parent.name == "slurm" and is_run(script.parents[1]):
            return script.parents[1]
        roots.append(queued[0].folder / "runs")
    elif past := _ask(["sacct", "-X", "--noheader", "--parsable2", "--jobs", job, "--format=WorkDir"]):
        roots.append(Path(past.splitlines()[0]) / "runs")
    for place in roots:
        for run in find_runs(place):
            if any(event.job == job for event in _events(run)):
                return run
    looked = " and ".join(dict.fromkeys(str(place) for place in roots))
    raise InputError(f"job {job}: no run in {looked} has had it. Give the run's folder in its place.")


def _events(run: Path) -> list:
    try:
        return read_job_events(run)
    except OSError:
        return []


def with_queue(status: RunStatus, queued: Sequence[SlurmJob] | None) -> RunStatus:
    """The status, with what SLURM says of the run's jobs.  queued: as `ask_queue` gives them."""
    if queued is None or status.job is None or status.state in ("finished", "refused"):
        return status
    running = [job for job in queued if job.state == "RUNNING"]
    waiting = [job for job in queued if job.state in _PENDING]
    if running:
        if status.state == "silent":
            return replace(
                status, reason=f"job {running[0].id} runs on {running[0].nodes} and writes nothing: it hangs"
            )
        return replace(status, state="starting") if status.state in ("waiting", "stopped", "failed") else status
    if waiting:
        first = waiting[0]
        return replace(status, state="waiting", reason=f"job {first.id} is pending: {first.reason}")
    if status.state in ("starting", "running", "waiting", "silent") and not queued:
        if status.last_end is not None:  # it was to start again, and SLURM has refused, or somebody has cancelled it
            state, reason = status.last_end
            return replace(status, state=state, reason=f"job {status.job.job} is gone, not started again; {reason}")
        return replace(status, state="failed", reason=f"job {status.job.job} is gone, and left no outcome")
    return status


def _ask(command: list[str]) -> str | None:
    """What a command of SLURM's prints; "" if it refuses, None if there is no such program or no answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        # Of jobs that have left the queue squeue says so; a controller that does not answer tells nothing.
        return "" if "Invalid job id" in done.stderr else None
    return done.stdout
