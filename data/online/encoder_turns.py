"""Who uses the encoders when: first the rows that a run trains on next, and in between what can wait.

Threads share one set of modules, which their libraries do not promise to be safe. Here it is: one thread at a time runs
the modules' code, and all queue on the same streams, one for each GPU, so that what was queued first is computed first,
in memory that the next batch uses again. The weights are only read.
"""

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch

_LOOK_SECONDS = 0.2  # between two looks at whether to stop


class TurnsOver(Exception):
    """Whoever works in between is to stop."""


def refuse_if_over(stop: threading.Event) -> None:
    """Raise TurnsOver if `stop` is set, or the process ends without having said so."""
    if stop.is_set() or not threading.main_thread().is_alive():
        raise TurnsOver


class EncoderTurns:
    """Turns at the encoders on some devices.

    The training waits for one batch in between at most: the next is not queued before the device is done with it, nor
    while anything that the training needs is not there.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._streams = [torch.cuda.Stream(device) for device in devices if device.type == "cuda"]
        self._changed = threading.Condition()
        self._needed = 0
        self._in_use = False  # a thread is queueing
        self._in_between = False  # something in between is being queued, or computed

    def need(self) -> None:
        """Rows that are trained on next are on their way to the encoders: nothing may come in between until `have`."""
        with self._changed:
            self._needed += 1

    def have(self) -> None:
        """What was needed is there, or failed."""
        with self._changed:
            self._needed -= 1
            self._changed.notify_all()

    @contextmanager
    def first(self) -> Iterator[None]:
        """A turn for what the training needs. Does not wait for the device."""
        self.need()
        try:
            with self._changed:
                self._changed.wait_for(lambda: not self._in_use)
                self._in_use = True
            with self._queueing():
                yield
        finally:
            self.have()

    @contextmanager
    def between(self, stop: threading.Event) -> Iterator[None]:
        """A turn for one batch of what can wait, once the training needs nothing; ends when the device is done with it.

        Raises TurnsOver if `stop` is set before that.
        """
        with self._changed:
            while self._needed or self._in_use or self._in_between:
                refuse_if_over(stop)
                self._changed.wait(_LOOK_SECONDS)
            refuse_if_over(stop)
            self._in_use = self._in_between = True
        try:
            with self._queueing():
                yield
                queued = [stream.record_event(torch.cuda.Event(blocking=True)) for stream in self._streams]
            for stream, event in zip(self._streams, queued, strict=True):
                with torch.cuda.device(stream.device):  # a thread that waits would else open the first GPU too
                    event.synchronize()
        finally:
            with self._changed:
                self._in_between = False
                self._changed.notify_all()

    @contextmanager
    def _queueing(self) -> Iterator[None]:
        """On the encoders' streams. Gives back what its caller took."""
        try:
            with ExitStack() as streams:
                for stream in self._streams:
                    streams.enter_context(torch.cuda.stream(stream))
                yield
        finally:
            with self._changed:
                self._in_use = False
                self._changed.notify_all()
