"""The way from a picture of any size to one that the model takes, and back: window, colours, feathered seam.

Pictures are uint8 [H, W, 3], masks bool [H, W], True = paint.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy.ndimage import distance_transform_edt

from configs.flux_shape import PATCH
from data.samples.geometry import MAX_ASPECT, Bucket

_CONTEXT = 0.5  # of the hole's longer side, that is shown of the picture on each side of it
_LEAST_CONTEXT = 0.125  # likewise, where a narrow picture would be squeezed if more were
_RING = 0.15  # of the window's shorter side: how far from the hole colours are compared
_LEAST_GAIN, _MOST_GAIN = 0.8, 1.25  # of a channel's contrast: beyond that the pictures differ in more than colour


@dataclass(frozen=True)
class Window:
    """The part of a picture that is filled, and the size at which it is."""

    left: int
    top: int
    right: int
    bottom: int
    bucket: Bucket

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        return self.right - self.left, self.bottom - self.top

    @property
    def slices(self) -> tuple[slice, slice]:
        return slice(self.top, self.bottom), slice(self.left, self.right)


def plan_window(mask: np.ndarray, resolution: int) -> Window:
    """The window of a hole: with context on each side, of no less than resolution x resolution pixels where the picture
    has them, no longer than 2:1 where the hole with the least context allows it: no bucket is longer, so such a window
    is squeezed into one.

    A hole in a small part of a large picture is so filled at full detail, and one in a small picture sees all of it.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    spans = [(int(rows[0]), int(rows[-1]) + 1), (int(columns[0]), int(columns[-1]) + 1)]
    lengths = [stop - start for start, stop in spans]
    wanted = [max(length + 2 * _CONTEXT * max(lengths), resolution) for length in lengths]
    wanted = [max(side, max(wanted) / MAX_ASPECT) for side in wanted]
    sides = [min(round(side), limit) for side, limit in zip(wanted, mask.shape, strict=True)]
    longest = int(MAX_ASPECT * min(sides))  # known only once the picture has limited the other side
    least = [math.ceil(length + 2 * _LEAST_CONTEXT * max(lengths)) for length in lengths]
    sides = [min(side, max(longest, few)) for side, few in zip(sides, least, strict=True)]
    (top, bottom), (left, right) = map(_place, spans, sides, mask.shape)
    return Window(left, top, right, bottom, _bucket_of(right - left, bottom - top, resolution))


def _place(span: tuple[int, int], side: int, limit: int) -> tuple[int, int]:
    """A side's (start, stop) inside the picture, the span in its middle where there is room."""
    start = min(max((sum(span) - side) // 2, 0), limit - side)
    return start, start + side


def _bucket_of(width: int, height: int, resolution: int) -> Bucket:
    """About resolution x resolution pixels, in the aspect of a window, sides multiples of 16."""
    aspect = min(max(math.sqrt(width / height), MAX_ASPECT**-0.5), MAX_ASPECT**0.5)
    across, down = (max(1, round(resolution * part / PATCH)) * PATCH for part in (aspect, 1 / aspect))
    return Bucket(down, across)


def cut_window(picture: np.ndarray, mask: np.ndarray, window: Window) -> tuple[np.ndarray, np.ndarray]:
    """The window of a picture and its mask at the size of its bucket: a pixel of which any part is hole is hole."""
    size = (window.bucket.width, window.bucket.height)
    part = Image.fromarray(picture[window.slices]).resize(size, Image.Resampling.LANCZOS)
    hole = Image.fromarray(mask[window.slices].astype(np.float32), mode="F").resize(size, Image.Resampling.BOX)
    return np.array(part), np.asarray(hole) > 0


def paste(picture: np.ndarray, mask: np.ndarray, fill: np.ndarray, window: Window, *, feather: float) -> np.ndarray:
    """The picture with its hole filled, at its own size.

    fill: the window's, at the size of its bucket.  feather: pixels around the hole over which fill and picture are
    blended; beyond them every pixel is as it was.
    """
    part, hole = picture[window.slices], mask[window.slices]
    large = np.array(Image.fromarray(fill).resize(window.size, Image.Resampling.LANCZOS))
    away = distance_transform_edt(~hole) if not hole.all() else np.zeros(hole.shape)
    matched = match_colours(large, part, away)
    share = np.clip(1 - away / (feather + 1), 0, 1)
    share = share * share * (3 - 2 * share)  # without a kink at either end
    blended = np.rint(matched * share[..., None] + part * (1 - share[..., None]))
    pasted = picture.copy()
    pasted[window.slices] = np.where(share[..., None] > 0, blended, part).astype(np.uint8)
    return pasted


def match_colours(fill: np.ndarray, picture: np.ndarray, away: np.ndarray) -> np.ndarray:
    """A fill, float [H, W, 3], shifted and stretched channel by channel to what the picture is around the hole.

    Both show the same there, so a difference of their means is the model's or its VAE's drift in colour, which the hole
    has too.  away: each pixel's distance from the hole, 0 in it.
    """
    known = (away > 0) & (away <= max(_RING * min(away.shape), 8))
    if known.sum() < 64:  # the hole is the window: nothing to compare
        return fill.astype(np.float64)
    shown, given = fill[known].astype(np.float64), picture[known].astype(np.float64)
    spread = np.maximum(shown.std(axis=0), 1.0)
    gain = np.clip(given.std(axis=0) / spread, _LEAST_GAIN, _MOST_GAIN)
    return np.clip((fill - shown.mean(axis=0)) * gain + given.mean(axis=0), 0, 255)
