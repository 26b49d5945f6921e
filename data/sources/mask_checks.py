"""What can be seen to be wrong with a mask: that it is none, that it lies where source and target do not differ, that
EXIF turned its target and not it, or that its source shows something else."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from data.sources.likeness import ANOTHER, TURNED_SOURCE, find_other_scene
from data.sources.mask_fit import (
    ELSEWHERE,
    INVERTED,
    SAME,
    SWAPPED,
    compare,
    fine_cell,
    looks_right,
    preview_cell,
)
from data.sources.mask_levels import find_no_mask
from data.sources.picture_file import PictureBytes, PictureFile
from data.sources.pictures import Header, load_picture, load_preview, load_stored
from data.sources.problems import MASKS, MISPLACED, ORIENTATION, POLARITY, SOURCES, Findings

LABELS, NO_MASK, TURNED = "labels", "no mask", "turned"
# Of an honest set, what a shadow or a reflection changes outside the mask looks like a misplaced one in a pair of some
# hundred; and a run does not learn from one wrong pair in twenty. A wrong folder, polarity or offset is in all, or in
# all of a batch.
MOST_FAULTY_PAIRS = 0.05
# Of right pairs, too, some look swapped (an object that blends in: 1 of the demo's 96), and of swapped ones every other
# does (52 of 96). So one pair tells nothing, and a set whose folders were exchanged, all.
_SWAPPED_BY_ACCIDENT = 0.1
_FEWEST_SWAPPED = 3

SAVE_UPRIGHT = "Save both upright, without an orientation in EXIF."
# kind -> what it is listed under, and what to do
_CURES = {
    LABELS: (MASKS, "Say which of them is the hole: `mask: {label: 1}`, with `folder` where the masks are in one."),
    NO_MASK: (MASKS, "Give masks of black and white. Does the mask's folder, column or member hold the pictures?"),
    INVERTED: (POLARITY, "Invert it: white marks the hole."),
    ELSEWHERE: (MISPLACED, "Make the mask from this pair."),
    SAME: (SOURCES, "Give the picture as it was before as source, or no source."),
    SWAPPED: (SOURCES, "Exchange the two. Are things to be added, give the dataset `check_masks: warn`."),
    ANOTHER: (
        SOURCES,
        "Give the picture from which the target was made: do the names or the rows of the two match? If they do, give "
        "the dataset `check_masks: warn`.",
    ),
    TURNED_SOURCE: (ORIENTATION, SAVE_UPRIGHT),
    TURNED: (
        ORIENTATION,
        f"{SAVE_UPRIGHT} Was the mask made of the upright target, give the dataset `check_masks: warn`.",
    ),
}


_OF_SOURCES = (SAME, SWAPPED, ANOTHER, TURNED_SOURCE)
_OF_PAIRS = (INVERTED, ELSEWHERE, *_OF_SOURCES)


class Fault(NamedTuple):
    """What is wrong with the mask of an item, or with its pair of source and target. kind: a key of the cures.  what:
    a sentence without its subject and full stop."""

    kind: str
    what: str

    @property
    def is_of_pair(self) -> bool:
        """Whether it was seen in the difference of source and target."""
        return self.kind in _OF_PAIRS

    @property
    def is_of_source(self) -> bool:
        """Whether the source is to blame, not the mask."""
        return self.kind in _OF_SOURCES


def find_fault_of_mask(
    target: PictureBytes, mask: PictureBytes, levels: Image.Image, *, max_megapixels: float
) -> Fault | None:
    """What the mask alone shows. levels: the mask, decoded, in mode L."""
    if mask.data == target.data:
        return Fault(NO_MASK, "is the target's own file, no mask")
    if found := find_no_mask(levels, lambda: load_stored(mask, max_megapixels=max_megapixels)):
        return Fault(LABELS if found.labels else NO_MASK, found.what)
    return None


class Pair:
    """Source and target of one size, (width, height): decoded once for each of the two sizes at which they are held
    against masks.

    Raises InputError, from wherever it decodes them, if a picture cannot be.
    """

    def __init__(
        self, target: PictureBytes, source: PictureBytes, size: tuple[int, int], *, max_megapixels: float
    ) -> None:
        self._pictures, self._max_megapixels = (target, source), max_megapixels
        self.cell, self._fine_cell = preview_cell(*size), fine_cell(*size)
        # Not by cached_property: up to Python 3.11 it has one lock for all pairs, and their decoding would take turns.
        self._previews: tuple[np.ndarray, np.ndarray] | None = None
        self._reduced: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def previews(self) -> tuple[np.ndarray, np.ndarray]:
        """Target and source in grey, in cells of `cell` pixels: uint8 [h, w]."""
        if self._previews is None:
            target, source = (
                load_preview(picture, self.cell, max_megapixels=self._max_megapixels) for picture in self._pictures
            )
            self._previews = target, source
        return self._previews

    @property
    def _colours(self) -> tuple[np.ndarray, np.ndarray]:
        """The two in finer cells: uint8 [h, w, 3]."""
        if self._reduced is None:
            target, source = (
                reduced(load_picture(picture, max_megapixels=self._max_megapixels), self._fine_cell)
                for picture in self._pictures
            )
            self._reduced = target, source
        return self._reduced

    def looks_right(self, mask: np.ndarray) -> bool:
        """Whether it plainly fits a mask in cells like the previews'."""
        return looks_right(*self.previews, mask)

    def find_fault(self, mask: Image.Image) -> Fault | None:
        """What its pictures show to be wrong, with a mask (decoded, in mode L) that does not plainly fit or with the
        source."""
        if other := find_other_scene(*self.previews, reduced(mask, self.cell)):
            return Fault(*other)
        found = compare(*self._colours, reduced(mask, self._fine_cell), self._fine_cell)
        return found and Fault(*found)


