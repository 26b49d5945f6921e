import unicodedata
from collections import Counter

from PIL import Image

from demo.old_folders import COUNT, make_old_folders


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_folders_hold_the_same_bytes_every_time_and_what_they_say(tmp_path):
    planted = make_old_folders(tmp_path / "a")
    make_old_folders(tmp_path / "b")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert len(planted.good) + len(planted.faults) == COUNT - 1  # one is without its target
    assert not planted.good & planted.faults.keys()
    assert planted.notes.keys() | planted.sources <= planted.good
    assert len(set(planted.faults.values())) >= 10 and max(Counter(planted.faults.values()).values()) <= 4
    names = [unicodedata.normalize("NFC", path.stem) for path in planted.target.rglob("*") if path.suffix != ".txt"]
    assert len(names) >= COUNT - 1


def test_the_masks_may_be_black_in_the_hole(tmp_path):
    white, black = (make_old_folders(tmp_path / name, white_is_hole=name == "white") for name in ("white", "black"))
    of_white, of_black = (Image.open(planted.mask / "astronaut_00.png") for planted in (white, black))
    assert of_white.histogram() == of_black.histogram()[::-1]
