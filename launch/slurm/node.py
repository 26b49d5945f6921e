"""What a job's step runs on each node: torch's launcher, or the workers that preprocess, under a supervisor.

SLURM signals a step's first process on each node, which is this one, and no other; when it ends, the rest of the node's
processes are killed at once. So it hands the signal on, and waits until the last rank has saved.
"""

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from configs.errors import InputError
from configs.loading import load_config
from configs.redact import redact
from configs.schema import Config
from configs.supervision import BAD_INPUT, exit_code
from configs.this_machine import count_cores
from launch.command import (
    Node,
    render_command,
    render_environment,
    render_preprocess,
    render_shell_line,
    render_worker_environments,
)
from launch.supervise import Outcome, run_supervised, run_workers, write_for_other_nodes

# Between SLURM's signal and the time limit: SLURM may be a minute late, and the job has to ask for its restart.
_SPARE_SECONDS = 90
_LEAST_SECONDS = 30


def main(arguments: Sequence[str] | None = None) -> int:
    """train|preprocess|preflight --processes N [--engine E --head ADDRESS --port PORT] CONFIG [KEY=VALUE ...]

    Returns the exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m launch.slurm.node", description=__doc__)
    parser.add_argument("work", choices=["train", "preprocess", "preflight"])
    parser.add_argument("--processes", type=int, required=True, help="on each node")
    parser.add_argument("--engine", default="single", help="one of configs/engines/")
    parser.add_argument("--head", default="127.0.0.1", help="address of the first node")
    parser.add_argument("--port", type=int, default=0, help="where the processes of all nodes meet")
    parser.add_argument("--names", default="", help="of all nodes, for preflight")
    parser.add_argument("--gpus", type=int, default=0, help="of each node, for preflight")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args(arguments)
    if options.work == "preflight":
        return _look_at_nodes(options)
    try:
        config = load_config(options.config, options.overrides)
    except InputError as error:
        print(f"{socket.gethostname()}: {error}", file=sys.stderr, flush=True)
        if outcome_file := os.environ.get("FLUXFILL_OUTCOME"):  # of the job, which sees the config
            write_for_other_nodes(Path(outcome_file), Outcome(exit_code(error), str(error)), os.environ)
        return exit_code(error)
    outcome = _train(config, options) if options.work == "train" else _preprocess(options)
    if outcome.code != 0:
        step = "" if outcome.step is None else f" (step {outcome.step})"
        print(f"{socket.gethostname()}: {outcome.reason}{step}", file=sys.stderr, flush=True)
    return outcome.code


def _train(config: Config, options: argparse.Namespace) -> Outcome:
    rank, count = _place()
    node = Node(rank, count, options.head)
    num_processes = options.processes * node.count
    outcome_file = config.run.folder / "outcome.json"
    scratch = _scratch_of(config)
    if any("$" in override for override in scratch):
        reason = f"slurm.scratch is {config.slurm.scratch}: a variable is not set. Correct it, or set it by slurm.env."
        refused = Outcome(BAD_INPUT, reason)
        write_for_other_nodes(outcome_file, refused, os.environ)
        return refused
    overrides = [*options.overrides, *scratch]
    command = render_command(options.config, overrides, options.engine, num_processes, options.port, node)
    num_cores = count_cores()
    # Of a rank that cannot save, as it waits for one that is gone, the rest of the job's time is not waited for.
    to_save = max(config.slurm.signal_seconds - _SPARE_SECONDS, _LEAST_SECONDS)
    environment = render_environment(outcome_file, options.processes, num_cores, os.environ, to_save)
    if node.rank == 0:
        print(redact(render_shell_line(command, environment), home=""), flush=True)
    return run_supervised(command, environment, outcome_file, is_alone=False)


def _scratch_of(config: Config) -> list[str]:
    """slurm.scratch as an override, with this node's variables."""
    scratch = config.slurm.scratch
    return [] if scratch is None else [f"data.local_cache={os.path.expandvars(scratch)}"]


def _look_at_nodes(options: argparse.Namespace) -> int:
    # Imported here, as training does without all that is looked at.
    from launch.preflight.command import show
    from launch.preflight.place import TOKEN, Place
    from launch.preflight.result import result_file
    from launch.preflight.run import run_preflight

    rank, count = _place()
    names = tuple(filter(None, options.names.split(",")))
    token = os.environ.get(TOKEN, "")
    place = Place(rank, count, options.processes, options.head, options.port, names, options.gpus, token)
    console = Console()
    overrides, file = options.overrides, None
    try:
        config = load_config(options.config, overrides)
    except InputError:
        pass  # this node does not see it, and tells the first one
    else:
        overrides, file = [*overrides, *_scratch_of(config)], result_file(config.run.folder)
    return run_preflight(options.config, overrides, place, file, lambda finding: show(console, finding))


def _preprocess(options: argparse.Namespace) -> Outcome:
    rank, count = _place()
    environments = render_worker_environments(options.processes, count_cores(), inherited=os.environ)
    for local_rank, environment in enumerate(environments):  # numbered through, on all nodes
        environment["RANK"] = str(rank * options.processes + local_rank)
        environment["WORLD_SIZE"] = str(count * options.processes)
    return run_workers(render_preprocess(options.config, options.overrides), environments)


def _place() -> tuple[int, int]:
    """Which node of the step this is, and how many there are."""
    return int(os.environ["SLURM_NODEID"]), int(os.environ["SLURM_STEP_NUM_NODES"])


if __name__ == "__main__":
    sys.exit(main())
