"""Exit codes, the signals that stop a run, and ending with one's parent: alike in a supervisor and what it starts."""

import ctypes
import signal

FAILED = 1  # anything but the following
BAD_INPUT = 2
STOPPED = 75  # on purpose; the same command line goes on

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

_LIBC = ctypes.CDLL(None)  # loaded here: stop_with_parent also runs between fork and exec
_PR_SET_PDEATHSIG = 1


def stop_with_parent() -> None:
    """From now on a TERM for this process when its parent dies, however it dies (kill -9, a closed terminal)."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
