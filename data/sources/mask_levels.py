"""Whether a picture is a mask at all, told from its histogram: photographs, gradients and class labels are none."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from configs.dataset_schema import Label

_GREY = slice(33, 223)  # neither black nor white, which compression spreads
_MOST_GREY = 0.4  # share of the pixels: of a hole whose edge is as soft as it is wide a third, of photographs most
_NEAR = 8  # levels around one that compression may add
_FEW_LEVELS = 16  # soft edges and gradients have more
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
    one_side = not histogram[:128].any() or not histogram[128:].any()
    if not one_side and histogram[_GREY].sum() < _LABEL_SHARE * histogram.sum():
        return None
    labels = _flat_levels(np.asarray(mask))
    are_grey = [label for label in labels if label in range(256)[_GREY]]
    if (len(labels) > 1 and one_side) or (len(labels) > 2 and (are_grey or np.count_nonzero(histogram) <= _FEW_LEVELS)):
        return NoMask(True, f"its pixels are labels, not brightness: {describe_labels(load_stored())}")
    for label in are_grey:  # a mask of two levels, neither black nor white
        histogram[max(0, label - _NEAR) : label + _NEAR + 1] = 0
    grey = histogram[_GREY].sum() / (few.width * few.height)
    if grey > _MOST_GREY:
        return NoMask(
            False,
            f"is no mask: {grey:.0%} of its pixels are grey, between {_GREY.start} and {_GREY.stop - 1} of 255, in "
            f"{np.count_nonzero(histogram[_GREY])} levels, as in a photograph or a gradient",
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
    if np.count_nonzero(counts) <= _FEW_LEVELS:  # 0, 1, 2, 3 are labels
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
