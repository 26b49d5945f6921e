"""Stop signals: one only sets a flag, which the ranks look at together between two steps.

Imports nothing heavy: it is in force before torch is imported, which takes ten seconds in which a signal would kill.
"""

import os
import signal
from types import FrameType

from configs.supervision import STOP_SIGNALS, stop_with_parent

_received: int | None = None


def _receive(number: int, frame: FrameType | None) -> None:
    global _received
    _received = _received or number  # later ones change nothing: the run is stopping


def install_stop_signals() -> None:
    """From now on TERM, INT, USR1, USR2 and the death of the parent (the launcher, by kill -9) ask the run to stop."""
    for number in STOP_SIGNALS:
        signal.signal(number, _receive)
    parent = os.getppid()
    stop_with_parent()
    if os.getppid() != parent:  # it died in between
        _receive(signal.SIGTERM, None)


def stop_signal() -> str | None:
    """Name of the first stop signal that this process got, such as "SIGUSR1"; None if none."""
    return signal.Signals(_received).name if _received is not None else None
