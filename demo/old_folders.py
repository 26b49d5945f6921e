"""Old folders as people bring them: 40 triples cut from photographs, their files called in all usual ways, of which
some are wrong in every way that `fluxfill migrate` knows.

    python -m demo.old_folders FOLDER
"""

from __future__ import annotations

import shutil
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageOps

from data.sources.problems import (
    CAPTIONS,
    DUPLICATES,
    MASKS,
    MISPLACED,
    NAMES,
    ORIENTATION,
    POLARITY,
    SIZES,
    SOURCES,
    TRUNCATED,
    UNREADABLE,
)
from demo.photographs import PHOTOGRAPHS, draw_hole, load_photographs

COUNT = 40
SIZE = (256, 192)
_ORIENTATION_TAG = 0x0112


@dataclass(frozen=True)
class OldTriple:
    """One triple and its files, before anything is wrong with it. hole: mode L, white = hole."""

    target: Image.Image
    hole: Image.Image
    masked: Image.Image
    target_file: Path
    mask_file: Path
    masked_file: Path


@dataclass(frozen=True)
class Planted:
    """What there is to find. target, mask, masked: the folders.  faults: name in the new folders -> kind of the problem
    for which it is left out.  notes: name -> kind of what is said of one that is kept.  sources: those that are kept
    with their masked picture, which shows something else in the hole.  good: all that are kept.  orphans: files that
    belong to no target."""

    target: Path
    mask: Path
    masked: Path
    faults: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    sources: set[str] = field(default_factory=set)
    good: set[str] = field(default_factory=set)
    orphans: set[str] = field(default_factory=set)


def make_old_folders(folder: Path, *, white_is_hole: bool = True) -> Planted:
    """Write the 40 triples to FOLDER/target_image_dir, mask_dir and source_image_dir; the same bytes every time.

    white_is_hole: else the masks are black in the hole.
    """
    planted = Planted(folder / "target_image_dir", folder / "mask_dir", folder / "source_image_dir")
    photographs = list(load_photographs().items())
    for number in range(COUNT):
        subject, photograph = photographs[number % len(photographs)]
        name, files = _name_files(number, subject, planted)
        triple = OldTriple(*_draw(number, photograph), *files)
        _save(triple, white_is_hole=white_is_hole)
        if number % 4 != 3:
            beside = triple.masked_file if number % 4 == 2 else triple.target_file
            suffix = ".caption" if number % 8 == 1 else ".txt"
            beside.with_suffix(suffix).write_text(f"{PHOTOGRAPHS[subject].caption}\n", encoding="utf-8")
        if number in _FAULTS:
            kind, spoil = _FAULTS[number]
            spoil(triple, planted)
            if triple.target_file.exists():
                planted.faults[name] = kind
            continue
        if number in _NOTES:
            kind, change = _NOTES[number]
            change(triple, planted)
            planted.notes[name] = kind
        elif number in _SOURCES:
            _put_other_picture(triple, photographs[(number + 1) % len(photographs)][1])
            planted.sources.add(name)
        planted.good.add(name)
    return planted


def _name_files(number: int, subject: str, planted: Planted) -> tuple[str, tuple[Path, Path, Path]]:
    """A triple's name in the new folders, and its old files: every way of calling them has its turn."""
    name = f"{subject}_{number:02d}"
    target, mask, masked = f"{name}.jpg", f"{name}.png", f"{name}.jpg"
    match number % 8:
        case 1:
            mask, masked = f"{name}_mask.png", f"{name}_masked.jpg"
        case 2:
            target, mask, masked = f"{name}.PNG", f"{name.upper()}-mask.PNG", f"{name.title()}.webp"
        case 3:
            name = f"part_{number // 8}/{name}"
            target, mask, masked = (f"part_{number // 8}/{file}" for file in (target, mask, masked))
        case 4:
            name = f"{subject}_é_{number:02d}"
            target, mask = f"{name}.jpg", f"{name}.png"
            masked = unicodedata.normalize("NFD", f"{name}.jpeg")
        case 5:
            mask, masked = f"{name}-masklabel.png", f"{name}-condlabel.png"
    return name, (planted.target / target, planted.mask / mask, planted.masked / masked)


