"""Pickles that write a canary where they are read: harmless, and seen by the file that they leave."""

import pickle
from collections.abc import Callable
from pathlib import Path


class _Write:
    def __init__(self, canary: Path) -> None:
        self._canary = str(canary)

    def __reduce__(self) -> tuple[Callable, tuple]:
        return open, (self._canary, "w")


def canary_object(canary: Path) -> object:
    """What writes the canary wherever its pickle is read; checked to do so."""
    assert not canary.exists()
    pickle.loads(pickle.dumps(_Write(canary)))
    canary.unlink()
    return _Write(canary)


def canary_pickle(canary: Path) -> bytes:
    return pickle.dumps(canary_object(canary))
