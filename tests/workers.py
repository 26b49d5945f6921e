"""Preprocess workers for tests: processes forked from the warm server, with an end of their own."""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from benchmarks.ranks import take_environment, warm_context
from configs.schema import Config
from data.preprocessing.worker import Worker, which_worker
from tests.patience import PATIENCE

# What Python tells audit hooks of before it changes a folder.
_CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.utime"}


@dataclass(frozen=True)
class WorkerProcess:
    """A worker in the making or done."""

    process: BaseProcess
    outcome: Connection

    def join(self, timeout_seconds: float = PATIENCE) -> tuple[int | None, str, int]:
        """(exit code, message, changes): -9 when killed, with the last that was heard of."""
        message, changes, deadline = "", 0, time.monotonic() + timeout_seconds
        try:
            while wait([self.outcome], timeout=max(0.0, deadline - time.monotonic())):
                try:
                    message, changes = self.outcome.recv()
                except EOFError:
                    break
            self.process.join(max(0.0, deadline - time.monotonic()))
            assert self.process.exitcode is not None, f"not done in {timeout_seconds:.0f} s"
        finally:
            self.process.kill()
            self.outcome.close()
        return self.process.exitcode, message, changes

    def kill(self) -> None:
        self.process.kill()

    def wait_until_stopped(self, timeout_seconds: float = PATIENCE) -> None:
        """By SIGSTOP: all of its threads, of which one may be at its heartbeat."""
        deadline = time.monotonic() + timeout_seconds
        while not self._is_stopped():
            assert time.monotonic() < deadline, "it runs on"
            time.sleep(0.01)

    def _is_stopped(self) -> bool:
        try:
            stats = [stat.read_text() for stat in Path(f"/proc/{self.process.pid}/task").glob("*/stat")]
        except OSError:  # a thread has just ended
            return False
        return {stat.rpartition(")")[2].split()[0] for stat in stats} == {"T"}

    def go_on(self) -> None:
        """After SIGSTOP."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGCONT)


def preprocess_quietly(config: Config, worker: Worker) -> None:
    from rich.console import Console

    from data.preprocessing.run import preprocess

    preprocess(config, Console(quiet=True), worker)


def start_worker(
    config: Config,
    worker: int = 0,
    workers: int = 1,
    *,
    kill_at: int | str | None = None,
    fate: signal.Signals = signal.SIGKILL,
    run: Callable[[Config, Worker], None] = preprocess_quietly,
) -> WorkerProcess:
    """`preprocess` in a process, or what else is `run` there.

    kill_at: number of the change to the cache before which it gets the signal `fate`, or part of the path of the first.
    """
    context = warm_context()
    receiver, sender = context.Pipe(duplex=False)
    given = (dict(os.environ), config, worker, workers, kill_at, fate, run, sender)
    process = context.Process(target=_work, args=given, daemon=True)
    process.start()
    sender.close()
    return WorkerProcess(process, receiver)


def _work(
    environment: dict[str, str],
    config: Config,
    worker: int,
    workers: int,
    kill_at: int | str | None,
    fate: signal.Signals,
    run: Callable[[Config, Worker], None],
    outcome: Connection,
) -> None:
    take_environment(environment)
    import torch

    from configs.errors import InputError

    torch.set_num_threads(1)
    changes = _count_changes(config.data.cache, kill_at, fate)
    try:
        run(config, which_worker({}, worker=worker, workers=workers))
        outcome.send(("", changes[0]))
    except InputError as error:
        outcome.send((str(error), changes[0]))
        sys.exit(2)
    except BaseException:
        outcome.send((traceback.format_exc(), changes[0]))
        sys.exit(1)


def _count_changes(cache: Path, kill_at: int | str | None, fate: signal.Signals) -> list[int]:
    """Counts, from now on, every change below a folder; the process signals itself once, as `start_worker` says. A
    heartbeat is none: how many come is the clock's affair."""
    changes, reached = [0], list[str]()
    place = os.fspath(cache)

    def hook(event: str, arguments: tuple) -> None:
        if event not in _CHANGES or not os.fspath(arguments[0] or "").startswith(place):
            return
        if event == "open" and not _writes(arguments):
            return
        if threading.current_thread().name == "heartbeat":
            return
        changes[0] += 1
        if changes[0] == kill_at or (isinstance(kill_at, str) and kill_at in os.fspath(arguments[0]) and not reached):
            reached.append(event)
            os.kill(os.getpid(), fate)

    sys.addaudithook(hook)
    return changes


def _writes(arguments: tuple) -> bool:
    _, mode, flags = arguments
    return bool(flags & (os.O_WRONLY | os.O_RDWR)) if mode is None else any(letter in mode for letter in "wax+")
