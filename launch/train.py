"""The command `fluxfill train`."""

import os
import shlex
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from configs.errors import InputError, StorageFailed, print_error
from configs.loading import load_config
from configs.redact import redact
from configs.this_machine import count_cores
from configs.webhook import notify_end
from data.preprocessing.worker import is_batch_script
from data.storage.run_lock import VARIABLE, own_run_folder
from launch.arguments import ConfigPath, Overrides
from launch.check.paths import check_folder
from launch.checkpoints import suggest_checkpoint
from launch.command import (
    Node,
    check_node,
    choose_engine,
    render_command,
    render_environment,
    render_preprocess,
    render_shell_line,
    render_worker_environments,
)
from launch.gpus import count_gpus, count_training_gpus, refuse_missing_gpus
from launch.preprocess_first import reason_to_train_at_once
from launch.supervise import OTHER_NODES_SECONDS, Again, Outcome, run_supervised, run_workers


def train(
    config: ConfigPath,
    overrides: Overrides = None,
    num_processes: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Training processes; by default one per GPU.", show_default=False),
    ] = None,
    nodes: Annotated[int, typer.Option(metavar="N", min=1, help="Machines that train together.")] = 1,
    node_rank: Annotated[int, typer.Option(metavar="N", min=0, help="Which of them this is, from 0.")] = 0,
    head: Annotated[str, typer.Option(metavar="ADDRESS", help="The first of them.")] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, max=65535, help="Its port, where all meet; 0 on one machine takes a free one."
        ),
    ] = 0,
    resume: Annotated[
        str, typer.Option(metavar="auto|never|FOLDER", help="The newest intact checkpoint, none, or the one in FOLDER.")
    ] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be run.")] = False,
) -> None:
    """Train on every GPU of this machine. Encodes what the cache lacks, then prints the command that trains, and runs
    it.

    The same line starts a run and goes on with it. With data.preprocess=never, or on several machines, the cache is
    taken as it is. Those machines each get this line, with a --node-rank of their own.

    Exit codes: 0 done, 2 bad input, 3 the run folder is another start's, 75 stopped and resumable, 1 anything else.

    Example: fluxfill train configs/fill_lora.yaml train.lr=5e-5 run.name=slower
    """
    run = load_config(config, overrides or [])
    here = count_gpus(os.environ)
    refuse_missing_gpus(run.data, here)
    num_gpus = count_training_gpus(here, run.data.encoder_devices)
    num_cores = count_cores()
    _, count = choose_engine(run.parallel.engine, num_processes, num_gpus)
    outcome_file = run.run.folder / "outcome.json"
    node = check_node(Node(node_rank, nodes, head), port)
    engine, total = choose_engine(run.parallel.engine, count * nodes, count * nodes)
    if resume not in ("auto", "never"):
        _refuse_no_checkpoint(Path(resume))
    command, going_on = (
        render_command(config, overrides or [], engine, total, port, node, where) for where in (resume, "auto")
    )
    environment = render_environment(outcome_file, count, num_cores, inherited=os.environ)

    place = check_folder("run.dir", run.run.folder)
    if place.state == "error":  # now, not after hours of encoding
        raise InputError(f"{place.what}. {place.cure}")
    reason = "several machines train" if nodes > 1 else reason_to_train_at_once(run, config, begins=resume == "never")
    with ExitStack() as stack:
        lock = None
        if not dry_run and node_rank == 0:
            lock = stack.enter_context(own_run_folder(run.run.folder, os.environ, supervisor="fluxfill train"))
        if reason:
            typer.echo(f"not preprocessed first: {reason}")
        else:
            num_workers = max(1, min(count, num_gpus))  # on the GPUs that are to train; a CPU is one worker's
            line = ["fluxfill", "preprocess", config, *(overrides or [])]
            typer.echo(f"{redact(shlex.join(line), home='')}  # workers: {num_workers}")
            workers = render_worker_environments(num_workers, num_cores, inherited=os.environ)
            if not dry_run:
                encoded = run_workers(render_preprocess(config, overrides or []), workers)
                if encoded.code != 0:
                    notify_end(run.run.name, code=encoded.code, reason=f"preprocessing: {encoded.reason}", step=None)
                _end_unless_done("preprocessing", encoded)
        typer.echo(redact(render_shell_line(command, environment), home=""))
        if is_batch_script():
            print_error(
                "This is a batch script, and SLURM signals the steps of a job: at the time limit this run would be "
                "killed unsaved. Start it by `exec srun --export=ALL fluxfill train ...`, or by `fluxfill slurm "
                "submit`."
            )
        if not dry_run:
            # On the other machines an outcome of an earlier start is the first one's to remove.
            owned = environment if lock is None else environment | {VARIABLE: lock.owner.id}
            again: tuple[Again, ...] = ("out of memory", "hang") if nodes == 1 else ()
            outcome = run_supervised(
                command,
                owned,
                outcome_file,
                is_alone=node_rank == 0,
                stop_after_failure=OTHER_NODES_SECONDS if nodes > 1 else None,
                restarts_after=again,
                once_saved=going_on,
            )
            if lock is not None:
                with suppress(StorageFailed, OSError):  # a disk that does not answer: not lost
                    lock.refuse_loss()  # the outcome would be another's
            if node_rank == 0:
                notify_end(run.run.name, code=outcome.code, reason=outcome.reason, step=outcome.step)
            _end_unless_done("training", outcome)


def _refuse_no_checkpoint(folder: Path) -> None:
    """Raise InputError if --resume names none: now, not after hours of encoding."""
    if not folder.is_dir():
        raise InputError(f"--resume {folder}: no such folder. Give auto, never, or a checkpoint (step-<number>).")
    if (suggested := suggest_checkpoint(folder)) is not None:
        raise InputError(f"--resume {folder}: no checkpoint (no COMPLETE). Give auto, never, or {suggested}")


def _end_unless_done(what: str, outcome: Outcome) -> None:
    """End the program with the outcome's code unless that is 0, and say why."""
    if outcome.code == 0:
        return
    Console().show_cursor()  # which a bar hides, and does not bring back when it is ended by a signal
    step = "" if outcome.step is None else f" (step {outcome.step})"
    print_error(f"{what}: {outcome.reason}{step}")
    raise typer.Exit(outcome.code)
