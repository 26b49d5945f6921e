"""The command line `fluxfill`. Imports no torch: it starts in a moment, and on login nodes."""

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from typer.core import TyperGroup

from configs.errors import InputError
from configs.library_warnings import quiet_libraries
from configs.lighter_imports import lighten_imports
from configs.loading import json_schema, load_config
from configs.supervision import BAD_INPUT
from data.preprocessing.worker import which_worker
from data.sources.problems import ProblemsFound, print_found
from launch import shards
from launch.command import (
    choose_engine,
    render_command,
    render_environment,
    render_export,
    render_preprocess,
    render_shell_line,
    render_worker_environments,
)
from launch.gpus import count_gpus, count_training_gpus
from launch.preprocess_first import reason_to_train_at_once
from launch.supervise import Outcome, run_supervised, run_workers


class _Commands(TyperGroup):
    """Ends in exit code 2 and a plain message, no traceback, when what the user gave is wrong."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ProblemsFound as error:
            print_found(Console(stderr=True), error)
            raise typer.Exit(BAD_INPUT) from error
        except InputError as error:
            _print_error(str(error))
            raise typer.Exit(BAD_INPUT) from error


app = typer.Typer(
    name="fluxfill",
    cls=_Commands,
    help="Train FLUX.1 inpainting models (FLUX.1-Fill) from folders of pictures.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

app.add_typer(shards.app, name="shards")

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, such as configs/fill_lora.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Keys of the config to set otherwise: train.lr=5e-5", show_default=False),
]


def main() -> None:
    """Entry point of the program."""
    app()


@app.command()
def schema(
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it there instead of printing it.")] = None,
) -> None:
    """The JSON Schema of configs: with it an editor completes keys and marks mistakes.

    Example: fluxfill schema --out configs/schema.json
    """
    text = json.dumps(json_schema(), indent=2) + "\n"
    if out is None:
        typer.echo(text, nl=False)
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"--out {out}: cannot be written ({error.strerror}). Give a file in a folder that exists."
        ) from error


@app.command()
def preprocess(
    config: ConfigPath,
    overrides: Overrides = None,
    worker: Annotated[
        int | None, typer.Option(min=0, help="Which of several workers this is, from 0.", show_default=False)
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="How many workers there are.", show_default=False)] = None,
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
    """Encode the pictures once and write the shards that training reads.

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


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    num_processes: Annotated[
        int | None, typer.Option(min=1, help="Training processes; by default one per GPU.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be run.")] = False,
) -> None:
    """Train, on every GPU of this machine: encode what the cache lacks, then print the command that trains, and run it.

    The same line starts a run and goes on with it. With data.preprocess=never the cache is taken as it is.

    Exit codes: 0 done, 2 bad input, 75 stopped and resumable, 1 anything else.

    Example: fluxfill train configs/fill_lora.yaml train.lr=5e-5 run.name=slower
    """
    run = load_config(config, overrides or [])
    num_gpus = count_training_gpus(count_gpus(os.environ), run.data.encoder_devices)
    num_cores = len(os.sched_getaffinity(0))
    engine, count = choose_engine(run.parallel.engine, num_processes, num_gpus)
    outcome_file = run.run.folder / "outcome.json"
    command = render_command(config, overrides or [], engine, count, port=0)
    environment = render_environment(outcome_file, count, num_cores, inherited=os.environ)

    if reason := reason_to_train_at_once(run, config):
        typer.echo(f"not preprocessed first: {reason}")
    else:
        num_workers = max(1, min(count, num_gpus))  # on the GPUs that are to train; a CPU is one worker's
        typer.echo(shlex.join(["fluxfill", "preprocess", config, *(overrides or [])]) + f"  # workers: {num_workers}")
        workers = render_worker_environments(num_workers, num_cores, inherited=os.environ)
        if not dry_run:
            _end_unless_done("preprocessing", run_workers(render_preprocess(config, overrides or []), workers))
    typer.echo(render_shell_line(command, environment))
    if not dry_run:
        _end_unless_done("training", run_supervised(command, environment, outcome_file))


def _end_unless_done(what: str, outcome: Outcome) -> None:
    """End the program with the outcome's code unless that is 0, and say why."""
    if outcome.code == 0:
        return
    Console().show_cursor()  # which a bar hides, and does not bring back when it is ended by a signal
    step = "" if outcome.step is None else f" (step {outcome.step})"
    _print_error(f"{what}: {outcome.reason}{step}")
    raise typer.Exit(outcome.code)


@app.command()
def export(
    source: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT_OR_RUN", help="A step-<number> folder, or a run: its newest one.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write; it must not be there yet.")],
    weights: Annotated[
        Literal["live", "ema"], typer.Option(help="The trained weights, or their moving average.")
    ] = "live",
    dtype: Annotated[
        Literal["fp32", "bf16"] | None,
        typer.Option(help="By default adapters are written in fp32, whole models in bf16.", show_default=False),
    ] = None,
) -> None:
    """Make of a checkpoint what others load: an adapter, or a whole FLUX.1-Fill folder. Needs no GPU.

    Works on the checkpoints of every engine and any number of GPUs, while the run goes on, and holds 4 GiB of weights
    at a time.

    Example: fluxfill export runs/fill-lora --out sofa-removal --weights ema
    """
    command = render_export(source, out, weights, dtype)
    raise typer.Exit(subprocess.run(command, check=False).returncode)


def _print_error(message: str) -> None:
    """On standard error; in red where that is a terminal."""
    Console(stderr=True).print(message, style="red", markup=False, highlight=False, soft_wrap=True)
