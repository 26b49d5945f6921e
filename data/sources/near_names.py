"""The name that another was perhaps meant to be."""

from bisect import bisect
from collections.abc import Sequence
from difflib import get_close_matches

_NEIGHBOURS = 200  # of a million names, those that are compared


class NearNames:
    """Finds, in a sorted list of names, the one most like another. The first `hints` times alone: each costs
    milliseconds, and nobody reads a thousand."""

    def __init__(self, names: Sequence[str], *, hints: int = 100) -> None:
        self._names, self._hints = names, hints

    def nearest(self, name: str) -> str | None:
        """None if none is like it."""
        if self._hints == 0:
            return None
        self._hints -= 1
        place = bisect(self._names, name)
        near = self._names[max(0, place - _NEIGHBOURS // 2) : place + _NEIGHBOURS // 2]
        return next(iter(get_close_matches(name, near, n=1, cutoff=0.75)), None)
