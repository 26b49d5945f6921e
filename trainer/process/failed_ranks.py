"""The end of a rank that was told to stop, and cannot: it waits for one that failed, or has not begun to train.

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

from configs.supervision import FAILED, STOPPED
from trainer.process.launcher import PatienceWithOrphan, is_training

GRACE_SECONDS = 30.0  # for a rank that can still leave by itself, with its own words
_LOOK_SECONDS = 1.0
_THREAD = "failed-ranks"


def leave_when_another_rank_fails(has_failed: Callable[[], bool], leave_word: Callable[[str], object]) -> None:
    """From now on, once this process was told to stop and `has_failed`, end it with code 1 after a while; and with 75,
    at once, if it was told before there is something to save: ranks that start may wait for each other for long.

    has_failed: whether a rank has left word of a failure. Asked of after a signal only, once a second.  leave_word:
    called with the signal's name before the end at once.  A rank whose launcher is dead ends too, after as long as that
    would have waited.  For the main thread of a process whose signals have handlers; a second call changes nothing.
    """
    if any(thread.name == _THREAD for thread in threading.enumerate()):
        return
    receiving, sending = socket.socketpair()
    sending.setblocking(False)
    signal.set_wakeup_fd(sending.fileno(), warn_on_full_buffer=False)

    def watch() -> None:
        with sending:  # kept open as long as signals are written to it
            received = signal.Signals(receiving.recv(1)[0]).name
            if not is_training():
                try:
                    leave_word(received)
                finally:  # also without a word: nobody else would end it
                    os._exit(STOPPED)
            patience = PatienceWithOrphan()
            while not has_failed():
                time.sleep(_LOOK_SECONDS)
                if patience.is_over():
                    os._exit(FAILED)
            time.sleep(GRACE_SECONDS)
            os._exit(FAILED)

    threading.Thread(target=watch, name=_THREAD, daemon=True).start()
