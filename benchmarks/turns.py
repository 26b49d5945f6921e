"""Processes that train, and make their steps in turn: what one step takes beside another in the same minute, on a
machine that has other work as well."""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.ranks import take_environment, warm_context


@dataclass(frozen=True)
class Steps:
    """Of one process.  wall, cpu: seconds of each step, the first of all left out.  peak: bytes that were resident at
    most, above what was there before there was a model."""

    wall: list[float]
    cpu: list[float]
    peak: int


class Turns:
    """One process of several. It tells what a step took, and waits for its turn; made before there is a model."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._before = _memory("VmRSS")
        self._begin = time.perf_counter(), time.process_time()

    def end_step(self, *_: Any) -> None:
        """What its threads do while it waits counts as processor time of the next step."""
        wall, cpu = time.perf_counter() - self._begin[0], time.process_time() - self._begin[1]
        self._connection.send((wall, cpu, _memory("VmHWM") - self._before))
        cpu = time.process_time()
        if not self._connection.recv():
            raise SystemExit
        self._begin = time.perf_counter(), cpu


def _memory(name: str) -> int:
    """Bytes, as the kernel counts this process's. Not ru_maxrss: that knows what its parent had."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


Way = Callable[[Turns], None]


def alternate(ways: Mapping[str, Way], *, steps: int) -> dict[str, Steps]:
    """Train by each way in a process of its own, with one thread; `steps` steps of each, in turn, after one that warms
    up.  A way calls `end_step` after each step."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context, connections = warm_context(), {}
    processes, made = [], {name: Steps([], [], 0) for name in ways}
    for name, way in ways.items():
        connections[name], theirs = context.Pipe()
        processes.append(context.Process(target=_run, args=(dict(os.environ), way, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
        connections[name].recv()  # of the step that warms up
    for _ in range(steps):
        for name, connection in connections.items():
            connection.send(True)
            wall, cpu, peak = connection.recv()
            made[name] = Steps([*made[name].wall, wall], [*made[name].cpu, cpu], peak)
    for connection in connections.values():
        connection.send(False)
    for process in processes:
        process.join(timeout=60)
    return made


def _run(environment: dict[str, str], way: Way, connection: Connection) -> None:
    take_environment(environment)
    import torch

    torch.set_num_threads(1)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), 1)  # results alone stand there
    way(Turns(connection))


def ratio(of: list[float], to: list[float]) -> float:
    """Median over the turns of one's seconds to another's of the same turn."""
    return statistics.median(one / other for one, other in zip(of, to, strict=True))


def train_in_turns(arguments: list[str], turns: Turns) -> None:
    """The trainer itself: a step ends when its line stands in metrics.jsonl."""
    from trainer.main import train
    from trainer.run_log import RunLog

    log_step = RunLog.step

    def log_and_wait(*given: Any, **named: Any) -> None:
        log_step(*given, **named)
        turns.end_step()

    RunLog.step = log_and_wait
    train(arguments)
