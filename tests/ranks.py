"""Ranks for tests: processes forked from one warm server, in the environment `accelerate launch` would give them.

Importing torch and diffusers takes ten seconds; a fork takes none, and each case gets processes of its own, with no
state of an earlier one.
"""

import faulthandler
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path

ENGINES = Path(__file__).parent.parent / "configs" / "engines"
_PRELOAD = ["tests.rank_imports"]


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


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _rank_main(
    environment: dict[str, str], function: Callable, arguments: tuple, results: Connection, timeout_seconds: float
) -> None:
    os.environ.update(environment)
    faulthandler.dump_traceback_later(0.9 * timeout_seconds)  # where it hangs, before it is killed for that
    import torch

    torch.set_num_threads(1)
    try:
        results.send(("done", function(*arguments)))
    except BaseException as error:  # the test's process raises it again
        results.send(("failed", f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))


def warm_context() -> multiprocessing.context.ForkServerContext:
    """Processes of it are forked from the warm server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


class RankFailure(AssertionError):
    """A rank raised, died or hung. The message holds its traceback."""


def run_ranks(
    engine: str,
    num_processes: int,
    function: Callable,
    *arguments: object,
    node_size: int | None = None,
    timeout_seconds: float = 240,
) -> list:
    """Call `function(*arguments)` in every rank of a launch; returns what each returned, in rank order.

    function: of a module, so that it can be sent.  node_size: ranks on one simulated node (all of them by default).
    Raises RankFailure if a rank raises, dies or is not done in time; the others are ended.
    """
    context = warm_context()
    node_size = node_size or num_processes
    shared = launch_environment(engine, num_processes) | {
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(node_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": "1",
    }
    ranks = []
    for rank in range(num_processes):
        receiver, sender = context.Pipe(duplex=False)
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank % node_size)}
        case = (shared | own, function, arguments, sender, timeout_seconds)
        process = context.Process(target=_rank_main, args=case, daemon=True)
        process.start()
        sender.close()
        ranks.append((process, receiver))
    outcomes: list = [None] * num_processes
    pending = {receiver: rank for rank, (_, receiver) in enumerate(ranks)}
    try:
        while pending:
            ready = wait(list(pending), timeout=timeout_seconds)
            if not ready:
                raise RankFailure(f"ranks {sorted(pending.values())} of {engine} were not done in {timeout_seconds} s")
            for receiver in ready:
                rank = pending.pop(receiver)
                try:
                    kind, value = receiver.recv()
                except EOFError:
                    raise RankFailure(f"rank {rank} of {engine} died") from None
                if kind == "failed":
                    raise RankFailure(f"rank {rank} of {engine}: {value}")
                outcomes[rank] = value
    finally:
        for process, receiver in ranks:
            if pending:
                process.kill()
            process.join(timeout=20)
            receiver.close()
    return outcomes
