"""Stop signals: one only sets a flag, which the ranks look at together between two steps.

Imports nothing heavy: it is in force before torch is imported, which takes ten seconds in which a signal would kill.
"""

import signal
from types import FrameType

from configs.supervision import STOP_SIGNALS
from trainer.process.launcher import end_with_launcher

_received: int | None = None
_installed = False


def _receive(number: int, frame: FrameType | None) -> None:
    global _received
    _received = _received or number  # later ones change nothing: the run is stopping


def install_stop_signals() -> None:
    """From now on TERM, INT, USR1 and USR2 ask the run to stop, and the launcher's death ends it (launcher.py)."""
    global _installed
    for number in STOP_SIGNALS:
        signal.signal(number, _receive)
    _installed = True
    end_with_launcher()


def stop_signal() -> str | None:
    """Name of the first stop signal that this process got, such as "SIGUSR1"; None if none."""
    return signal.Signals(_received).name if _received is not None else None


def has_stop_signals() -> bool:
    """Whether this process has installed them: it is a training process of its own."""
    return _installed
