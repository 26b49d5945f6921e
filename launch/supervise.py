"""Supervision of a training command, or of the workers that preprocess before it: signals go through, and the exit code
is their own."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, Literal

from configs.cgroup import count_oom_kills, highest_use, memory_limits
from configs.errors import InputError, StorageFailed, is_of_storage
from configs.supervision import (
    BAD_INPUT,
    FAILED,
    SIGNALS_CAN_BE_SENT,
    STOP_SIGNALS,
    STOPPED,
    SUPERVISOR,
    adopt_orphans,
    heard_stop_signals,
    list_children,
    stop_with_starter,
    wait_for_orphans,
)
from data.storage.atomic_write import write_text_atomically
from data.storage.checkpoint_folders import newest_save
from data.storage.run_lock import is_of_another, make_file
from launch.command import SHUTDOWN_SECONDS

_STDERR = 2
GIB = 2**30
_LOOK_SECONDS = 5.0  # between looks at an outcome, where a failure is acted on
# Of a command that is started again after a hang: how often in a row without a new checkpoint.
MOST_IN_VAIN = 3
# For the nodes whose ranks have not failed themselves: they may wait half an hour for one that never came to meet them.
OTHER_NODES_SECONDS = 30.0

Again = Literal["out of memory", "hang"]


@dataclass(frozen=True)
class Outcome:
    """How a run ended.  code: the exit code to pass on.  step: the last one finished; None when nobody told.
    again: why the same command, started at once, may go on; None: it may not."""

    code: int
    reason: str
    step: int | None = None
    again: Again | None = None


def run_supervised(
    command: Sequence[str],
    environment: Mapping[str, str],
    outcome_file: Path,
    *,
    output: IO[bytes] | None = None,
    sends: signal.Signals | None = None,
    is_alone: bool = True,
    stop_after_failure: float | None = None,
    restarts_after: Collection[Again] = (),
    once_saved: Sequence[str] | None = None,
) -> Outcome:
    """Run the command and wait for it; rank 0 leaves how it ended in `outcome_file` {code, reason, step, again}.

    environment: set on top of this process's own.  output: a file for what it prints; None: here.  is_alone: an outcome
    file of an earlier run is removed first; not where this is one of several nodes, as another may have written it.
    stop_after_failure: seconds after which the command is told to stop when its outcome is a failure and it still runs.
    Of several nodes, what was there before is then an earlier start's, and none of this one.
    restarts_after: when the command is started again here: "out of memory" as often as the trainer says so, which each
    time takes less at once, but not where it says the same again without a new checkpoint; "hang" until MOST_IN_VAIN
    starts in a row have brought no new checkpoint.  once_saved: the command of a restart, once this one has saved;
    None: the same.

    The first of TERM, INT, USR1 and USR2 that reaches this process goes on to the command (as `sends`, if given), which
    stops by it; later ones are dropped, because a third one makes torch's launcher leave before its ranks have saved.
    It may get them from elsewhere all the same, from SLURM or a person: ranks that it has left behind are waited for.

    Where the kernel killed a process of this one's control group for want of memory meanwhile, a failure is told as
    that, in the outcome file too: what the other ranks say is that a connection was closed, or that they were stopped.

    Without an outcome file the code is 0 or 1 as the command's own says, or 75 when it had been told to stop. A signal
    that was held until now (`hold_stop_signals`) ends it before the command starts.
    """
    if is_alone:
        _remove(outcome_file)
    earlier = None if is_alone or stop_after_failure is None else _stamp_of(outcome_file)
    relay = _SignalRelay(sends)
    adopt_orphans()
    others = list_children()
    vain, saved = 0, _newest_save(outcome_file.parent)
    said: str | None = None
    with relay.installed():
        if relay.first is not None:
            return _guess_outcome(STOPPED, relay.first, outcome_file.parent)
        while True:
            killed = count_oom_kills()  # before this start
            child = relay.start(command, environment, output, output)
            returned = _wait(child, relay, outcome_file, stop_after_failure, earlier)
            wait_for_orphans(others, seconds=SHUTDOWN_SECONDS)
            outcome = _read_new(outcome_file, earlier) or _guess_outcome(returned, relay.first, outcome_file.parent)
            was_killed = outcome.code == FAILED or (outcome.code == STOPPED and relay.first is None)
            if was_killed and outcome.again is None and count_oom_kills() > killed:
                outcome = _told_as_killed(outcome, count_oom_kills() - killed)
                _write_outcome(outcome_file, outcome)
            elif outcome.code == FAILED and not is_alone:
                write_for_other_nodes(outcome_file, outcome, {**os.environ, **environment})
            before, saved = saved, _newest_save(outcome_file.parent, otherwise=saved)
            vain = 0 if saved[0] > before[0] or outcome.again != "hang" else vain + 1
            if outcome.again not in restarts_after or relay.first is not None:
                return outcome
            if vain == MOST_IN_VAIN:
                what = f"{vain} starts in a row came no further than {saved[0]}"
                return replace(outcome, reason=f"{outcome.reason}. {what}")
            if outcome.again == "out of memory" and outcome.reason == said and saved[0] <= before[0]:
                return replace(outcome, reason=f"{outcome.reason}. The start before ended the same way")
            said = outcome.reason
            if saved != before and once_saved is not None:
                command = once_saved
            try:
                _remove(outcome_file)
            except InputError as error:
                return replace(outcome, reason=f"{outcome.reason}. It cannot start again: {error}")
            print(f"fluxfill: {outcome.reason}. It starts again", file=sys.stderr, flush=True)


def _wait(
    child: "subprocess.Popen[bytes]",
    relay: "_SignalRelay",
    outcome_file: Path,
    stop_after_failure: float | None,
    earlier: tuple[int, int] | None,
) -> int:
    """The command's exit code, waited for.  earlier: of the outcome that was there before it started."""
    failed_before = False
    while stop_after_failure is not None:
        try:
            return child.wait(timeout=stop_after_failure if failed_before else _LOOK_SECONDS)
        except subprocess.TimeoutExpired:
            told = _read_new(outcome_file, earlier)
        has_failed = told is not None and told.code not in (0, STOPPED)
        if has_failed and failed_before:  # and nobody has taken it back: rank 0 has the last word
            relay.stop()
            break
        failed_before = has_failed
    return child.wait()


