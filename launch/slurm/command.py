"""`fluxfill slurm`: the batch scripts of a config, shown, written or submitted."""

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from configs.errors import InputError
from configs.loading import load_config
from configs.schema import Config
from data.cache_layout import MANIFEST
from launch.arguments import ConfigPath, Overrides
from launch.command import choose_on_nodes
from launch.gpus import gpus_of_a_node, idle_gpus
from launch.slurm.job import CHAIN, CHAIN_LAST
from launch.slurm.render import render_preprocess, render_train
from launch.slurm.restarts import JobEvent, write_job_event
from launch.slurm.submit import submit_job

app = typer.Typer(
    help="Train on a SLURM cluster.", no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
)

Nodes = Annotated[int | None, typer.Option(metavar="N", min=1, help="Set slurm.nodes.", show_default=False)]
Gpu = Annotated[
    str | None, typer.Option(metavar="NAME", help="Set slurm.gpu: a profile of configs/gpus/.", show_default=False)
]


@app.command()
def render(
    config: ConfigPath,
    overrides: Overrides = None,
    gpu: Gpu = None,
    nodes: Nodes = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the scripts there instead of printing.")
    ] = None,
) -> None:
    """Show the batch script that `submit` would submit. With --out it is written, and that of preprocessing too.

    Example: fluxfill slurm render configs/fill_lora.yaml slurm.partition=gpu --gpu h100-80gb --nodes 2
    """
    given = _with_options(overrides, gpu, nodes)
    scripts = _render_scripts(load_config(config, given), config, given)
    if out is None:
        typer.echo(scripts["train.sbatch"], nl=False)
        return
    for path in _write(scripts, out):
        typer.echo(f"{path}")


@app.command()
def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    gpu: Gpu = None,
    nodes: Nodes = None,
    with_preprocess: Annotated[
        bool, typer.Option("--with-preprocess", help="Encode the pictures first, by an array of jobs.")
    ] = False,
) -> None:
    """Submit a training job that goes on by itself. It does so after time limits, preemption and failures.

    Its scripts are kept in the run's folder. With --with-preprocess an array encodes the pictures first, a last job
    does what its tasks have left, and training waits for that one.

    Example: fluxfill slurm submit configs/fill_lora.yaml --gpu h100-80gb --nodes 2 --with-preprocess
    """
    given = _with_options(overrides, gpu, nodes)
    loaded = load_config(config, given)
    _refuse_missing_cache(loaded, with_preprocess)
    scripts = _render_scripts(loaded, config, given)
    train, array, rest = _write(scripts, loaded.run.folder / "slurm")
    waits: list[str] = []
    if with_preprocess:
        tasks = _submit(array, f"preprocessing, {loaded.slurm.preprocess.tasks} tasks")
        # Not afterok: of a task that failed and would never come true. What it left, this one does.
        last = _submit(rest, "the rest of preprocessing", [f"--dependency=afterany:{tasks}"])
        waits = [f"--dependency=afterok:{last}", "--kill-on-invalid-dep=yes"]
    chain = {CHAIN: secrets.token_hex(4)} if loaded.slurm.chain is not None else {}
    count = loaded.slurm.chain or 1
    for number in range(count):
        if chain and number == count - 1:
            chain[CHAIN_LAST] = "1"
        job = _submit(train, "training" if number == 0 else "training, should it not be finished", waits, chain)
        write_job_event(loaded.run.folder, JobEvent(job, "submitted"))
        waits = [f"--dependency=afternotok:{job}", "--kill-on-invalid-dep=yes"]


def _refuse_missing_cache(config: Config, with_preprocess: bool) -> None:
    """Raises InputError if the job would wait in the queue and then find no cache, or nowhere to make one."""
    cache = config.data.cache_folder if with_preprocess else config.data.cache
    if config.data.mode == "online" or with_preprocess or not isinstance(cache, Path):
        return
    if not (cache / MANIFEST).is_file():
        raise InputError(f"data.cache {cache}: no finished cache is there. Add --with-preprocess to make it first.")


def _with_options(overrides: list[str] | None, gpu: str | None, nodes: int | None) -> list[str]:
    """The overrides and, after them, what was given as an option."""
    options = {"slurm.gpu": gpu, "slurm.nodes": nodes}
    return [*(overrides or []), *(f"{key}={value}" for key, value in options.items() if value is not None)]


def gpus_per_node(config: Config, nodes: int) -> int:
    """GPUs of a node: slurm.gpus_per_node, else those of the profile slurm.gpu, else 1 of one node. Raises InputError
    for several nodes of which neither says it, and for a profile that does not."""
    slurm = config.slurm
    if each := gpus_of_a_node(slurm):
        return each
    if slurm.gpu is not None:
        raise InputError(f"slurm.gpu is {slurm.gpu}, and nodes hold any number of it: set slurm.gpus_per_node.")
    if nodes > 1:
        raise InputError(
            f"{nodes} nodes, and neither slurm.gpus_per_node nor slurm.gpu says how many GPUs each of them has: "
            "set slurm.gpus_per_node=8, for example, or slurm.gpu=h100-80gb."
        )
    return 1


def _render_scripts(config: Config, config_path: str, overrides: list[str]) -> dict[str, str]:
    """The text of each script by its name. Raises InputError for an engine that the job would refuse when it starts,
    and tells of GPUs that would be idle in it."""
    folder = Path.cwd()
    each = gpus_per_node(config, config.slurm.nodes)
    _, processes = choose_on_nodes(config, config.slurm.nodes, each)
    if idle := idle_gpus(config, config.slurm.nodes * processes):
        typer.echo(idle, err=True)
    return {
        "train.sbatch": render_train(config, config_path, overrides, folder, each),
        "preprocess.sbatch": render_preprocess(config, config_path, overrides, folder, "array"),
        "preprocess-rest.sbatch": render_preprocess(config, config_path, overrides, folder, "rest"),
    }


def _write(scripts: dict[str, str], out: Path) -> list[Path]:
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in scripts.items():
            (out / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{out}: the scripts cannot be written there ({error.strerror}).") from error
    return [out / name for name in scripts]


def _submit(script: Path, what: str, options: Sequence[str] = (), chain: Mapping[str, str] | None = None) -> str:
    own = {name: value for name, value in os.environ.items() if name not in (CHAIN, CHAIN_LAST)}  # an outer job's
    job = submit_job(script, Path.cwd(), own | dict(chain or {}), options)
    typer.echo(f"{job}  {what}  ({script})" + (f"  {options[0]}" if options else ""))
    return job
