"""Changes programs that a test starts, so that it may go however fast or slow the machine is. Python loads a module of
this name by itself when it starts, from PYTHONPATH.

A process is held at a moment that the test has chosen:

HOLD_AT: a step: rank 0 waits before it logs the next one; or a file's name: whoever opens it waits before that.
HOLD_UNTIL: a file that the test makes to let it go on. While a process waits there is <HOLD_UNTIL>.held.
HOLD_UNTIL_STOPPED, if it is set: a trainer that has heard a stop signal goes on, too.

And a preflight waits for nodes and ranks as long as tests wait.
"""

import os
import runpy
import sys
import time
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

_AT = os.environ.get("HOLD_AT")
_GO = Path(os.environ.get("HOLD_UNTIL", ""))


def _is_the_moment(path: str, flags: int) -> bool:
    assert _AT is not None
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


class _PatientPreflight:
    """Finds one module, and changes the defaults of its Patience once it is loaded."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name == "launch.preflight.run" else None
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_change(module: ModuleType) -> None:
            load(module)
            start = module.Patience.__init__
            seconds = runpy.run_path(str(Path(__file__).parents[1] / "patience.py"))["PATIENCE"]
            start.__defaults__ = (seconds,) * len(start.__defaults__)

        spec.loader.exec_module = load_and_change
        return spec


if _AT is not None:
    sys.addaudithook(_hold)
sys.meta_path.insert(0, _PatientPreflight)
