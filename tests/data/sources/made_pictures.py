"""Pictures for the tests of reading them."""

import numpy as np

LIMIT = 64.0


def asymmetric_picture(height=18, width=30):
    """uint8 [H, W, 3] that no turn or flip maps to itself."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def stored_as(upright, orientation):
    """How a camera held that way stores an upright picture, by EXIF's definition of where row 0 and column 0 lie."""
    first_row_is = {1: "top", 2: "top", 3: "bottom", 4: "bottom", 5: "left", 6: "right", 7: "right", 8: "left"}
    first_column_is = {1: "left", 2: "right", 3: "right", 4: "left", 5: "top", 6: "top", 7: "bottom", 8: "bottom"}
    row, column = first_row_is[orientation], first_column_is[orientation]
    stored = upright
    if "bottom" in (row, column):
        stored = stored[::-1]
    if "right" in (row, column):
        stored = stored[:, ::-1]
    if row in ("left", "right"):
        stored = stored.swapaxes(0, 1)
    return np.ascontiguousarray(stored)


SMOOTH = np.stack(np.meshgrid(np.arange(0, 256, 4), np.arange(0, 256, 6), [90], indexing="xy"), axis=-1)[:, :, 0]
SMOOTH = SMOOTH.astype(np.uint8)  # [43, 64, 3]