def run_workers(
    command: Sequence[str], environments: Sequence[Mapping[str, str]], *, output: IO[bytes] | None = None
) -> Outcome:
    """Run the command once with each environment, all at once, and wait for all: workers that share what is to be done,
    and end with code 0 when all of it is done, by whomever.

    So one such end is a success, whatever befell the others. What several have to say of the same thing on standard
    error is printed once. A stop signal to this process ends the workers by TERM, at once: what they have not finished
    has no name yet.  output: a file for what they print; None: here.
    """
    relay = _SignalRelay(sends=signal.SIGTERM)
    stderr: int | IO[bytes] | None = subprocess.PIPE if len(environments) > 1 and output is None else output
    with relay.installed(), ThreadPoolExecutor(len(environments)) as readers:
        waiting = environments if relay.first is None else ()
        workers = [relay.start(command, environment, stderr, output) for environment in waiting]
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
            with heard_stop_signals():
                yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def start(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        stderr: int | IO[bytes] | None = None,
        stdout: IO[bytes] | None = None,
    ) -> "subprocess.Popen[bytes]":
        child = subprocess.Popen(
            command,
            stdout=stdout,
            stderr=stderr,
            env={**os.environ, **environment, SUPERVISOR: str(os.getpid())},
            start_new_session=True,  # Ctrl-C then comes once, through here, not also from the terminal
            preexec_fn=partial(stop_with_starter, os.getpid()) if SIGNALS_CAN_BE_SENT else None,
        )
        self._children.append(child)
        if self.first is not None and child not in self._told:
            self._tell(child, self.first)
        return child

    def stop(self) -> None:
        """Tell the children to stop, as if a signal had come; none has, so they may be started again."""
        for child in self._children:
            self._tell(child, signal.SIGTERM)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.first is not None:
            return
        self.first = number
        self._told = list(self._children)
        for child in self._told:
            self._tell(child, number)

    def _tell(self, child: "subprocess.Popen[bytes]", number: int) -> None:
        number = self._sends or number
        if SIGNALS_CAN_BE_SENT or number == signal.SIGTERM:
            child.send_signal(number)  # on Windows TERM alone, which ends it at once; Ctrl-C it has got by itself


