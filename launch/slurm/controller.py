"""SLURM's controller, asked by `scontrol`: what it knows of a job, and to start one again."""

import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from configs.errors import InputError

_ENDING = "COMPLETING"
_TIMEOUT_SECONDS = 120
# A controller that is restarted, or has too much to do, answers again in a moment.
PATIENCE_SECONDS, FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 120.0, 1.0, 30.0
_COMMENT = re.compile(r" Comment=(.*?)(?: +(?:StdErr|StdIn|StdOut|Power)=|$)")  # whatever it holds itself
_UNREAD = re.compile(r"fluxfill:unread=(\d+)")
_AWAY = re.compile(r"(?i)contact slurm controller|timed out|standby mode|zero bytes|not connected|connection refused")


@dataclass(frozen=True)
class Job:
    """A job as the controller knows it.

    id: as scontrol takes it; of an array's task ARRAY_TASK, because its own number may mean the whole array.  restarts:
    how often it was started again.  may_requeue: False with --no-requeue or SBATCH_NO_REQUEUE=1.  is_ending: somebody
    ends it now, by scancel, scontrol requeue or preemption; its time limit does not count.  excluded: nodes that it
    is not to get, as a list.  comment: free text.  unread: what `note_unread` noted.
    """

    id: str
    restarts: int
    may_requeue: bool
    is_ending: bool
    excluded: str = ""
    comment: str = ""
    unread: int = 0


def show_job(number: str) -> Job | None:
    """What the controller knows of the job with a number (SLURM_JOB_ID); None where it cannot be asked.

    Of an array it tells all tasks if the number is the last one's, which is also the array's.
    """
    if not re.fullmatch(r"[0-9]+", number):
        return None
    try:
        lines = _scontrol("show", "job", "--oneliner", number).splitlines()
    except InputError:
        return None
    line = next((line for line in lines if line.startswith(f"JobId={number} ")), None)
    return None if line is None else parse_job(line)


def parse_job(line: str) -> Job:
    """A line of `scontrol show job --oneliner`."""
    pairs = re.findall(r"(?:^| )([A-Za-z]+)=(\S*)", line)
    told = dict(reversed(pairs))  # the first of a name counts: the comment of a job, at its end, may hold anything
    task = told.get("ArrayTaskId", "")
    id = f"{told['ArrayJobId']}_{task}" if task.isdigit() else told["JobId"]
    ran, limit = _seconds(told["RunTime"]), _seconds(told["TimeLimit"])
    timed_out = ran is not None and limit is not None and ran >= limit
    comment = _COMMENT.search(line)
    noted = _UNREAD.search(comment[1]) if comment else None
    return Job(
        id=id,
        restarts=int(told["Restarts"]),
        may_requeue=told["Requeue"] == "1",
        is_ending=told["JobState"] == _ENDING and not timed_out,
        excluded=told.get("ExcNodeList", "(null)").replace("(null)", ""),
        comment=_UNREAD.sub("", comment[1]).replace("(null)", "").strip() if comment else "",
        unread=int(noted[1]) if noted else 0,
    )


def requeue(job: str) -> None:
    """Start a job again, once it has ended. Raises InputError with the controller's words if it may not.

    job: an id as `Job` has it.
    """
    _scontrol("requeue", job)


def exclude_nodes(job: Job, nodes: Sequence[str]) -> None:
    """Keep nodes from a job that waits, beside those that it was not to get anyway. Raises InputError with the
    controller's words if that cannot be."""
    excluded = ",".join([*filter(None, [job.excluded]), *nodes])
    _scontrol("update", f"JobId={job.id}", f"ExcNodeList={excluded}")


def note_unread(job: Job, count: int) -> None:
    """Note how many starts of a job in a row could read nothing of its run's folder, in its comment behind the user's:
    the controller alone remembers then.  count: 0 takes the note back.  Raises InputError with the controller's words
    if that cannot be."""
    note = [f"fluxfill:unread={count}"] if count else []
    _scontrol("update", f"JobId={job.id}", f"Comment={' '.join([*filter(None, [job.comment]), *note])}")


def node_names(nodelist: str) -> list[str]:
    """The names that a list such as n[01-03],m7 stands for. Raises InputError where the controller cannot be asked."""
    return _scontrol("show", "hostnames", nodelist).split()


class _Away(InputError):
    """The controller does not answer now."""


def _scontrol(*arguments: str) -> str:
    """What scontrol prints. A controller that does not answer is asked again for PATIENCE_SECONDS."""
    deadline, pause = time.monotonic() + PATIENCE_SECONDS, FIRST_PAUSE_SECONDS
    while True:
        try:
            return _ask_once(["scontrol", *arguments])
        except _Away as error:
            if time.monotonic() + pause > deadline:
                raise
            print(f"fluxfill: {error}: asked again in {pause:g} s", file=sys.stderr, flush=True)
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def _ask_once(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise _Away(f"{' '.join(command)}: {error}") from error
    except OSError as error:
        raise InputError(f"{' '.join(command)}: {error}") from error
    if done.returncode != 0:
        said = done.stderr.strip() or f"ended with {done.returncode}"
        raise (_Away if _AWAY.search(said) else InputError)(f"{' '.join(command)}: {said}")
    return done.stdout


def _seconds(span: str) -> int | None:
    """[days-]hours:minutes:seconds in seconds; None for UNLIMITED and its like."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", span)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
