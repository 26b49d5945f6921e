"""How near to the middle of its picture a mask's hole comes, and what it keeps: a crop cuts from the middle, so both
are left in one that is wide enough. Told of solid cells of several sizes, since a speck may vanish when it is resized.
"""

from itertools import pairwise

import numpy as np
from PIL import Image

CELLS = (4, 16, 64)  # pixels, each a multiple of the one before
_WHITE, _BLACK = 192, 63  # mean levels of cells that are white or black enough at one half, compressed or not
_STEPS = 254  # from the middle of a picture to its edge
_NOWHERE = 255


def measure_reach(levels: Image.Image) -> str:
    """The reach of a mask, decoded, in mode L, in hex digits: for each size of cell, of hole and of what is kept, along
    x and along y, the least part of the way from the middle to the edge within which a cell of it lies."""
    reach = bytearray()
    cells = levels
    for smaller, size in pairwise((1, *CELLS)):
        cells = cells.reduce(size // smaller)
        whole = np.asarray(cells)[: levels.height // size, : levels.width // size]  # not those that jut out
        for solid in (whole >= _WHITE, whole <= _BLACK):
            for axis, length in enumerate(levels.size):
                reach.append(_nearest(np.logical_or.reduce(solid, axis), size, length))
    return reach.hex()


def _nearest(there: np.ndarray, size: int, length: int) -> int:
    """there: bool [n], where along a side of `length` pixels a cell of `size` pixels is."""
    starts = 2 * size * np.flatnonzero(there)
    if not starts.size:
        return _NOWHERE
    far_ends = np.maximum(length - starts, starts + 2 * size - length)  # in half pixels from the middle
    return int(-(-_STEPS * int(far_ends.min()) // length))


def is_surely_left(reach: str, least_cell: float, share_x: float, share_y: float) -> bool:
    """Whether both hole and kept part have a cell of `least_cell` pixels or more within these shares of the way from
    the middle to the edge, one of which is 1. False: they may have, or not."""
    sides = bytes.fromhex(reach)
    for number, size in enumerate(CELLS[: len(sides) // 4]):
        of_cell = sides[4 * number : 4 * number + 4]
        if size >= least_cell and all(
            part != _NOWHERE and part <= _STEPS * share
            for part, share in zip(of_cell, 2 * (share_x, share_y), strict=True)
        ):
            return True
    return False
