"""Run one training command to its end: signals go through, the exit code is the trainer's own."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from configs.supervision import STOP_SIGNALS, STOPPED, stop_with_parent


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
        child = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            start_new_session=True,  # Ctrl-C then comes once, through here, not also from the terminal
            preexec_fn=stop_with_parent,
        )
        relay.connect(child)
        returned = child.wait()
    return _read_outcome(outcome_file) or _guess_outcome(returned, relay.first)


class _SignalRelay:
    """Hands the first stop signal to the child, also when it comes before the child has been started."""

    def __init__(self) -> None:
        self.first: int | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._sent = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        previous = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def connect(self, child: "subprocess.Popen[bytes]") -> None:
        self._child = child
        if self.first is not None and not self._sent:
            child.send_signal(self.first)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.first is not None:
            return
        self.first = number
        if self._child is not None:
            self._sent = True
            self._child.send_signal(number)


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
