"""A config as the text of batch scripts. All that a user or a config may have named is quoted for the shell, or for the
`#SBATCH` lines, which sbatch reads by rules of its own."""

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jinja2

from configs.errors import InputError
from configs.schema import Config
from configs.slurm_schema import SlurmConfig

_TEMPLATES = Path(__file__).parent / "templates"
_MAIL_EVENTS = "END,FAIL,REQUEUE"


def render_train(config: Config, config_path: str, overrides: Sequence[str], folder: Path, gpus_per_node: int) -> str:
    """The batch script of a training job.

    folder: where it runs, so that relative paths mean what they meant to whoever submits it; its log goes there.
    """
    slurm = config.slurm
    directives = [f"--nodes={slurm.nodes}", "--ntasks-per-node=1", f"--gpus-per-node={gpus_per_node}"]
    directives += [f"--cpus-per-task={slurm.cpus_per_gpu * gpus_per_node}", f"--signal=USR1@{slurm.signal_seconds}"]
    title = f"Trains {config_path} on {slurm.nodes} x {gpus_per_node} GPUs."
    return _render(title, "train", config, slurm, config_path, overrides, folder, directives, log="%x-%j.log")


def render_preprocess(
    config: Config, config_path: str, overrides: Sequence[str], folder: Path, kind: Literal["array", "rest"]
) -> str:
    """The batch script that preprocesses: an array of slurm.preprocess.tasks tasks; or one job for the rest, which ends
    in seconds where nothing is left, and only then with 0."""
    slurm = for_preprocessing(config.slurm)
    gpus = slurm.preprocess.gpus_per_node
    directives = ["--nodes=1", "--ntasks-per-node=1", f"--gpus-per-node={gpus}"]
    directives += [f"--cpus-per-task={slurm.cpus_per_gpu * gpus}"]
    if kind == "array":
        directives.insert(0, f"--array=0-{slurm.preprocess.tasks - 1}")
    title = f"Encodes the pictures of {config_path}" + ("." if kind == "array" else ": what is left of them.")
    log = "%x-%A_%a.log" if kind == "array" else "%x-%j.log"
    return _render(title, "preprocess", config, slurm, config_path, overrides, folder, directives, log)


def for_preprocessing(slurm: SlurmConfig) -> SlurmConfig:
    """The section with what slurm.preprocess asks for in the place of what training does."""
    own = slurm.preprocess
    asked = own.model_dump(include={"constraint", "memory_per_node", "sbatch_lines"})
    elsewhere = own.model_dump(include={"partition", "qos", "time", "cpus_per_gpu"}, exclude_none=True)
    return slurm.model_copy(update=asked | elsewhere)


def _render(
    title: str,
    work: str,
    config: Config,
    slurm: SlurmConfig,
    config_path: str,
    overrides: Sequence[str],
    folder: Path,
    directives: list[str],
    log: str,
) -> str:
    name = config.run.name if work == "train" else f"{config.run.name}-preprocess"
    python = f"{slurm.venv}/bin/python" if slurm.venv is not None else sys.executable
    module = [*map(shlex.quote, [python, "-P", "-m", "launch.slurm.job", work, config_path])]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    return environment.get_template("job.sbatch.j2").render(
        title=re.sub(r"[\x00-\x1f\x7f]", "?", title),
        directives=[
            f"--job-name={name}",
            *directives,
            "--requeue",
            "--open-mode=append",
            f"--output={quote_directive(_log_file(folder, log))}",
            *site_directives(slurm),
        ],
        modules=slurm.modules,
        folder=shlex.quote(str(folder)),
        command=[" ".join(module), *map(shlex.quote, overrides)],
    )


def site_directives(slurm: SlurmConfig) -> list[str]:
    """What the site asks for, in the order of the config."""
    options = {
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "reservation": slurm.reservation,
        "constraint": slurm.constraint,
        "exclude": slurm.exclude,
        "time": slurm.time,
        "mem": slurm.memory_per_node,
        "mail-user": slurm.mail_user,
        "mail-type": slurm.mail_user and _MAIL_EVENTS,
        "comment": slurm.comment,
    }
    given = [f"--{name}={quote_directive(str(value))}" for name, value in options.items() if value is not None]
    foreign = [line.partition("=") for line in slurm.sbatch_lines]
    return given + [f"{name}={quote_directive(value)}" if equals else name for name, equals, value in foreign]


def quote_directive(value: str) -> str:
    """A value for an `#SBATCH` line: as it is if plain, else in the quotes and backslashes that sbatch takes off."""
    if re.fullmatch(r"[A-Za-z0-9_.:@%+,/=-]+", value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _log_file(folder: Path, name: str) -> str:
    """The path of a log. Raises InputError for a folder whose name sbatch would read as something else: the job would
    end before it starts, and leave no log that says why."""
    if match := re.search(r"[%\\\x00-\x1f\x7f]", str(folder)):
        raise InputError(
            f"{str(folder)!r} holds {match[0]!r}, which sbatch cannot have in the name of a log: submit the job from "
            "another folder"
        )
    return f"{folder}/{name}"
