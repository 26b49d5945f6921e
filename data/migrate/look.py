"""The look at an old triple: each picture is read once, and what the pixels show is told for either colour of hole."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, cast

import numpy as np
from PIL import Image, ImageOps

from configs.errors import InputError, StorageFailed
from data.migrate.find import OldTriple
from data.migrate.holes import Shown, alpha_hole, difference_hole, is_kept_below, what_is_shown
from data.migrate.report import Colour, HoleFrom
from data.sources.items import Item
from data.sources.mask_checks import SAME_FILE, Fault, Pair, find_fault_of_mask, find_turn, reduced
from data.sources.mask_fit import INVERTED, SAME, SWAPPED, preview_cell
from data.sources.picture_file import PictureBytes, PictureFile
from data.sources.pictures import load_mask, load_picture, load_preview, read_header, read_picture
from data.sources.problems import MASKS, TRUNCATED, UNREADABLE, Findings, Problem
from data.sources.scan_cache import PictureInfo, ScannedItem
from data.sources.triples import check_sizes

_INVERTED = Fault(INVERTED, "the mask is the other way round: source and target differ only outside its hole")


class Contents(NamedTuple):
    """What target and masked picture show in the hole."""

    target: Shown
    masked: Shown

    @property
    def are_exchanged(self) -> bool:
        """Whether the hole is cut out of the target, and not of the masked picture."""
        return self.target == "cut out" and self.masked == "a picture"


@dataclass(frozen=True)
class Look:
    """What the pictures of an old triple show.

    contents: role -> hash of its bytes.  width, height: of the target, upright.  problems: what keeps it from being
    used, whichever colour is the hole.  hole_from: where the hole can be read; "mask" of either colour.
    white_share: of the mask, or of the hole that was read elsewhere.  fault_of_mask, turn: what the mask alone shows,
    and EXIF.  faults: of the pair, were that colour the hole; empty if it was not compared.  shown: what is in
    the hole of that colour, where it lies right.  opaque_target: the hole is a transparent part of the target, which is
    stored below it.  is_bare: the target is transparent and nothing is stored below.
    """

    contents: Mapping[str, str] = field(default_factory=dict)
    width: int = 0
    height: int = 0
    problems: tuple[Problem, ...] = ()
    hole_from: HoleFrom = "none"
    white_share: float | None = None
    fault_of_mask: Fault | None = None
    turn: Fault | None = None
    faults: Mapping[Colour, Fault | None] = field(default_factory=dict)
    shown: Mapping[Colour, Contents] = field(default_factory=dict)
    opaque_target: bool = False
    is_bare: bool = False


_Seen = Mapping[str, tuple[PictureBytes, PictureInfo]]  # by role


def look_at(triple: OldTriple, max_megapixels: float) -> Look:
    """The look at one triple. Raises StorageFailed, of which no picture is at fault."""
    findings = Findings()
    seen = _read(triple, max_megapixels, findings)
    look = Look({role: info.content for role, (_, info) in seen.items()})
    if "target" in seen:
        target = seen["target"][1]
        look = replace(look, width=target.width, height=target.height)
        mask, masked = (seen[role][1] if role in seen else None for role in ("mask", "masked"))
        item = Item(triple.name, triple.target, triple.mask, triple.masked, None)
        check_sizes(ScannedItem(item, target, mask, masked), findings)
    if findings.problems:
        return replace(look, problems=tuple(findings.problems))
    try:
        return (_look_at_mask if "mask" in seen else _look_for_hole)(look, seen, max_megapixels)
    except StorageFailed:
        raise
    except InputError as error:
        at_fault = next((str(file) for file in _files(triple).values() if str(error).startswith(f"{file}: ")), "")
        kind = UNREADABLE if at_fault == str(triple.mask) else TRUNCATED  # its transparency may be what is wrong
        return replace(look, problems=(Problem.of(error, kind, at_fault),))


def _files(triple: OldTriple) -> dict[str, PictureFile]:
    files = {"target": triple.target, "mask": triple.mask, "masked": triple.masked}
    return {role: file for role, file in files.items() if file is not None}


def _read(triple: OldTriple, limit: float, findings: Findings) -> _Seen:
    """The bytes and headers of a triple's pictures; findings: takes those that cannot be read."""
    seen = {}
    for role, file in _files(triple).items():
        try:
            picture = read_picture(file, max_megapixels=limit)
            width, height, orientation = read_header(picture, max_megapixels=limit)
            seen[role] = picture, PictureInfo(picture.content, width, height, orientation=orientation)
        except InputError as error:
            findings.add_error(error, UNREADABLE, file)
    return seen


