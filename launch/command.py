"""The command and environment that start a training run: pure functions, nothing is run here."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configs.combinations import started_engine
from configs.errors import InputError
from configs.gpu_allocator import allocator_settings
from configs.schema import Config, EngineName
from configs.supervision import SIGNALS_CAN_BE_SENT, STOP_SIGNALS
from launch.gpus import count_training_gpus, refuse_missing_gpus

REPO_ROOT = Path(__file__).resolve().parent.parent
SHUTDOWN_SECONDS = 600  # what the trainer is given to save before it is killed


def choose_engine(
    asked: Literal["auto", EngineName], num_processes: int | None, num_gpus: int
) -> tuple[EngineName, int]:
    """The engine and the number of processes for `parallel.engine` and --num-processes (None: one per GPU).

    auto is ddp for more than one process, else single. Raises InputError when single is asked for several processes,
    and on Windows for any other engine.
    """
    count = num_processes if num_processes is not None else 1 if asked == "single" else max(num_gpus, 1)
    if asked == "single" and count > 1:
        raise InputError(
            f"parallel.engine is single, which is one process, but {count} are asked for. "
            "Leave --num-processes (or --nodes) out, or set parallel.engine=ddp."
        )
    engine = started_engine(asked, count)
    if engine != "single" and not SIGNALS_CAN_BE_SENT:
        raise InputError(
            f"parallel.engine={engine} with {count} processes needs Linux, or WSL2 on Windows. Natively there is "
            "one GPU: --num-processes 1, and parallel.engine=single."
        )
    return engine, count


def choose_on_nodes(config: Config, nodes: int, gpus_per_node: int) -> tuple[EngineName, int]:
    """The engine of a run on so many GPUs of each of so many nodes, and the training processes of a node: one for each
    GPU that does not encode for the others, and one where there is no GPU. Raises InputError for an engine that cannot
    start there, and for encoders on a GPU that is not there."""
    refuse_missing_gpus(config.data, gpus_per_node)
    asked = config.parallel.engine
    each = max(count_training_gpus(gpus_per_node, config.data.encoder_devices), 1)
    if asked == "single" and nodes * each > 1:
        one = "slurm.gpus_per_node=1" if nodes == 1 else "slurm.nodes=1 and slurm.gpus_per_node=1"
        raise InputError(
            f"{nodes * each} GPUs are to train, but parallel.engine is single, which is one process: set {one}, or "
            "parallel.engine=ddp."
        )
    if asked == "hsdp" and (nodes == 1 or each == 1):
        raise InputError(
            "parallel.engine is hsdp, which shards within a node and copies across nodes, but "
            f"{nodes} x {each} GPUs are to train: set slurm.nodes and slurm.gpus_per_node to 2 or more, or "
            "parallel.engine=fsdp2."
        )
    engine, _ = choose_engine(asked, nodes * each, nodes * each)
    return engine, each


@dataclass(frozen=True)
class Node:
    """One of the machines of a run.  rank: 0 to count - 1.  head: the address of the one with rank 0."""

    rank: int
    count: int
    head: str


def check_node(node: Node, port: int) -> Node:
    """The node. Raises InputError if it is none of its run, or would never meet the others."""
    if node.rank >= node.count:
        raise InputError(f"--node-rank is {node.rank}, but --nodes {node.count} are numbered 0 to {node.count - 1}.")
    if node.count > 1 and port == 0:
        raise InputError("--port: several machines meet at a port that all of them know. Give one that is free there.")
    return node


def render_command(
    config_path: str,
    overrides: Sequence[str],
    engine: EngineName,
    num_processes: int,
    port: int,
    node: Node | None = None,
    resume: str = "auto",
) -> list[str]:
    """The `accelerate launch` line of a run on this machine, as an argument list.

    config_path, overrides and resume (auto, never, or a checkpoint's folder) are handed on as they are.
    num_processes: of the run, on all nodes together.  port: where the processes find each other; 0 takes a free one, on
    one machine.  node: which of several this is.
    On Windows the trainer is started without a launcher, which could hand no signal on to it.
    """
    given = ["--config", config_path, *(["--resume", resume] if resume != "auto" else []), *overrides]
    if not SIGNALS_CAN_BE_SENT:
        return [sys.executable, "-P", str(REPO_ROOT / "trainer" / "main.py"), *given]
    machines: list[str] = []
    if node is not None and node.count > 1:
        machines = ["--num_machines", str(node.count), "--machine_rank", str(node.rank), "--main_process_ip", node.head]
    return [
        # -P: a file in the user's folder must not hide a module of the same name.
        *(sys.executable, "-P", "-m", "launch.without_traceback", "accelerate.commands.launch"),
        *("--config_file", str(REPO_ROOT / "configs" / "engines" / f"{engine}.yaml")),
        *("--num_processes", str(num_processes)),
        *("--main_process_port", str(port)),
        *machines,
        str(REPO_ROOT / "trainer" / "main.py"),
        *given,
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
            **allocator_settings(inherited),
        }
        for rank in range(num_workers)
    ]


def render_adapter_check(config_path: str, overrides: Sequence[str]) -> list[str]:
    """The command that reads the adapter at a config's method.init_from, as an argument list."""
    return [sys.executable, "-P", "-m", "trainer.check_adapter", config_path, *overrides]


def render_export(
    source: Path, out: Path, *, step: str | None, form: str, weights: str, dtype: str | None, base: str | None
) -> list[str]:
    """The command that exports a checkpoint, as an argument list; trainer/export/from_checkpoint.py explains each."""
    line = [sys.executable, "-P", "-m", "trainer.export.from_checkpoint", str(source), "--out", str(out)]
    given = {"--format": form, "--weights": weights, "--step": step, "--dtype": dtype, "--base": base}
    return [*line, *_render_options(given)]


def render_conversion(file: Path, rest: Path, out: Path, files: Mapping[str, Path]) -> list[str]:
    """The command that makes a model folder of single files, as an argument list; trainer/export/from_files.py explains
    it.  files: vae, clip, t5."""
    given = {"--rest": rest, "--out": out, **{f"--{name}": path for name, path in files.items()}}
    return [sys.executable, "-P", "-m", "trainer.export.from_files", str(file), *_render_options(given)]


def render_fill(source: Path, image: Path, mask: Path, out: Path, options: Mapping[str, object]) -> list[str]:
    """The command that fills pictures, as an argument list. options: flag -> value; those of None are left out."""
    given = {"--image": image, "--mask": mask, "--out": out, **options}
    return [sys.executable, "-P", "-m", "trainer.evaluation.fill", str(source), *_render_options(given)]


def render_evaluate(run: Path, steps: Sequence[int], options: Mapping[str, object], *, consistency: bool) -> list[str]:
    """The command that evaluates a run, as an argument list. options: flag -> value; those of None are left out."""
    line = [sys.executable, "-P", "-m", "trainer.evaluation.evaluate", str(run)]
    line += [f"--step={step}" for step in steps]
    return [*line, *_render_options(options), "--consistency" if consistency else "--no-consistency"]


def _render_options(options: Mapping[str, object]) -> list[str]:
    return [f"{flag}={value}" for flag, value in options.items() if value is not None]


def render_environment(
    outcome_file: Path,
    num_processes: int,
    num_cores: int,
    inherited: Mapping[str, str],
    shutdown_seconds: int = SHUTDOWN_SECONDS,
) -> dict[str, str]:
    """The variables to set for a run, on top of those inherited.

    Without the first two, USR1 would end torch's launcher and orphan the ranks, and a save would be cut off after 30 s.
    Left alone, accelerate gives every process one CPU thread; a value of the user's own is kept.
    """
    return {
        "PET_SIGNALS_TO_HANDLE": ",".join(number.name for number in STOP_SIGNALS),
        "PET_SHUTDOWN_TIMEOUT": str(shutdown_seconds),
        "FLUXFILL_OUTCOME": str(outcome_file),
        "OMP_NUM_THREADS": _threads_each(num_processes, num_cores, inherited),
        **allocator_settings(inherited),
    }


def _threads_each(num_processes: int, num_cores: int, inherited: Mapping[str, str]) -> str:
    return inherited.get("OMP_NUM_THREADS") or str(max(num_cores // num_processes, 1))


def render_shell_line(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """One line that does the same when pasted into a shell."""
    settings = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    return " ".join([*settings, shlex.join(command)])
