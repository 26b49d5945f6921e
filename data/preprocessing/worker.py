"""A process's index among the workers, from the command line and from what launchers leave in the environment.

The number is no promise to do a share of the work: any worker does whatever is left. It spreads the workers over the
shards at the start, and over the devices of a machine.
"""

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from configs.errors import InputError
from configs.this_machine import count_cores


@dataclass(frozen=True)
class Worker:
    """index: 0 to count - 1.  device_index: which of the machine's devices is its own, modulo how many there are.
    rank: among those started together, which share a terminal.  decode_threads: its share of the machine's cores.
    origin: who said so, for people."""

    index: int = 0
    count: int = 1
    device_index: int = 0
    rank: int = 0
    decode_threads: int = 4
    origin: str = "alone"

    def __str__(self) -> str:
        return f"worker {self.index + 1} of {self.count} ({self.origin})"


def which_worker(environ: Mapping[str, str], *, worker: int | None = None, workers: int | None = None) -> Worker:
    """The worker a process is: `--worker I --workers N` or a SLURM array's task, times the ranks within it
    (accelerate's RANK / WORLD_SIZE, or srun's tasks).

    A job that was submitted from within another one inherits those variables of it that it does not set itself: they
    are taken for its own only where SLURM does not say otherwise.

    Raises InputError if only one of the two is given, or the index is not below the number.
    """
    if (worker is None) != (workers is None):
        raise InputError("--worker and --workers belong together: give both, for example --worker 0 --workers 8.")
    outer = (0, 1, "")
    if worker is not None and workers is not None:
        if not 0 <= worker < workers:
            raise InputError(f"--worker {worker} --workers {workers}: the worker counts from 0 to {workers - 1}.")
        outer = (worker, workers, "--worker")
    elif "SLURM_ARRAY_TASK_ID" in environ and not _is_in_no_array(environ):
        outer = _array_task(environ)
    inner = (0, 1, "")
    device_index = outer[0]
    if "RANK" in environ:
        inner = (int(environ["RANK"]), int(environ.get("WORLD_SIZE", "1")), f"rank {environ['RANK']}")
        device_index = int(environ.get("LOCAL_RANK", environ["RANK"]))
    elif "SLURM_PROCID" in environ and "SLURM_STEP_NUM_TASKS" in environ and not is_batch_script():
        inner = (
            int(environ["SLURM_PROCID"]),
            int(environ["SLURM_STEP_NUM_TASKS"]),
            f"SLURM task {environ['SLURM_PROCID']}",
        )
        if inner[1] > 1:
            device_index = int(environ.get("SLURM_LOCALID", "0"))
    # A rank of one says nothing: a single process under accelerate, or an array's task started by srun.
    origins = [place[2] for place in (outer, inner) if place[1] > 1 or place[2] == "--worker"]
    neighbours = int(environ.get("LOCAL_WORLD_SIZE", "1"))  # srun confines its tasks to cores of their own
    return Worker(
        index=outer[0] * inner[1] + inner[0],
        count=outer[1] * inner[1],
        device_index=device_index,
        rank=inner[0],
        decode_threads=min(max(count_cores() // neighbours, 4), 32),
        origin=", ".join(origins) or "alone",
    )


def _array_task(environ: Mapping[str, str]) -> tuple[int, int, str]:
    """(index, count, origin) of an array's task: 1-8, 0-7 and 0-14:2 all give 0 to 7."""
    task = int(environ["SLURM_ARRAY_TASK_ID"])
    first = int(environ.get("SLURM_ARRAY_TASK_MIN", "0"))
    step = int(environ.get("SLURM_ARRAY_TASK_STEP", "1"))
    count = int(environ.get("SLURM_ARRAY_TASK_COUNT", "1"))
    # An array of single numbers (1,5,7) has no step that fits; two workers may then start at the same place.
    return (task - first) // step % count, count, f"SLURM array task {task}"


def _is_in_no_array(environ: Mapping[str, str]) -> bool:
    """Whether the controller knows this job as no task of the array that the environment names.

    Where the controller cannot be asked, in a container without SLURM's commands, the environment is believed.
    """
    job, array = environ.get("SLURM_JOB_ID", ""), environ.get("SLURM_ARRAY_JOB_ID", "")
    if job == array or not re.fullmatch(r"[0-9]+", job):  # the array's last task has its id
        return False
    try:
        command = ["scontrol", "show", "job", "--oneliner", job]
        told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return False
    return f" ArrayJobId={array} " not in told


def is_batch_script() -> bool:
    """Whether SLURM tracks this process as a batch script's, which is no step: its step's variables are another's."""
    try:
        return "/step_batch" in Path("/proc/self/cgroup").read_text(encoding="utf-8")
    except OSError:
        return False
