"""Ranks for tests: processes forked from one warm server, in the environment `accelerate launch` would give them."""

import faulthandler
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait

from benchmarks.ranks import own_port, rank_environments, take_environment, warm_context
from tests.patience import PATIENCE


def _rank_main(environment: dict[str, str], function: Callable, arguments: tuple, results: Connection) -> None:
    take_environment(environment)
    faulthandler.dump_traceback_later(0.9 * PATIENCE)  # where it hangs, before it is killed for that
    import torch

    torch.set_num_threads(1)
    try:
        results.send(("done", function(*arguments)))
    except BaseException as error:  # the test's process raises it again
        results.send(("failed", f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))


class RankFailure(AssertionError):
    """A rank raised, died or hung. The message holds its traceback."""


def run_ranks(
    engine: str,
    num_processes: int,
    function: Callable,
    *arguments: object,
    node_size: int | None = None,
) -> list:
    """Call `function(*arguments)` in every rank of a launch; returns what each returned, in rank order.

    function: of a module, so that it can be sent.  node_size: ranks on one simulated node (all of them by default).
    Raises RankFailure if a rank raises, dies or is not done in time; the others are ended.
    """
    with own_port() as port:
        return _run_ranks(port, engine, num_processes, function, arguments, node_size)


def _run_ranks(
    port: int,
    engine: str,
    num_processes: int,
    function: Callable,
    arguments: tuple,
    node_size: int | None,
) -> list:
    context = warm_context()
    ranks = []
    for environment in rank_environments(engine, num_processes, port, node_size=node_size):
        receiver, sender = context.Pipe(duplex=False)
        case = (environment, function, arguments, sender)
        process = context.Process(target=_rank_main, args=case, daemon=True)
        process.start()
        sender.close()
        ranks.append((process, receiver))
    outcomes: list = [None] * num_processes
    pending, late = {receiver: rank for rank, (_, receiver) in enumerate(ranks)}, list[int]()
    try:
        while pending:
            ready = wait(list(pending), timeout=PATIENCE)
            if not ready:
                raise RankFailure(f"ranks {sorted(pending.values())} of {engine} were not done in {PATIENCE:.0f} s")
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
        for rank, (process, receiver) in enumerate(ranks):
            if pending:
                process.kill()
            process.join(PATIENCE)  # what it does at its exit ends too
            if process.exitcode is None:
                late.append(rank)
                process.kill()
            receiver.close()
    if late:
        raise RankFailure(f"ranks {late} of {engine} were done, and did not end in {PATIENCE:.0f} s")
    return outcomes