SAME_FILE = Fault(SAME, "source and target are the same file")


def find_fault_of_pair(
    target: PictureBytes, source: PictureBytes, mask: Image.Image, *, max_megapixels: float
) -> Fault | None:
    """What the difference of target and source shows. All are of one size. mask: decoded, in mode L.

    Raises InputError if a picture cannot be decoded.
    """
    if target.data == source.data:
        return SAME_FILE
    pair = Pair(target, source, mask.size, max_megapixels=max_megapixels)
    return None if pair.looks_right(reduced(mask, pair.cell)) else pair.find_fault(mask)


def reduced(picture: Image.Image, cell: int) -> np.ndarray:
    """A picture in which every pixel is the mean of cell x cell ones."""
    return np.asarray(picture.reduce(cell) if cell > 1 else picture)


def find_turn(target: Header, other: Header, role: str) -> Fault | None:
    """Whether EXIF turns one of two pictures that are stored in one size, so that they show different things.

    role: what the other is called.
    """
    if target.orientation == other.orientation or target.stored_size != other.stored_size:
        return None
    return Fault(
        TURNED,
        f"EXIF turns the {role} (orientation {other.orientation}) otherwise than its target (orientation "
        f"{target.orientation}), though both are stored in one size",
    )


def look_swapped_by_accident(num_swapped: int, num_pairs: int) -> bool:
    """Whether so few pairs of a set look swapped that none is."""
    return num_swapped < max(_FEWEST_SWAPPED, _SWAPPED_BY_ACCIDENT * num_pairs)


def judge(faults: Sequence[tuple[PictureFile, Fault]], num_pairs: int, policy: str, findings: Findings) -> None:
    """Add a dataset's faults, each with the picture that is to blame, to the findings: those that stop the run to its
    problems, the others to its notes.

    num_pairs: how many items have a source.  policy: of `check_masks`.
    """
    kinds = Counter(fault.kind for _, fault in faults)
    by_accident = look_swapped_by_accident(kinds[SWAPPED], num_pairs)
    if by_accident:
        del kinds[SWAPPED]
    too_many = sum(kinds[kind] for kind in _OF_PAIRS) > MOST_FAULTY_PAIRS * num_pairs
    for where, fault in faults:
        if (policy == "off" and fault.kind != LABELS) or (fault.kind == SWAPPED and by_accident):
            continue
        stops = fault.kind == LABELS or (policy == "error" and (too_many or not fault.is_of_pair))
        add = findings.add if stops else findings.note
        add(_CURES[fault.kind][0], where, fault.what, _CURES[fault.kind][1])
