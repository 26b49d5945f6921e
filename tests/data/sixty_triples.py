"""Sixty triples as people have them: good ones in every shape that is read, and among them one of each fault.

`write(folder)` makes the folders target, mask and source; FAULTS says what a run must find, and `cure(folder)` does
what the messages say. To look at: python -m tests.data.sixty_triples FOLDER
"""

import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageOps

from data.sources.problems import (
    CAPTIONS,
    LEFT_OUT,
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

COUNT, SIDE = 60, 48
HOLE = (12, 10, 34, 30)


class Fault(NamedTuple):
    """kind, where: of the problem or note it makes; where is a path below the folder.  what: a part of what is said.
    stops: whether it stops the run.  plant, cure: make and mend it, in the folder."""

    kind: str
    where: str
    what: str
    stops: bool
    plant: Callable[[Path], object]
    cure: Callable[[Path], object]


def _name(number: int) -> str:
    return f"{'street' if number % 2 else 'park'}-{number:02d}"


def _triple(number: int) -> dict[str, Image.Image]:
    """Noise, the same with a dark patch in the hole, and the hole."""
    noise = np.random.default_rng(number).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    target = Image.fromarray(noise).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    source, mask = target.copy(), Image.new("L", (SIDE, SIDE))
    source.paste((number % 20, 8, 16), HOLE)
    mask.paste(255, HOLE)
    return {"target": target, "mask": mask, "source": source}


def _save(folder: Path, number: int, *, name: str | None = None, suffix: str = ".png", **options: object) -> None:
    for role, picture in _triple(number).items():
        path = folder / role / f"{name or _name(number)}{'.png' if role == 'mask' else suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, **options)


def _save_one(folder: Path, role: str, number: int, picture: Image.Image | None = None) -> None:
    (picture or _triple(number)[role]).save(folder / role / f"{_name(number)}.png")


def write(folder: Path) -> None:
    """The sixty, and all faults in them."""
    for number in range(COUNT):
        _save(folder, number)
        if number % 3:
            (folder / "target" / f"{_name(number)}.txt").write_text(f"number {number}\nof sixty", encoding="utf-8")
    _write_sound_oddities(folder)
    for fault in FAULTS:
        fault.plant(folder)


def cure(folder: Path) -> None:
    """What the messages say, for each fault."""
    for fault in FAULTS:
        fault.cure(folder)


# --- sound, whatever they look like: numbers 40 to 59 -----------------------------------------------------------------


def _write_sound_oddities(folder: Path) -> None:
    for number, suffix in ((40, ".jpg"), (41, ".JPEG"), (42, ".webp"), (43, ".bmp"), (44, ".tif")):
        _remove(folder, number)
        _save(folder, number, suffix=suffix)
    _remove(folder, 45)  # one picture, two masks
    for role, picture in _triple(45).items():
        names = [f"{_name(45)}_mask_{which}" for which in (1, 2)] if role == "mask" else [_name(45)]
        for name in names:
            picture.save(folder / role / f"{name}.png")
    _remove(folder, 46)  # a name in both of Unicode's forms
    for role, picture in _triple(46).items():
        form = "NFD" if role == "mask" else "NFC"
        picture.save(folder / role / unicodedata.normalize(form, "über-46.png"))
    (folder / "target" / f"{_name(46)}.txt").unlink(missing_ok=True)
    for text in (48, 51):
        (folder / "target" / f"{_name(text)}.caption").write_text("a caption under another suffix")
    (folder / "target" / f"{_name(47)}.txt").write_text(" \n")  # none
    _save(folder, 49, exif=_turned(6))  # all three
    _save_one(folder, "target", 50, _triple(50)["target"].convert("RGBA"))
    _save_one(folder, "target", 52, _triple(52)["target"].convert("L"))
    _save_one(folder, "mask", 53, _triple(53)["mask"].convert("1"))
    _save_one(folder, "mask", 54, _triple(54)["mask"].convert("RGB"))
    for litter in ("@eaDir/park-00.png", "__MACOSX/._park-00.png", ".DS_Store", "Thumbs.db", "._park-00.png"):
        path = folder / "target" / litter
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\0\5\26\7")


def _remove(folder: Path, number: int) -> None:
    for role in ("target", "mask", "source"):
        (folder / role / f"{_name(number)}.png").unlink(missing_ok=True)


# --- faults: numbers 0 to 39 ------------------------------------------------------------------------------------------


def _rename(role: str, before: str, after: str) -> Callable[[Path], object]:
    return lambda folder: (folder / role / before).rename(folder / role / after)


def _delete(path: str) -> Callable[[Path], object]:
    return lambda folder: (folder / path).unlink()


def _write(path: str, data: bytes | str) -> Callable[[Path], object]:
    return lambda folder: (folder / path).write_bytes(data if isinstance(data, bytes) else data.encode())


def _cut(path: str) -> Callable[[Path], object]:
    """As a copy that a full disk ended: the header is sound."""
    return lambda folder: (folder / path).write_bytes((folder / path).read_bytes()[:-200])


def _resize(role: str, number: int, size: tuple[int, int]) -> Callable[[Path], object]:
    return lambda folder: _save_one(folder, role, number, _triple(number)[role].resize(size))


def _fill(number: int, level: int) -> Callable[[Path], object]:
    return lambda folder: _save_one(folder, "mask", number, Image.new("L", (SIDE, SIDE), level))


def _again(role: str, number: int) -> Callable[[Path], object]:
    """The picture as it should be."""
    return lambda folder: _save_one(folder, role, number)


def _instead(role: str, other: str, number: int) -> Callable[[Path], object]:
    """Another role's picture in the place of this one's."""
    return lambda folder: _save_one(folder, role, number, _triple(number)[other])


def _of_another(number: int) -> Callable[[Path], object]:
    """The source of another target."""
    return lambda folder: _save_one(folder, "source", number, _triple(number + 1001)["source"])


def _saved_turned(role: str, number: int) -> Callable[[Path], object]:
    return lambda folder: _triple(number)[role].save(folder / role / f"{_name(number)}.png", exif=_turned(6))


def _photograph(number: int) -> Callable[[Path], object]:
    return _instead("mask", "target", number)


def _levels(number: int, factor: float) -> Callable[[Path], object]:
    """A mask whose white is darker: of 1 / 255, labels 0 and 1."""
    mask = _triple(number)["mask"].point(lambda level: round(level * factor))
    return lambda folder: _save_one(folder, "mask", number, mask)


def _inverted(number: int) -> Callable[[Path], object]:
    return lambda folder: _save_one(folder, "mask", number, ImageOps.invert(_triple(number)["mask"]))


def _moved(number: int, by: tuple[int, int]) -> Callable[[Path], object]:
    return lambda folder: _save_one(folder, "mask", number, ImageChops.offset(_triple(number)["mask"], *by))


def _oblong(number: int, **of_target: Image.Exif) -> Callable[[Path], object]:
    """All three wider than high; options of the target's file."""

    def save(folder: Path) -> None:
        for role, picture in _triple(number).items():
            options = of_target if role == "target" else {}
            picture.resize((SIDE, SIDE - 12), Image.Resampling.NEAREST).save(
                folder / role / f"{_name(number)}.png", **options
            )

    return save


def _turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _leave(folder: Path) -> None:
    """What another cure mends too."""


FAULTS = [
    Fault(
        NAMES,
        "target/street-01.png",
        "no mask of the same name in {folder}/mask; the nearest is street_01.png",
        True,
        _rename("mask", "street-01.png", "street_01.png"),
        _rename("mask", "street_01.png", "street-01.png"),
    ),
    Fault(NAMES, "mask/street_01.png", "the nearest is street-01.png", True, _leave, _leave),
    Fault(NAMES, "target/park-02.png", "no source", True, _delete("source/park-02.png"), _again("source", 2)),
    Fault(
        NAMES,
        "target/street-03.png",
        "street-03.heic is there, which is not read",
        True,
        _rename("mask", "street-03.png", "street-03.heic"),
        _again("mask", 3),
    ),
    Fault(LEFT_OUT, "mask", "1 .heic not read: street-03.heic", False, _leave, _delete("mask/street-03.heic")),
    Fault(NAMES, "source/lamp.png", "no target", True, _write("source/lamp.png", b""), _delete("source/lamp.png")),
    Fault(
        CAPTIONS,
        "target/park-04.png.txt",
        "is not read as the caption of park-04",
        False,
        _rename("target", "park-04.txt", "park-04.png.txt"),
        _rename("target", "park-04.png.txt", "park-04.txt"),
    ),
    Fault(
        CAPTIONS,
        "target/STREET-05.txt",
        "is not read as the caption of street-05",
        False,
        _rename("target", "street-05.txt", "STREET-05.txt"),
        _rename("target", "STREET-05.txt", "street-05.txt"),
    ),
    Fault(
        CAPTIONS,
        "target/park-06.json",
        "is not read as a caption",
        False,
        _write("target/park-06.json", '{"prompt": "a bench"}'),
        _rename("target", "park-06.json", "park-06.txt"),
    ),
    Fault(
        CAPTIONS,
        "mask/street-09.txt",
        "is not read",
        False,
        _write("mask/street-09.txt", "a hole"),
        _delete("mask/street-09.txt"),
    ),
    Fault(
        CAPTIONS,
        "target/zebra.txt",
        "belongs to no picture",
        False,
        _write("target/zebra.txt", "a zebra"),
        _delete("target/zebra.txt"),
    ),
    Fault(
        CAPTIONS,
        "target/park-08.txt",
        "not UTF-8 text",
        True,
        _write("target/park-08.txt", "grün".encode("latin-1")),
        _write("target/park-08.txt", "grün"),
    ),
    Fault(
        UNREADABLE,
        "target/park-10.png",
        "",
        True,
        _write("target/park-10.png", "<!DOCTYPE html>"),
        _again("target", 10),
    ),
    Fault(UNREADABLE, "source/street-11.png", "", True, _write("source/street-11.png", b""), _again("source", 11)),
    Fault(TRUNCATED, "target/park-12.png", "", True, _cut("target/park-12.png"), _again("target", 12)),
    Fault(TRUNCATED, "source/street-13.png", "", True, _cut("source/street-13.png"), _again("source", 13)),
    Fault(SIZES, "mask/park-14.png", "the mask is 24x24", True, _resize("mask", 14, (24, 24)), _again("mask", 14)),
    Fault(
        SIZES,
        "source/street-15.png",
        "the source is 48x40",
        True,
        _resize("source", 15, (48, 40)),
        _again("source", 15),
    ),
    Fault(MASKS, "mask/park-16.png", "all black", True, _fill(16, 0), _again("mask", 16)),
    Fault(MASKS, "mask/street-17.png", "all white", True, _fill(17, 255), _again("mask", 17)),
    Fault(MASKS, "mask/park-18.png", "no mask", True, _photograph(18), _again("mask", 18)),
    Fault(MASKS, "mask/street-19.png", "labels", True, _levels(19, 1 / 255), _again("mask", 19)),
    Fault(POLARITY, "mask/park-20.png", "inverted", True, _inverted(20), _again("mask", 20)),
    Fault(MISPLACED, "mask/street-21.png", "elsewhere", True, _moved(21, (12, 14)), _again("mask", 21)),
    Fault(SOURCES, "source/park-22.png", "the same file", True, _instead("source", "target", 22), _again("source", 22)),
    Fault(SOURCES, "source/street-23.png", "another picture", True, _of_another(23), _again("source", 23)),
    Fault(ORIENTATION, "source/park-24.png", "EXIF", True, _saved_turned("target", 24), _again("target", 24)),
    Fault(ORIENTATION, "mask/park-24.png", "EXIF", True, _leave, _leave),
    Fault(ORIENTATION, "mask/street-25.png", "EXIF", True, _oblong(25, exif=_turned(6)), _oblong(25)),
    Fault(ORIENTATION, "source/street-25.png", "EXIF", True, _leave, _leave),
]


if __name__ == "__main__":
    write(Path(sys.argv[1]))
