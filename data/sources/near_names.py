"""The name that another was perhaps meant to be."""

import re
from bisect import bisect
from collections.abc import Sequence
from difflib import get_close_matches

_NEIGHBOURS = 200  # of a million names, those that are compared
_MARKS, _DIGITS, _ZEROS = re.compile(r"[\W_]+"), re.compile(r"[0-9]+"), re.compile(r"(?<![0-9])0+(?=[0-9])")


class NearNames:
    """Finds, in a sorted list of names, the one most like another. The first `hints` times alone: each costs
    milliseconds, and nobody reads a thousand."""

    def __init__(self, names: Sequence[str], *, hints: int = 100) -> None:
        self._names, self._hints = names, hints
        self._by_letters = {_letters_of(name): name for name in names}

    def nearest(self, name: str) -> str | None:
        """One of the same letters and numbers, or else one that goes on with a suffix, or much like it; None if none
        is."""
        if self._hints == 0:
            return None
        self._hints -= 1
        if (letters := _letters_of(name)) and letters in self._by_letters:
            return self._by_letters[letters]
        place = bisect(self._names, name)
        near = self._names[max(0, place - _NEIGHBOURS // 2) : place + _NEIGHBOURS // 2]
        near = [other for other in near if not _differ_in_numbers_alone(name, other)]
        if longer := next((other for other in near if _goes_on(name, other) or _goes_on(other, name)), None):
            return longer
        return next(iter(get_close_matches(name, near, n=1, cutoff=0.75)), None)


def _letters_of(name: str) -> str:
    """A name without case, zeros ahead of numbers, and what stands between its letters and digits."""
    return _MARKS.sub("", _ZEROS.sub("", name.casefold()))


def _goes_on(name: str, longer: str) -> bool:
    """As cat goes on in cat_seg, but not in cathedral."""
    return longer.startswith(name) and bool(_MARKS.match(longer, len(name)))


def _differ_in_numbers_alone(name: str, other: str) -> bool:
    """As photo_01 and photo_02 do, which are two pictures; photo_1 and photo_01 may be one."""
    if _DIGITS.sub("", _letters_of(name)) != _DIGITS.sub("", _letters_of(other)):
        return False
    return [int(digits) for digits in _DIGITS.findall(name)] != [int(digits) for digits in _DIGITS.findall(other)]
