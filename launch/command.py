"""The command and environment that start a training run: pure functions, nothing is run here."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from configs.errors import InputError
from configs.schema import EngineName

REPO_ROOT = Path(__file__).resolve().parent.parent
SHUTDOWN_SECONDS = 600  # what the trainer is given to save before it is killed


def choose_engine(
    asked: Literal["auto", EngineName], num_processes: int | None, num_gpus: int
) -> tuple[EngineName, int]:
    """The engine and the number of processes for `parallel.engine` and --num-processes (None: one per GPU).

    auto is ddp for more than one process, else single. Raises InputError when single is asked for several processes.
    """
    count = num_processes if num_processes is not None else 1 if asked == "single" else max(num_gpus, 1)
    if asked == "single" and count > 1:
        raise InputError(
            f"--num-processes is {count}, but parallel.engine is single, which is one process. "
            f"Leave --num-processes out, or set parallel.engine=ddp."
        )
    if asked == "auto":
        return ("ddp" if count > 1 else "single"), count
    return asked, count


def render_command(
    config_path: str, overrides: Sequence[str], engine: EngineName, num_processes: int, port: int
) -> list[str]:
    """The `accelerate launch` line of a run on this machine, as an argument list.

    config_path and overrides are handed on as they are.  port: where the processes find each other; 0 takes a free one.
    """
    return [
        # -P: a file in the user's folder must not hide a module of the same name.
        *(sys.executable, "-P", "-m", "accelerate.commands.launch"),
        *("--config_file", str(REPO_ROOT / "configs" / "engines" / f"{engine}.yaml")),
        *("--num_processes", str(num_processes)),
        *("--main_process_port", str(port)),
        str(REPO_ROOT / "trainer" / "main.py"),
        *("--config", config_path),
        *overrides,
    ]


def render_preprocess(config_path: str, overrides: Sequence[str]) -> list[str]:
    """The command of each worker that encodes what a config's cache lacks, as an argument list."""
    return [sys.executable, "-P", "-m", "data.preprocess", "--config", config_path, *overrides]


def render_worker_environments(num_workers: int, num_cores: int, inherited: Mapping[str, str]) -> list[dict[str, str]]:
    """The variables of each worker, as `accelerate launch data/preprocess.py` would set them: a GPU for each, one bar
    for all, and the cores shared."""
    return [
        {
            **{"RANK": str(rank), "LOCAL_RANK": str(rank)},
            **{"WORLD_SIZE": str(num_workers), "LOCAL_WORLD_SIZE": str(num_workers)},
            "OMP_NUM_THREADS": _threads_each(num_workers, num_cores, inherited),
        }
        for rank in range(num_workers)
    ]


def render_export(source: Path, out: Path, weights: str, dtype: str | None) -> list[str]:
    """The command that exports a checkpoint, as an argument list; trainer/export/from_checkpoint.py explains each."""
    line = [sys.executable, "-P", "-m", "trainer.export.from_checkpoint", str(source), "--out", str(out)]
    line += ["--weights", weights]
    return line if dtype is None else [*line, "--dtype", dtype]


def render_environment(
    outcome_file: Path, num_processes: int, num_cores: int, inherited: Mapping[str, str]
) -> dict[str, str]:
    """The variables to set for a run, on top of those inherited.

    Without the first two, USR1 would end torch's launcher and orphan the ranks, and a save would be cut off after 30 s.
    Left alone, accelerate gives every process one CPU thread; a value of the user's own is kept.
    """
    return {
        "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGUSR1,SIGUSR2",
        "PET_SHUTDOWN_TIMEOUT": str(SHUTDOWN_SECONDS),
        "FLUXFILL_OUTCOME": str(outcome_file),
        "OMP_NUM_THREADS": _threads_each(num_processes, num_cores, inherited),
    }


def _threads_each(num_processes: int, num_cores: int, inherited: Mapping[str, str]) -> str:
    return inherited.get("OMP_NUM_THREADS") or str(max(num_cores // num_processes, 1))


def render_shell_line(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """One line that does the same when pasted into a shell."""
    settings = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    return " ".join([*settings, shlex.join(command)])
