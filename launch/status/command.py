"""The command `fluxfill status`."""

import re
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from configs.errors import InputError
from launch.slurm.restarts import read_job_events
from launch.status.jobs import ask_queue, find_run_of, with_queue
from launch.status.report import render_json, render_page, render_table
from launch.status.run import RunStatus, find_runs, is_run, read_status
from launch.status.worries import find_worries

_RUNS = Path("runs")
_LAST_JOBS = 20  # of a run, that the queue is asked for


def status(
    place: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN|JOBID", help="A run's folder, a folder of runs, or a SLURM job; by default all below runs/."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    watch: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=1, help="Show it again and again.", show_default=False)
    ] = None,
) -> None:
    """Show where runs stand: step, loss, pace, time left. Restarts, checkpoint, validation and what is worrying, too.

    All of it is read from a run's folder, so it works for everybody who may read that, on any machine.

    Example: fluxfill status runs/fill-lora --watch 10
    """
    folders, is_one = _find(place)
    console = Console()
    while True:
        found = [_look_at(folder) for folder in folders]
        if watch is not None and console.is_terminal:
            console.clear()
        if as_json:
            typer.echo(render_json(found))
        elif is_one:
            console.print(render_page(*found[0]), soft_wrap=not console.is_terminal)
        else:
            console.print(render_table(found))
        if watch is None:
            return
        time.sleep(watch)
        if not is_one:
            folders, _ = _find(place)


def _find(place: str | None) -> tuple[list[Path], bool]:
    """(runs, whether one was asked for). Raises InputError if there is none."""
    if place is not None and not Path(place).exists() and re.fullmatch(r"\d+(_\d+)?", place):
        return [find_run_of(place, _RUNS)], True
    root = _RUNS if place is None else Path(place)
    if place is not None and is_run(root):
        return [root], True
    if not root.is_dir():
        raise InputError(f"{root}: no such folder. Give a run's folder, a folder of runs, or the id of a SLURM job.")
    if runs := find_runs(root):
        return runs, False
    raise InputError(f"{root}: no run is in it (config.yaml, metrics.jsonl). Give a run's folder, or a folder of runs.")


def _look_at(run: Path) -> tuple[RunStatus, list[str]]:
    told = read_status(run)
    try:
        jobs = dict.fromkeys(event.job for event in read_job_events(run)[-_LAST_JOBS:])
    except OSError:
        jobs = {}
    queued = ask_queue(list(jobs))
    told = with_queue(told, queued)
    return told, find_worries(told, queued)