def _draw(number: int, photograph: Image.Image) -> tuple[Image.Image, Image.Image, Image.Image]:
    """A piece of a photograph, a hole, and the piece with the hole cut out in black."""
    generator = np.random.default_rng(number)
    width, height = SIZE
    scale = max(width / photograph.width, height / photograph.height) * generator.uniform(1.1, 1.4)
    scaled = photograph.resize(
        (round(photograph.width * scale), round(photograph.height * scale)), Image.Resampling.LANCZOS
    )
    left, top = (int(generator.integers(side - wanted + 1)) for side, wanted in zip(scaled.size, SIZE, strict=True))
    target = scaled.crop((left, top, left + width, top + height))
    hole = Image.fromarray(draw_hole(generator, height // 2, width // 2).astype(np.uint8) * 255)
    hole = hole.resize(SIZE, Image.Resampling.NEAREST)
    return target, hole, Image.composite(Image.new("RGB", SIZE), target, hole)


def _save(triple: OldTriple, *, white_is_hole: bool) -> None:
    mask = triple.hole if white_is_hole else ImageOps.invert(triple.hole)
    for picture, file in (
        (triple.target, triple.target_file),
        (mask, triple.mask_file),
        (triple.masked, triple.masked_file),
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.save(file, quality=90)  # which PNG passes over


def _put_other_picture(triple: OldTriple, photograph: Image.Image) -> None:
    """As in the removal of objects: the masked picture has something else in the hole."""
    other = ImageOps.fit(photograph, SIZE)
    before, after = (np.asarray(picture).astype(int) for picture in (other, triple.target))
    unlike = np.where(np.abs(before - after) < 40, after + np.where(after < 128, 50, -50), before).astype(np.uint8)
    Image.composite(Image.fromarray(unlike), triple.target, triple.hole).save(triple.masked_file, quality=90)


# --- what is wrong ----------------------------------------------------------------------------------------------------


def _invert_mask(triple: OldTriple, planted: Planted) -> None:
    _change_mask(triple, ImageOps.invert)


def _move_mask(triple: OldTriple, planted: Planted) -> None:
    _change_mask(triple, lambda mask: ImageChops.offset(mask, 40, -24))


def _shrink_mask(triple: OldTriple, planted: Planted) -> None:
    _change_mask(triple, lambda mask: mask.reduce(2))


def _blacken_mask(triple: OldTriple, planted: Planted) -> None:
    _change_mask(triple, lambda mask: mask.point(lambda _: 0))


def _whiten_mask(triple: OldTriple, planted: Planted) -> None:
    _change_mask(triple, lambda mask: mask.point(lambda _: 255))


def _label_mask(triple: OldTriple, planted: Planted) -> None:
    _change_mask(triple, lambda mask: mask.point(lambda level: level // 255))


def _photograph_as_mask(triple: OldTriple, planted: Planted) -> None:
    _change_mask(triple, lambda _: triple.target.convert("L"))


def _change_mask(triple: OldTriple, change: Callable[[Image.Image], Image.Image]) -> None:
    with Image.open(triple.mask_file) as mask:
        changed = change(mask)
    changed.save(triple.mask_file)


def _spoil_target(triple: OldTriple, planted: Planted) -> None:
    triple.target_file.write_text("<html>404 Not Found</html>\n", encoding="utf-8")


def _cut_target(triple: OldTriple, planted: Planted) -> None:
    _cut_file(triple.target_file)


def _cut_masked(triple: OldTriple, planted: Planted) -> None:
    _cut_file(triple.masked_file)


def _cut_file(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


def _turn_pictures(triple: OldTriple, planted: Planted) -> None:
    """As a camera that was held upside down stores them; the mask was made by a program that passes over EXIF."""
    exif = Image.Exif()
    exif[_ORIENTATION_TAG] = 3
    for picture, file in ((triple.target, triple.target_file), (triple.masked, triple.masked_file)):
        picture.transpose(Image.Transpose.ROTATE_180).save(file, quality=90, exif=exif)
    _change_mask(triple, lambda mask: mask.transpose(Image.Transpose.ROTATE_180))


def _misname_mask(triple: OldTriple, planted: Planted) -> None:
    misnamed = triple.mask_file.with_stem(triple.mask_file.stem.replace("ff", "f"))
    triple.mask_file.rename(misnamed)
    planted.orphans.add(misnamed.name)


def _remove_target(triple: OldTriple, planted: Planted) -> None:
    for file in (triple.target_file, triple.target_file.with_suffix(".txt")):
        file.unlink(missing_ok=True)
    planted.orphans.update((triple.mask_file.name, triple.masked_file.name))


def _copy_first(triple: OldTriple, planted: Planted) -> None:
    for folder, file in (
        (planted.target, triple.target_file),
        (planted.mask, triple.mask_file),
        (planted.masked, triple.masked_file),
    ):
        shutil.copyfile(folder / f"astronaut_00{file.suffix}", file)


def _save_twice(triple: OldTriple, planted: Planted) -> None:
    triple.target.save(triple.target_file.with_suffix(".png"))


def _other_masked(triple: OldTriple, planted: Planted) -> None:
    shutil.copyfile(planted.masked / "astronaut_00.jpg", triple.masked_file)


def _turn_masked(triple: OldTriple, planted: Planted) -> None:
    """As a program leaves it that drops the EXIF of a camera that was held upside down."""
    triple.masked.transpose(Image.Transpose.ROTATE_180).save(triple.masked_file, quality=90)


def _exchange_pictures(triple: OldTriple, planted: Planted) -> None:
    triple.masked.save(triple.target_file, quality=90)
    triple.target.save(triple.masked_file, quality=90)


def _caption_in_gbk(triple: OldTriple, planted: Planted) -> None:
    triple.target_file.with_suffix(".txt").write_bytes("一辆红色摩托车".encode("gbk"))


def _remove_masked(triple: OldTriple, planted: Planted) -> None:
    triple.masked_file.unlink()


def _copy_target_to_masked(triple: OldTriple, planted: Planted) -> None:
    triple.target.save(triple.masked_file, quality=80)


_Spoil = Callable[[OldTriple, Planted], None]
_FAULTS: dict[int, tuple[str, _Spoil]] = {
    6: (POLARITY, _invert_mask),
    7: (MISPLACED, _move_mask),
    8: (SIZES, _shrink_mask),
    9: (MASKS, _blacken_mask),
    10: (MASKS, _whiten_mask),
    11: (SOURCES, _other_masked),
    12: (ORIENTATION, _turn_masked),
    14: (MASKS, _photograph_as_mask),
    15: (MASKS, _label_mask),
    16: (UNREADABLE, _spoil_target),
    17: (TRUNCATED, _cut_target),
    19: (TRUNCATED, _cut_masked),
    22: (ORIENTATION, _turn_pictures),
    23: (NAMES, _misname_mask),
    24: (DUPLICATES, _copy_first),
    28: (CAPTIONS, _caption_in_gbk),
    30: (SOURCES, _exchange_pictures),
    31: (NAMES, _save_twice),
    32: (NAMES, _remove_target),
}
_NOTES: dict[int, tuple[str, _Spoil]] = {33: (NAMES, _remove_masked), 38: (SOURCES, _copy_target_to_masked)}
_SOURCES = {34, 35, 39}


if __name__ == "__main__":
    made = make_old_folders(Path(sys.argv[1]))
    print(f"{len(made.good)} triples are good, {len(made.faults)} are wrong")
