"""Holes: told from what is cut out of a picture, and read from wherever an old set kept them."""

from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from data.migrate.report import MigratedTriple
from data.sources.colours import has_alpha
from data.sources.mask_checks import reduced
from data.sources.mask_fit import changed_cells, fine_cell, is_same, share_around
from data.sources.picture_file import PictureFile
from data.sources.pictures import Picture, load_mask, load_picture, load_stored

# What a picture shows in a hole. unsure: one level that goes on around it, as a white wall does, or too little to tell.
Shown = Literal["cut out", "a picture", "unsure"]

_FLAT = 4.0  # grey levels between most of the cells of a hole that was filled with one colour, JPEG's noise included
_GOES_ON = 8.0  # grey levels between a flat hole and what is around it, if it is no hole
_FEWEST = 64  # pixels by which that can be told, in at least four cells
_BLOCK = 7  # pixels: so far JPEG carries what is at the hole's edge into it
_CHANGED = 16.0  # levels of a colour of a pixel: more than compression changes, beside an area that differs as a whole
_SPECK = 5e-4  # share of a picture: so small a part of a hole that was found is none
_MARGIN_SHARE = 1 / 256  # of the longer side, by which a hole that was found grows: its edge is soft


def what_is_shown(grey: np.ndarray, hole: np.ndarray, cell: int) -> Shown:
    """What a picture shows in a hole. grey: uint8 [h, w], cells of `cell` pixels.  hole: uint8 [h, w], 255 = all of the
    cell is hole."""
    inside = hole >= 250
    core = share_around(inside, 2 * -(-_BLOCK // cell) + 1) > 1 - 1e-4
    if np.count_nonzero(core) < max(4, _FEWEST // cell**2):
        return "unsure"
    low, level, high = np.percentile(grey[core], [5, 50, 95])
    if high - low > _FLAT:
        return "a picture"
    around = grey[(share_around(inside, 5) > 0) & (hole < 5)]
    goes_on = around.size > 0 and float((np.abs(around - level) <= _GOES_ON).mean()) >= 0.5
    return "unsure" if goes_on else "cut out"


def alpha_hole(picture: Picture, *, max_megapixels: float) -> Image.Image | None:
    """The transparent part of a picture as a mask, mode L, white = hole; None if next to nothing of it is transparent.
    Raises as `load_picture` does."""
    stored = load_stored(picture, max_megapixels=max_megapixels)
    if not has_alpha(stored):
        return None
    alpha = stored.convert("RGBA").getchannel("A")
    return ImageOps.invert(alpha) if alpha.getextrema()[0] < 128 else None  # type: ignore[operator]


def load_opaque(picture: Picture, *, max_megapixels: float) -> Image.Image:
    """A picture without its transparency, in RGB or grey of its own profile: what is stored below shows."""
    stored = load_stored(picture, max_megapixels=max_megapixels)
    return stored.convert("RGBA").convert("L" if stored.mode in ("L", "LA") else "RGB")


def is_kept_below(picture: Picture, hole: Image.Image, *, max_megapixels: float) -> bool:
    """Whether a picture is stored below its transparent part too. Many programs leave one colour there."""
    grey = load_opaque(picture, max_megapixels=max_megapixels).convert("L")
    cell = fine_cell(*grey.size)
    return what_is_shown(reduced(grey, cell), reduced(hole, cell), cell) == "a picture"


def difference_hole(target: Image.Image, masked: Image.Image) -> Image.Image:
    """Where two pictures of one size, RGB, differ by more than compression does: a mask, mode L, white = hole; all
    black if nowhere. Specks are left out, gaps closed, and its edge grows by a few pixels."""
    from skimage.measure import label  # half a second, and most sets have masks
    from skimage.morphology import isotropic_closing, isotropic_dilation

    cell = fine_cell(*target.size)
    small = reduced(target, cell).astype(np.float32) - reduced(masked, cell)
    if is_same(small, cell):
        return Image.new("L", target.size)
    cells = changed_cells(np.abs(small).max(axis=2))
    near = share_around(cells, 3) > 0
    sure = cells & (share_around(cells, 3) > 0.99)
    difference = np.abs(np.asarray(target, np.int16) - np.asarray(masked, np.int16)).max(axis=2)
    found = (difference > _CHANGED) & _at_size(near, cell, difference.shape) | _at_size(sure, cell, difference.shape)
    margin = max(2, round(max(target.size) * _MARGIN_SHARE))
    parts = label(isotropic_closing(found, 2 * cell))
    is_large = np.bincount(parts.ravel()) > _SPECK * parts.size
    is_large[0] = False  # what is no hole
    return Image.fromarray(np.where(isotropic_dilation(is_large[parts], margin), 255, 0).astype(np.uint8))


def load_hole(triple: MigratedTriple, *, max_megapixels: float) -> Image.Image | None:
    """The mask that a triple is trained with, mode L, white = hole, from its old pictures; None where masks are random.
    Raises InputError if a picture cannot be read."""
    limit = max_megapixels
    target, mask, masked = (
        PictureFile(path) if path is not None else None for path in (triple.target, triple.mask, triple.masked)
    )
    match triple.hole_from:
        case "mask" | "inverted mask" if mask is not None:
            levels = load_mask(mask, max_megapixels=limit)
            return ImageOps.invert(levels) if triple.hole_from == "inverted mask" else levels
        case "alpha":
            return alpha_hole(masked or target, max_megapixels=limit)  # type: ignore[arg-type]
        case "difference" if masked is not None and target is not None:
            return difference_hole(*(load_picture(file, max_megapixels=limit) for file in (target, masked)))
    return None


def _at_size(cells: np.ndarray, cell: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.repeat(np.repeat(cells, cell, axis=0), cell, axis=1)[: shape[0], : shape[1]]
