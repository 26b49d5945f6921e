"""Whether a picture is a mask at all, told from its histogram: photographs, gradients and class labels are none."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from configs.dataset_schema import Label

_NEAR = 8  # levels around the black and the white of a mask that compression may add
_MOST_GREY = (
    1 / 3
)  # share of pixels of another level: a soft edge of a tenth of the side is below it, photographs above
_FEW_PIXELS = 1 << 14  # that a histogram is made of
_LABEL_SHARE = 0.0005  # of the pixels, in the midst of others of their level


class NoMask(NamedTuple):
    """Why a picture is no mask. labels: its levels name classes.  what: the sentence's end."""

    labels: bool
    what: str


def find_no_mask(mask: Image.Image, load_stored: Callable[[], Image.Image]) -> NoMask | None:
    """Why a decoded mask, mode L, is none of black and white, or None. load_stored: gives it in the mode it is saved
    in."""
    step = max(1, round((mask.width * mask.height / _FEW_PIXELS) ** 0.5))
    few = mask.resize((-(-mask.width // step), -(-mask.height // step)), Image.Resampling.NEAREST)
    histogram = np.bincount(np.asarray(few).ravel(), minlength=256)
    black, white = int(histogram[:128].argmax()), 128 + int(histogram[128:].argmax())
    is_grey = np.ones(256, bool)
    for level in (black, white):
        if histogram[level]:
            is_grey[max(0, level - _NEAR) : level + _NEAR + 1] = False
    grey = histogram[is_grey].sum() / histogram.sum()
    one_side = not histogram[:128].any() or not histogram[128:].any()
    if not one_side and grey < _LABEL_SHARE:
        return None
    labels = _flat_levels(np.asarray(mask))
    if (len(labels) > 1 and one_side) or is_grey[labels].any():
        return NoMask(True, f"its pixels are labels, not brightness: {describe_labels(load_stored())}")
    if grey > _MOST_GREY:
        count = np.count_nonzero(histogram)
        return NoMask(
            False,
            f"is no mask: {grey:.0%} of its pixels are neither its black ({black}) nor its white ({white}), in {count} "
            "levels, as in a photograph or a gradient",
        )
    return None


def _flat_levels(levels: np.ndarray) -> list[int]:
    """Levels that fill areas of their own, as labels do: soft edges and gradients have their neighbours' too."""
    inner = levels[1:-1, 1:-1]
    flat = np.ones(inner.shape, bool)
    for rows in (slice(None, -2), slice(1, -1), slice(2, None)):
        for columns in (slice(None, -2), slice(1, -1), slice(2, None)):
            flat &= levels[rows, columns] == inner
    counts = np.bincount(inner[flat], minlength=256)
    beside = np.maximum(np.append(counts[1:], 0), np.append(0, counts[:-1]))
    if np.count_nonzero(counts) <= 16:  # too few for a gradient: 0, 1, 2, 3 are labels
        beside = np.zeros_like(counts)
    enough = counts >= max(4, _LABEL_SHARE * levels.size)
    return [int(level) for level in np.flatnonzero(enough & (beside <= 0.1 * counts))]


def select_label(stored: Image.Image, label: Label) -> Image.Image:
    """A mask in mode L, white where a picture has a label: a number (grey level, or index into a palette), or a colour
    ("#ff0000", each channel within 16 of it, as JPEG changes them)."""
    if isinstance(label, str):
        colour = np.array([int(label[at : at + 2], 16) for at in (1, 3, 5)], np.int16)
        hole = (np.abs(np.asarray(stored.convert("RGB")).astype(np.int16) - colour) <= 16).all(axis=2)
    else:
        numbers = np.asarray(stored)
        hole = numbers == label if numbers.ndim == 2 else (numbers[..., : _colours(stored)] == label).all(axis=2)
    return Image.fromarray(np.where(hole, 255, 0).astype(np.uint8))


def describe_labels(stored: Image.Image) -> str:
    """The commonest labels of a picture and their shares, as `select_label` takes them: "0 (93 %) and 1 (7 %)"."""
    pixels = stored.width * stored.height
    found = sorted(stored.getcolors(pixels) or [], reverse=True)
    if stored.mode not in ("1", "L", "P"):
        found = sorted(stored.convert("RGB").getcolors(pixels) or [], reverse=True)
    names = [f"{_name(value)} ({count / pixels:.0%})" for count, value in found[:5]]
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    return ", ".join(names) + more


def _name(value: object) -> str:
    return "#{:02x}{:02x}{:02x}".format(*value) if isinstance(value, tuple) else str(int(value))  # type: ignore[call-overload]


def _colours(stored: Image.Image) -> int:
    return len(stored.getbands()) - ("A" in stored.getbands())
