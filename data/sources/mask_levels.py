"""Whether a picture is a mask at all, told from its histogram: photographs, gradients and class labels are none."""

from collections.abc import Callable
from operator import itemgetter
from typing import NamedTuple

import numpy as np
from PIL import Image

from configs.dataset_schema import Label

_GREY = slice(33, 223)  # neither black nor white, which compression spreads
_COLOURED = slice(16, 240)  # the brightness of red, green, blue and yellow, of 29 to 226; neither black nor white
_MOST_GREY = 0.4  # share of the pixels: of a hole whose edge is as soft as it is wide a third, of photographs most
_NEAR = 8  # levels around one that compression may add
_FEW_LEVELS = 16  # soft edges and gradients have more
_FEW_PIXELS = 1 << 14  # that a histogram is made of
_LEAST_COLOUR = 64  # levels between the channels of a colour
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
    # Classes count from 0; levels 16, 17 and 235 are those of compressed video.
    are_few = bool(histogram[0]) and np.count_nonzero(histogram) <= _FEW_LEVELS
    others = histogram[1:255] if are_few else histogram[_COLOURED]
    if not one_side and others.sum() < _LABEL_SHARE * histogram.sum():
        return None
    labels = _flat_levels(np.asarray(mask))
    are_grey = [label for label in labels if label in range(256)[_GREY]]
    if (
        (len(labels) > 1 and one_side)
        or (len(labels) > 2 and (are_grey or are_few))
        or (any(label in range(128)[_COLOURED] for label in labels) and _keeps_a_colour(few, load_stored()))
        or (not histogram[1:].any() and _has_levels_below_8_bits(load_stored()))
    ):
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


def _keeps_a_colour(mask: Image.Image, stored: Image.Image) -> bool:
    """Whether a mask, reduced, is black for its brightness where a colour says otherwise: a red hole on white."""
    if stored.mode in ("1", "L", "LA") or stored.mode.startswith("I;16"):
        return False
    channels = np.asarray(stored.resize(mask.size, Image.Resampling.NEAREST).convert("RGB")).astype(np.int16)
    coloured = np.ptp(channels, axis=2) >= _LEAST_COLOUR
    return bool((coloured & (np.asarray(mask) < 128)).mean() >= _LABEL_SHARE)


def _has_levels_below_8_bits(stored: Image.Image) -> bool:
    """Whether a picture of 16 bits, of which the upper 8 are all 0, has more than one level."""
    return stored.mode.startswith("I;16") and bool(np.asarray(stored).any())


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
    found: list[tuple[int, object]]
    if stored.mode.startswith("I;16"):
        counts = np.bincount(np.asarray(stored).ravel())
        found = [(int(counts[level]), int(level)) for level in np.flatnonzero(counts)]
    else:
        shown = stored if stored.mode in ("1", "L", "P") else stored.convert("RGB")
        found = [*(shown.getcolors(pixels) or [])]
    found.sort(key=itemgetter(0), reverse=True)
    names = [f"{_name(value)} ({count / pixels:.0%})" for count, value in found[:5]]
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    return ", ".join(names) + more


def _name(value: object) -> str:
    return "#{:02x}{:02x}{:02x}".format(*value) if isinstance(value, tuple) else str(int(value))  # type: ignore[call-overload]


def _colours(stored: Image.Image) -> int:
    return len(stored.getbands()) - ("A" in stored.getbands())