def _stamp_of(file: Path) -> tuple[int, int] | None:
    """What tells a file from another of its name, though they say the same; None if there is none."""
    with suppress(OSError):
        found = file.stat()
        return found.st_ino, found.st_mtime_ns
    return None


def _read_new(outcome_file: Path, earlier: tuple[int, int] | None) -> Outcome | None:
    """`_read_outcome`, if it is not the one with the stamp `earlier`."""
    if earlier is not None and _stamp_of(outcome_file) == earlier:
        return None
    return _read_outcome(outcome_file)


def _read_outcome(outcome_file: Path) -> Outcome | None:
    """What rank 0 wrote; None when there is no file, or half of one."""
    try:
        told = json.loads(outcome_file.read_text(encoding="utf-8"))
        step = None if told["step"] is None else int(told["step"])
        return Outcome(int(told["code"]), str(told["reason"]), step, told.get("again"))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remove(outcome_file: Path) -> None:
    """Remove the outcome of an earlier start. Raises InputError if it stays: it would be taken for the next one's."""
    try:
        outcome_file.unlink(missing_ok=True)
    except OSError as error:
        kind = StorageFailed if is_of_storage(error) else InputError
        raise kind(f"{outcome_file}: cannot be removed ({error.strerror}).") from error


def _newest_save(run: Path, otherwise: tuple[int, int] = (0, 0)) -> tuple[int, int]:
    """`newest_save`, or what is known of it where the disk does not answer: that must not stand in for an outcome."""
    try:
        return newest_save(run)
    except OSError:
        return otherwise


def _write_outcome(outcome_file: Path, outcome: Outcome) -> None:
    try:
        write_text_atomically(outcome_file, json.dumps(asdict(outcome)) + "\n")
    except OSError as error:
        print(f"fluxfill: {outcome_file}: cannot be written ({error.strerror})", file=sys.stderr)


def write_for_other_nodes(outcome_file: Path, outcome: Outcome, environment: Mapping[str, str]) -> None:
    """Write what was guessed of ranks that died without a word, so that other nodes do not wait for them; not over a
    word that is there, and not in a folder that is another start's."""
    with suppress(StorageFailed, OSError):
        if not is_of_another(outcome_file.parent, environment):
            told = asdict(replace(outcome, reason=f"{socket.gethostname()}: {outcome.reason}"))
            make_file(outcome_file, json.dumps(told) + "\n")


def _told_as_killed(outcome: Outcome, count: int) -> Outcome:
    """The outcome of a run of which the kernel has killed so many processes."""
    limit, use = min(memory_limits(), default=None), highest_use()
    held = "" if use is None else f"; {use / GIB:.1f} GiB were held at most"
    of = "" if limit is None or limit > 2**60 else f", of {limit / GIB:.1f}"
    return replace(
        outcome,
        code=FAILED,
        reason=f"the kernel killed {count} process(es) of this job, as the host's memory was full{held}{of}. "
        f"What helps: docs/troubleshooting.md#out-of-memory. What was said then: {outcome.reason}",
    )


def _guess_outcome(returned: int, stopped_by: int | None, run: Path) -> Outcome:
    if returned == 0:
        return Outcome(0, "finished")
    if stopped_by is not None or returned == STOPPED:  # 75 itself: of a supervisor that srun has started
        name = signal.Signals(stopped_by).name if stopped_by is not None else "a signal"
        saved, _ = _newest_save(run)
        at = f"step {saved}, its newest checkpoint" if saved else "the start"
        return Outcome(STOPPED, f"stopped by {name} before the trainer could say where; it goes on from {at}")
    return Outcome(
        1, f"the launcher ended with code {returned} and the trainer left no outcome; its messages are above"
    )
