"""What can be seen to be wrong with a mask: that it is none, that it lies where source and target do not differ, or
that EXIF turned its target and not it."""

from typing import NamedTuple

import numpy as np
from PIL import Image

from data.sources.mask_fit import (
    ELSEWHERE,
    INVERTED,
    SAME,
    SWAPPED,
    UNRELATED,
    compare,
    fine_cell,
    looks_right,
    preview_cell,
)
from data.sources.mask_levels import find_no_mask
from data.sources.picture_file import PictureBytes
from data.sources.pictures import QUARTER_TURNS, Header, load_picture, load_preview, load_stored

LABELS, NO_MASK, TURNED = "labels", "no mask", "turned"
# Of an honest set, what a shadow or a reflection changes outside the mask looks like a misplaced one in a pair of some
# hundred; and a run does not learn from one wrong pair in twenty. A wrong folder, polarity or offset is in all, or in
# all of a batch.
MOST_FAULTY_PAIRS = 0.05

_TURN_CURE = (
    "Save both upright, without EXIF's orientation. Is the mask right as it is, give check_masks: warn to the dataset."
)
_CURES = {
    LABELS: "Say which is the hole: `mask: {label: 1}`, beside `folder` where the masks are in one.",
    NO_MASK: "Give masks of black and white; does the mask's folder, column or member hold the pictures?",
    INVERTED: "Invert it: white marks the hole.",
    ELSEWHERE: "Make the mask again from this pair.",
    SAME: "Give the picture as it was before as source, or no source.",
    SWAPPED: "Exchange source and target. Are things to be added, give check_masks: warn to the dataset.",
    UNRELATED: "Give the source that goes with this target.",
    TURNED: _TURN_CURE,
}


class Fault(NamedTuple):
    """What is wrong with the mask of an item, or with its pair of source and target. kind: a key of the cures.  what:
    a sentence without its subject and full stop."""

    kind: str
    what: str

    @property
    def cure(self) -> str:
        return _CURES[self.kind]

    @property
    def is_of_pair(self) -> bool:
        """Whether it was seen in the difference of source and target."""
        return self.kind not in (LABELS, NO_MASK, TURNED)

    @property
    def is_of_source(self) -> bool:
        """Whether the source is to blame, not the mask."""
        return self.kind in (SAME, SWAPPED, UNRELATED)


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
    if target.orientation == other.orientation or _stored_size(target) != _stored_size(other):
        return None
    return Fault(
        TURNED,
        f"EXIF turns the {role} (orientation {other.orientation}) otherwise than its target (orientation "
        f"{target.orientation}), though both are stored in one size",
    )


def _stored_size(header: Header) -> tuple[int, int]:
    size = header.width, header.height
    return size[::-1] if header.orientation in QUARTER_TURNS else size


def stop_run(fault: Fault, *, num_of_pairs: int, num_pairs: int, policy: str) -> bool:
    """Whether a fault stops the run, or is told and no more. policy: of `check_masks`.

    num_of_pairs: how many such faults of pairs the dataset has, of num_pairs: those with a source.
    """
    if fault.kind == LABELS:
        return True
    return policy == "error" and (not fault.is_of_pair or num_of_pairs > MOST_FAULTY_PAIRS * num_pairs)
