"""Ranks that are started without `accelerate launch`: what it gives them to know, a port on which they meet, and
processes of one warm server, for benchmarks and tests alike.

Importing torch and diffusers takes ten seconds; a fork takes none, and each case gets processes of its own, with no
state of an earlier one.
"""

import multiprocessing
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ENGINES = Path(__file__).resolve().parent.parent / "configs" / "engines"


def launch_environment(engine: str, num_processes: int) -> dict[str, str]:
    """What `accelerate launch --config_file configs/engines/<engine>.yaml` adds to a rank's environment."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    line = ["--config_file", str(ENGINES / f"{engine}.yaml"), "--num_processes", str(num_processes)]
    arguments = launch_command_parser().parse_args([*line, "--main_process_port", "0", "trainer/main.py"])
    arguments, defaults, _ = _validate_launch_command(arguments)
    before = dict(os.environ)
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        _, environment = prepare_deepspeed_cmd_env(arguments)
    else:
        environment = prepare_multi_gpu_env(arguments)
    wanted = ("ACCELERATE_", "FSDP_", "PARALLELISM_")
    return {name: value for name, value in environment.items() if name.startswith(wanted) and before.get(name) != value}


def rank_environments(engine: str, processes: int, port: int, *, node_size: int | None = None) -> list[dict[str, str]]:
    """Variables of each rank of a launch on this machine: this process's, accelerate's and torch's.

    port: where they meet.  node_size: ranks on one simulated node (all of them by default).
    """
    size = node_size or processes
    launch = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    launch |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared = {**os.environ, **launch_environment(engine, processes), **launch}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank % size)} for rank in range(processes)]


@contextmanager
def own_port() -> Iterator[int]:
    """A port of this machine that nobody else is given as long as the context lasts: it is bound, and not listened on.
    Whoever is told of it binds it all the same, by SO_REUSEADDR, as servers and torch's stores do; until then
    connections are refused."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def warm_context() -> multiprocessing.context.ForkServerContext:
    """Processes of it are forked from one that has imported all, once: no import is in anybody's time or memory.

    Python has one such server. Its environment is that of whoever starts it: processes `take_environment`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.rank_imports"])
    return context


def take_environment(environment: Mapping[str, str]) -> None:
    """In a process of `warm_context`: have these variables, and of the server's none but what its imports have set."""
    from benchmarks.rank_imports import STARTED_WITH

    for name in STARTED_WITH:
        os.environ.pop(name, None)
    os.environ.update(environment)
    tempfile.tempdir = None  # which imports have looked up: TMPDIR may be another
