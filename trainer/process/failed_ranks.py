"""The end of a rank that waits for one that failed.

The launcher tells the others by TERM, which asks them to save after their step. But a rank that waits for the failed
one, inside a collective, never comes to the end of its step, and Python runs no handler there: it would be waited for
until the launcher kills it, ten minutes later.

Imports nothing heavy: it is in force before torch is imported.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable

GRACE_SECONDS = 30.0  # for a rank that can still leave by itself, with its own words
_LOOK_SECONDS = 1.0
_THREAD = "failed-ranks"


def leave_when_another_rank_fails(has_failed: Callable[[], bool]) -> None:
    """From now on, once this process was told to stop and `has_failed`, end it with code 1 after a while.

    has_failed: whether a rank has left word of a failure. Asked of after a signal only, once a second.
    For the main thread of a process whose signals have handlers; a second call changes nothing.
    """
    if any(thread.name == _THREAD for thread in threading.enumerate()):
        return
    receiving, sending = socket.socketpair()
    sending.setblocking(False)
    signal.set_wakeup_fd(sending.fileno(), warn_on_full_buffer=False)

    def watch() -> None:
        with sending:  # kept open as long as signals are written to it
            receiving.recv(1)
            while not has_failed():
                time.sleep(_LOOK_SECONDS)
            time.sleep(GRACE_SECONDS)
            os._exit(1)

    threading.Thread(target=watch, name=_THREAD, daemon=True).start()
