"""The command `fluxfill preprocess`."""

import os
from typing import Annotated

import typer
from rich.console import Console

from configs.library_warnings import quiet_libraries
from configs.lighter_imports import lighten_imports
from configs.loading import load_config
from data.preprocessing.worker import which_worker
from launch.arguments import ConfigPath, Overrides


def preprocess(
    config: ConfigPath,
    overrides: Overrides = None,
    worker: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="Which of several workers this is, from 0.", show_default=False),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="How many workers there are.", show_default=False)
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only say what it would do: pictures, shards, bytes, measured hours."),
    ] = False,
    thorough: Annotated[
        bool,
        typer.Option("--thorough", help="Decode every picture in full first: finds files that were cut off."),
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Delete what the cache holds for another run, where it is in the way.")
    ] = False,
) -> None:
    """Encode the pictures once, as shards that training reads.

    Any number of processes may do it together, on one machine or many: the tasks of a SLURM array, the ranks of
    accelerate launch or srun, or those told --worker and --workers. Each takes shards that nobody has. Stopped at any
    moment, the same command does the rest.

    Example: fluxfill preprocess configs/fill_lora.yaml data.encode_batch_size=16
    """
    run = load_config(config, overrides or [])
    which = which_worker(os.environ, worker=worker, workers=workers)
    quiet_libraries()
    lighten_imports()
    from data.preprocessing import run as job  # imports torch, which the other commands do without

    (job.dry_run if dry_run else job.preprocess)(run, Console(), which, thorough=thorough, replace=replace)
