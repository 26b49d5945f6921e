"""The section `slurm` of a config: what a cluster asks of a job, and how the job starts on its nodes.

Everything here ends in a batch script or on a command line, so what is not plain letters is refused by name, or is text
that may be quoted (`launch/slurm/render.py`).
"""

import math
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints, field_validator

from configs.errors import WhatAndCure
from configs.section import Count, PositiveInt, Section, expand_home

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|_KEY$", re.IGNORECASE)
_OPTION = re.compile(r"--([a-z][a-z-]*)(?:=(.*))?")
# fmt: off
_OWN_OPTIONS = {
    "account", "array", "chdir", "comment", "constraint", "cpus-per-task", "dependency", "error", "exclude", "export",
    "gpus", "gpus-per-node", "job-name", "mail-type", "mail-user", "mem", "no-requeue", "nodes", "ntasks",
    "ntasks-per-node", "open-mode", "output", "partition", "qos", "requeue", "reservation", "signal", "time",
}
# fmt: on


def _one_line(text: str) -> str:
    if _CONTROL.search(text):
        raise ValueError("has a line break or another control character: leave it out")
    return text


Text = Annotated[str, StringConstraints(min_length=1), AfterValidator(_one_line)]
Place = Annotated[Text, BeforeValidator(expand_home)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:@+,-]+$")]
Nodes = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.,\[\]-]+$", examples=["n[03-05],n17", "n7"])]
Constraint = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:&|*()\[\]+-]+$", examples=["h100&ib", "a100|h100"])]
Memory = Annotated[str, Field(pattern=r"^\d+[KMGT]?$", examples=["500G", "64000M"])]
Time = Annotated[
    str,
    Field(pattern=r"^(\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d){0,2}|UNLIMITED)$", examples=["24:00:00", "2-12:00:00"]),
]


def _limit_seconds(time: str | int | None) -> float:
    """Of a time limit as sbatch reads it: minutes, minutes:seconds, hours:minutes:seconds, or days-hours and so on; 0
    is none."""
    if time is None or time == "UNLIMITED":
        return math.inf
    days, dash, clock = str(time).rpartition("-")
    fields = [int(field) for field in clock.split(":")]
    if dash:
        fields += [0] * (3 - len(fields))
    elif len(fields) == 1:
        fields.append(0)
    seconds = 0
    for field in fields:
        seconds = 60 * seconds + field
    return 86400 * int(days or 0) + seconds or math.inf


def _foreign_options(lines: list[str]) -> list[str]:
    for line in lines:
        option = _OPTION.fullmatch(line)
        if option is None:
            raise ValueError(f"{line!r} is no long option of sbatch: write --name or --name=value")
        if option[1] in _OWN_OPTIONS:
            raise ValueError(f"--{option[1]} has a key of its own in this section, or is set by the script")
    return lines


SbatchLines = Annotated[list[Text], AfterValidator(_foreign_options)]


class ContainerConfig(Section):
    """The container that training runs in; the batch script itself stays outside."""

    runtime: Literal["pyxis", "apptainer"]
    """pyxis: srun --container-image (NVIDIA's plugin, over enroot); apptainer: apptainer exec."""

    image: Annotated[Place, Field(examples=["/shared/fluxfill.sqsh"])]
    """A file, or a name that the runtime knows."""

    mounts: list[Place] = []
    """Folders to mount, as from:to. The folder that the job was submitted from is mounted anyway."""

    python: Text = "python3"
    """The interpreter inside that has fluxfill."""


class PreprocessJobConfig(Section):
    """The jobs that preprocess, which seldom need what training does: a GPU or a few, not all of a node's memory."""

    tasks: PositiveInt = 4
    """Tasks of the array."""

    partition: Name | None = None
    """sbatch --partition. null: as for training."""

    qos: Name | None = None
    """sbatch --qos. null: as for training."""

    constraint: Constraint | None = None
    """sbatch --constraint. null: any node of the partition."""

    time: Time | PositiveInt | None = None
    """sbatch --time. null: as for training."""

    gpus_per_node: PositiveInt = 1
    """GPUs of each task, with a worker each."""

    cpus_per_gpu: PositiveInt | None = None
    """CPU cores for each GPU. null: as for training."""

    memory_per_node: Memory | Count | None = None
    """sbatch --mem of each task. null: the site's default."""

    sbatch_lines: SbatchLines = []
    """Further options of sbatch, one a line; those of training are not taken."""