def _look_at_mask(look: Look, seen: _Seen, limit: float) -> Look:
    """Of a triple with a mask: which colour of it fits the pair, if there is one."""
    (target, target_info), (mask, mask_info) = seen["target"], seen["mask"]
    levels = load_mask(mask, max_megapixels=limit)
    cells = reduced(levels, preview_cell(*levels.size))
    darkest, brightest = cast(tuple[int, int], levels.getextrema())  # of its one channel
    white_share = 0.0 if brightest < 128 else 1.0 if darkest >= 128 else float(cells.mean() / 255)
    look = replace(
        look,
        hole_from="mask",
        white_share=white_share,
        fault_of_mask=find_fault_of_mask(target, mask, levels, max_megapixels=limit),
        turn=find_turn(target_info.header, mask_info.header, "mask"),
    )
    if "masked" in seen and not look.fault_of_mask and 0 < white_share < 1:
        return _compare(look, target, seen["masked"][0], levels, cells, limit)
    load_preview(target, preview_cell(*levels.size), max_megapixels=limit)  # raises what decoding it would
    return look


def _compare(
    look: Look, target: PictureBytes, masked: PictureBytes, levels: Image.Image, white: np.ndarray, limit: float
) -> Look:
    """white: the levels in a preview's cells."""
    pair = Pair(target, masked, levels.size, max_megapixels=limit)
    cells: dict[Colour, np.ndarray] = {"white": white, "black": 255 - white}
    faults: dict[Colour, Fault | None]
    if target.data == masked.data:
        faults = dict.fromkeys(cells, SAME_FILE)
    elif fits := next((colour for colour, hole in cells.items() if pair.looks_right(hole)), None):
        faults = {colour: None if colour == fits else _INVERTED for colour in cells}
    else:
        faults = {"white": pair.find_fault(levels), "black": pair.find_fault(ImageOps.invert(levels))}
    shown = {
        colour: Contents(*(what_is_shown(grey, hole, pair.cell) for grey in pair.previews))
        for colour, hole in cells.items()
        if (fault := faults[colour]) is None or fault.kind in (SAME, SWAPPED)
    }
    return replace(look, faults=faults, shown=shown)


def _look_for_hole(look: Look, seen: _Seen, limit: float) -> Look:
    """Of a triple without a mask: where its hole can be read, if anywhere."""
    target = seen["target"][0]
    masked = seen["masked"][0] if "masked" in seen else None
    hole = alpha_hole(masked or target, max_megapixels=limit)
    if hole is not None:
        if (share := _share(hole)) == 1:
            what = "is transparent all over: nothing is left to keep"
            return replace(look, problems=(Problem(MASKS, str(masked or target), what, "Save it again."),))
        look = replace(look, hole_from="alpha", white_share=share)
        if masked is not None:
            return replace(look, shown={"white": Contents("a picture", "cut out")})
        if is_kept_below(target, hole, max_megapixels=limit):
            return replace(look, opaque_target=True)
        return replace(look, hole_from="none", white_share=None, is_bare=True)
    if masked is None:
        load_preview(target, preview_cell(look.width, look.height), max_megapixels=limit)
        return look
    after, before = (load_picture(picture, max_megapixels=limit) for picture in (target, masked))
    hole = difference_hole(after, before)
    share = _share(hole)
    if not 0 < share < 1:
        what = "differs from its target all over" if share else "is the same as its target: there is no hole to be seen"
        return replace(look, problems=(Problem(MASKS, str(masked), what, "Add a mask."),))
    cell = preview_cell(*hole.size)
    shown = what_is_shown(reduced(before.convert("L"), cell), reduced(hole, cell), cell)
    return replace(look, hole_from="difference", white_share=share, shown={"white": Contents("a picture", shown)})


def _share(hole: Image.Image) -> float:
    return float((np.asarray(hole) >= 128).mean())
