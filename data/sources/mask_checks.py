"""What can be seen to be wrong with a mask: that it is none, that it lies where source and target do not differ, or
that EXIF turned its target and not it."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

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
    TURNED: (
        ORIENTATION,
        f"{SAVE_UPRIGHT} Was the mask made of the upright target, give the dataset `check_masks: warn`.",
    ),
}


_OF_PAIRS = (INVERTED, ELSEWHERE, SAME, SWAPPED)


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
        return self.kind in (SAME, SWAPPED)


def find_fault_of_mask(
    target: PictureBytes, mask: PictureBytes, levels: Image.Image, *, max_megapixels: float
) -> Fault | None:
    """What the mask alone shows. levels: the mask, decoded, in mode L."""
    if mask.data == target.data:
        return Fault(NO_MASK, "is the target's own file, no mask")
    if found := find_no_mask(levels, lambda: load_stored(mask, max_megapixels=max_megapixels)):
        return Fault(LABELS if found.labels else NO_MASK, found.what)
    return None


def find_fault_of_pair(
    target: PictureBytes, source: PictureBytes, mask: Image.Image, *, max_megapixels: float
) -> Fault | None:
    """What the difference of target and source shows. All are of one size. mask: decoded, in mode L.

    Raises InputError if a picture cannot be decoded.
    """
    if target.data == source.data:
        return Fault(SAME, "source and target are the same file")
    cell = preview_cell(*mask.size)
    before, after = (load_preview(picture, cell, max_megapixels=max_megapixels) for picture in (source, target))
    if looks_right(after, before, _reduced(mask, cell)):
        return None
    cell = fine_cell(*mask.size)
    before, after = (
        _reduced(load_picture(picture, max_megapixels=max_megapixels), cell) for picture in (source, target)
    )
    found = compare(after, before, _reduced(mask, cell), cell)
    return found and Fault(*found)


def _reduced(picture: Image.Image, cell: int) -> np.ndarray:
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


def judge(faults: Sequence[tuple[PictureFile, Fault]], num_pairs: int, policy: str, findings: Findings) -> None:
    """Add a dataset's faults, each with the picture that is to blame, to the findings: those that stop the run to its
    problems, the others to its notes.

    num_pairs: how many items have a source.  policy: of `check_masks`.
    """
    kinds = Counter(fault.kind for _, fault in faults)
    by_accident = kinds[SWAPPED] < max(_FEWEST_SWAPPED, _SWAPPED_BY_ACCIDENT * num_pairs)
    if by_accident:
        del kinds[SWAPPED]
    too_many = sum(kinds[kind] for kind in _OF_PAIRS) > MOST_FAULTY_PAIRS * num_pairs
    for where, fault in faults:
        if (policy == "off" and fault.kind != LABELS) or (fault.kind == SWAPPED and by_accident):
            continue
        stops = fault.kind == LABELS or (policy == "error" and (too_many or not fault.is_of_pair))
        add = findings.add if stops else findings.note
        add(_CURES[fault.kind][0], where, fault.what, _CURES[fault.kind][1])