class SlurmConfig(Section):
    """Jobs on a SLURM cluster; every key may be left out."""

    partition: Name | None = None
    """sbatch --partition. null: the site's default."""

    account: Name | None = None
    """sbatch --account. null: the user's default."""

    qos: Name | None = None
    """sbatch --qos. null: the site's default."""

    reservation: Name | None = None
    """sbatch --reservation. null: none."""

    constraint: Constraint | None = None
    """sbatch --constraint of training: features that its nodes must have. null: any."""

    exclude: Nodes | None = None
    """sbatch --exclude: nodes that are not to be used. null: none."""

    time: Time | PositiveInt | None = None
    """sbatch --time: minutes, hours:minutes:seconds or days-hours. null: the partition's limit."""

    nodes: PositiveInt = 1
    """Nodes that train together."""

    gpu: Text | None = None
    """A profile of configs/gpus/, which tells how many GPUs a node has. null: `gpus_per_node` does."""

    gpus_per_node: PositiveInt | None = None
    """GPUs of each node, with a training process each. null: as `gpu` says; without it 1, of one node."""

    cpus_per_gpu: PositiveInt = 8
    """CPU cores for each GPU."""

    memory_per_node: Memory | Count | None = None
    """sbatch --mem; 0 is all of a node's. null: the site's default, which may be too little to load a model."""

    mail_user: Annotated[str, Field(pattern=r"^[^@\s\"'\\$`]+@[A-Za-z0-9.-]+$")] | None = None
    """Who is written to when a job ends, fails or is requeued. null: nobody."""

    comment: Text | None = None
    """sbatch --comment. null: none."""

    sbatch_lines: SbatchLines = []
    """Further options of sbatch for training, such as --licenses=scratch, one a line."""

    modules: list[Annotated[str, Field(pattern=r"^[A-Za-z0-9_./+-]+$")]] = []
    """Loaded by `module load` before anything else."""

    venv: Place | None = None
    """Virtual environment with fluxfill, on a disk that all nodes see. null: that of the command that writes the
    script."""

    container: ContainerConfig | None = None
    """null: the training processes run as the batch script does."""

    scratch: Annotated[Place, Field(examples=["$SLURM_TMPDIR/shards"])] | None = None
    """In the place of data.local_cache: a folder on each node's own disk. Variables are those of the node."""

    interface: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$", examples=["ib0"])] | None = None
    """Network interface by which the nodes talk: where they meet, and for NCCL and Gloo. null: the one that leads from
    the first node to the others; NCCL chooses its own."""

    env: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], Text] = {}
    """Variables of the training processes, such as NCCL_DEBUG. No secrets: configs are stored with every run."""

    preflight: Annotated[bool, Field(strict=True)] = True
    """Look at all nodes before weights load: files, packages, clocks, GPUs, memory, and an all-reduce between them. A
    node that is broken is kept from the restart."""

    signal_seconds: PositiveInt = 300
    """How long before the time limit the run is told to save. SLURM may be up to a minute early or late, and ranks that
    have not saved 90 seconds before the limit are killed, so that the job can start again."""

    max_restarts: Count = 3
    """Restarts in a row that may bring no new checkpoint; then the job stops."""

    chain: PositiveInt | None = None
    """Jobs that `fluxfill slurm submit` submits, each to go on where the one before it ended, for sites that forbid
    `scontrol requeue`. null: one job, which requeues itself, as every job does that is submitted otherwise."""

    preprocess: PreprocessJobConfig = PreprocessJobConfig()
    """The jobs that preprocess. What is not here they take from this section."""

    @field_validator("env")
    @classmethod
    def _no_secrets(cls, env: dict[str, str]) -> dict[str, str]:
        if secrets := sorted(name for name in env if _SECRET.search(name)):
            raise ValueError(
                f"{', '.join(secrets)} looks like a secret, and configs are stored with every run: export it in the "
                "shell that submits the job"
            )
        return env


def problem_of_signal(slurm: SlurmConfig) -> WhatAndCure | None:
    """Why the run would be told to save too early in the time that it gets; None: it is not."""
    limit = _limit_seconds(slurm.time)
    if slurm.signal_seconds <= limit / 2:
        return None
    return WhatAndCure(
        f"slurm.signal_seconds is {slurm.signal_seconds}, but slurm.time is {slurm.time}, {limit:,} s: the run would "
        "be told to save before half of it is over",
        f"Set slurm.signal_seconds={max(int(limit) // 2, 1)} or less, or a longer slurm.time.",
    )
