"""Supervision of a training command, or of the workers that preprocess before it: signals go through, and the exit code
is their own."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from configs.supervision import BAD_INPUT, STOP_SIGNALS, STOPPED, stop_with_parent

_STDERR = 2


@dataclass(frozen=True)
class Outcome:
    """How a run ended.  code: the exit code to pass on.  step: the last one finished; None when nobody told."""

    code: int
    reason: str
    step: int | None = None


def run_supervised(command: Sequence[str], environment: Mapping[str, str], outcome_file: Path) -> Outcome:
    """Run the command and wait for it; rank 0 leaves how it ended in `outcome_file` {code, reason, step}.

    environment: set on top of this process's own. An outcome file of an earlier run is removed first. The first of
    TERM, INT, USR1 and USR2 that reaches this process goes on to the command, which stops by it; later ones are
    dropped, because a second one makes torch's launcher leave before its ranks have saved. Without an outcome file the
    code is 0 or 1 as the command's own says, or 75 when it had been told to stop.
    """
    outcome_file.unlink(missing_ok=True)
    relay = _SignalRelay()
    with relay.installed():
        child = relay.start(command, environment)
        returned = child.wait()
    return _read_outcome(outcome_file) or _guess_outcome(returned, relay.first)


def run_workers(command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> Outcome:
    """Run the command once with each environment, all at once, and wait for all: workers that share what is to be done,
    and end with code 0 when all of it is done, by whomever.

    So one such end is a success, whatever befell the others. What several have to say of the same thing on standard
    error is printed once. A stop signal to this process ends the workers by TERM, at once: what they have not finished
    has no name yet.
    """
    relay = _SignalRelay(sends=signal.SIGTERM)
    stderr = subprocess.PIPE if len(environments) > 1 else None
    with relay.installed(), ThreadPoolExecutor(len(environments)) as readers:
        workers = [relay.start(command, environment, stderr) for environment in environments]
        said: dict[bytes, int] = {}
        for worker in workers:
            if worker.stderr is not None:
                readers.submit(_forward_new_lines, worker.stderr, worker.pid, said)
        codes = [worker.wait() for worker in workers]
    if relay.first is not None:
        return Outcome(STOPPED, f"stopped by {signal.Signals(relay.first).name}; the same command goes on")
    if 0 in codes:
        return Outcome(0, "finished")
    return Outcome(BAD_INPUT if BAD_INPUT in codes else 1, "not finished; what is wrong stands above")


def _forward_new_lines(lines: IO[bytes], worker: int, said: dict[bytes, int]) -> None:
    """Print to standard error what no other worker has said.  said: line -> who was the first, of all workers."""
    for line in lines:
        if said.setdefault(line, worker) == worker:
            os.write(_STDERR, line)


class _SignalRelay:
    """Starts processes and hands the first stop signal to them, also when it comes before one has been started.

    sends: the signal that they get, whichever came; None: the one that came.
    """

    def __init__(self, sends: signal.Signals | None = None) -> None:
        self.first: int | None = None
        self._sends = sends
        self._children: list[subprocess.Popen[bytes]] = []
        self._told: list[subprocess.Popen[bytes]] = []

    @contextmanager
    def installed(self) -> Iterator[None]:
        previous = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def start(
        self, command: Sequence[str], environment: Mapping[str, str], stderr: int | None = None
    ) -> "subprocess.Popen[bytes]":
        child = subprocess.Popen(
            command,
            stderr=stderr,
            env={**os.environ, **environment},
            start_new_session=True,  # Ctrl-C then comes once, through here, not also from the terminal
            preexec_fn=stop_with_parent,
        )
        self._children.append(child)
        if self.first is not None and child not in self._told:
            child.send_signal(self._sends or self.first)
        return child

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.first is not None:
            return
        self.first = number
        self._told = list(self._children)
        for child in self._told:
            child.send_signal(self._sends or number)


def _read_outcome(outcome_file: Path) -> Outcome | None:
    """What rank 0 wrote; None when there is no file, or half of one."""
    try:
        told = json.loads(outcome_file.read_text(encoding="utf-8"))
        return Outcome(int(told["code"]), str(told["reason"]), None if told["step"] is None else int(told["step"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _guess_outcome(returned: int, stopped_by: int | None) -> Outcome:
    if returned == 0:
        return Outcome(0, "finished")
    if stopped_by is not None:
        name = signal.Signals(stopped_by).name
        return Outcome(STOPPED, f"stopped by {name} before the trainer could say where")
    return Outcome(
        1, f"the launcher ended with code {returned} and the trainer left no outcome; its messages are above"
    )
