"""Batch scripts handed to sbatch: jobs that wait for each other, and that inherit no other job's variables."""

import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from configs.errors import InputError

_TIMEOUT_SECONDS = 120


def submit_job(script: Path, folder: Path, environ: Mapping[str, str], options: Sequence[str] = ()) -> str:
    """Submit a batch script; returns the job's id.

    folder: where it runs.  Raises InputError with sbatch's own words if it is refused.
    """
    command = ["sbatch", "--parsable", *options, str(script)]
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=clean_environment(environ),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
    except FileNotFoundError as error:
        raise InputError("sbatch is not on this machine: submit from a login node of the cluster.") from error
    except subprocess.TimeoutExpired as error:
        raise InputError(f"{' '.join(command)}: no answer in {_TIMEOUT_SECONDS} s; see `squeue --me`.") from error
    job = re.match(r"[0-9]+", done.stdout)
    if done.returncode != 0 or job is None:
        raise InputError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return job[0]


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables without those of SLURM, but for its configuration.

    A job inherits those that it does not set itself, and takes another's restarts, array or memory for its own; those
    for sbatch (SBATCH_NO_REQUEUE) would overrule the script.
    """
    foreign = ("SLURM_", "SBATCH_", "SRUN_", "SALLOC_")
    return {name: value for name, value in environ.items() if name == "SLURM_CONF" or not name.startswith(foreign)}
