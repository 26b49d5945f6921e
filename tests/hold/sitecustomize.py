"""Holds a process at a moment that a test has chosen, however fast or slow the machine is. Python loads a module of
this name by itself when it starts, from PYTHONPATH.

HOLD_AT: a step: rank 0 waits before it logs the next one; or a file's name: whoever opens it waits before that.
HOLD_UNTIL: a file that the test makes to let it go on. While a process waits there is <HOLD_UNTIL>.held.
HOLD_UNTIL_STOPPED, if it is set: a trainer that has heard a stop signal goes on, too.
"""

import os
import sys
import time
from pathlib import Path

_AT = os.environ["HOLD_AT"]
_GO = Path(os.environ["HOLD_UNTIL"])


def _is_the_moment(path: str, flags: int) -> bool:
    if not _AT.isdigit():
        return _AT in path
    if not flags & os.O_APPEND or not path.endswith("/metrics.jsonl") or not Path(path).exists():
        return False
    return Path(path).read_bytes().count(b"\n") >= int(_AT)


def _may_go_on() -> bool:
    if "HOLD_UNTIL_STOPPED" in os.environ and sys.modules["trainer.process.stop_signals"].stop_signal() is not None:
        return True
    return _GO.exists()


def _hold(event: str, arguments: tuple) -> None:
    if event != "open" or not _is_the_moment(str(arguments[0]), arguments[2]) or _may_go_on():
        return
    Path(f"{_GO}.held").touch()
    while not _may_go_on():
        time.sleep(0.05)  # handlers of signals run meanwhile


sys.addaudithook(_hold)
