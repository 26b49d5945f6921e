from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.errors import InputError
from demo.photographs import PHOTOGRAPHS, load_canvases, load_photographs, make_triples, plan_crops, write_triples


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_photographs_are_in_colour() -> None:
    photographs = load_photographs()
    assert len(photographs) == 7
    for picture in photographs.values():
        pixels = np.asarray(picture).astype(int)
        assert picture.mode == "RGB"
        assert min(picture.size) >= 300
        assert np.abs(pixels[..., 0] - pixels[..., 2]).mean() > 5


def test_a_crop_shares_no_pixel_with_another() -> None:
    for name, canvas in load_canvases().items():
        covered = np.zeros(canvas.shape[:2], dtype=int)
        for top, left, height, width in plan_crops(name, canvas.shape[0]):
            assert top + height <= canvas.shape[0]
            assert left + width <= canvas.shape[1]
            covered[top : top + height, left : left + width] += 1
        assert covered.max() == 1, name


def test_96_different_crops_in_three_shapes(triples: Path) -> None:
    pictures = [read(path) for path in sorted((triples / "target").glob("*.png"))]
    assert len({picture.tobytes() for picture in pictures}) == len(pictures) == 96
    shapes = Counter(picture.shape for picture in pictures)
    assert shapes == {(64, 64, 3): 53, (48, 80, 3): 22, (80, 48, 3): 21}


def test_the_three_folders_hold_the_same_names_and_sizes(triples: Path) -> None:
    names = sorted(path.name for path in (triples / "target").glob("*.png"))
    for part in ("source", "mask"):
        assert sorted(path.name for path in (triples / part).iterdir()) == names
        for name in names:
            assert read(triples / part / name).shape[:2] == read(triples / "target" / name).shape[:2]


def test_holes_are_white_and_cover_15_to_50_percent(triples: Path) -> None:
    fractions = []
    for path in (triples / "mask").iterdir():
        assert Image.open(path).mode == "L"
        mask = read(path)
        assert set(np.unique(mask)) == {0, 255}
        fractions.append((mask == 255).mean())
    assert min(fractions) >= 0.15
    assert max(fractions) <= 0.50
    assert 0.29 <= np.mean(fractions) <= 0.33


def test_source_differs_from_target_inside_the_hole_and_nowhere_else(triples: Path) -> None:
    for path in (triples / "target").glob("*.png"):
        differs = (read(path) != read(triples / "source" / path.name)).any(axis=-1)
        hole = read(triples / "mask" / path.name) == 255
        assert not (differs & ~hole).any(), path.name
        assert differs.sum() >= 20, path.name


def test_every_target_has_a_caption_and_a_photograph_has_several(triples: Path) -> None:
    captions: dict[str, set[str]] = {name: set() for name in PHOTOGRAPHS}
    for path in (triples / "target").glob("*.png"):
        captions[path.stem.split("-")[0]].add(path.with_suffix(".txt").read_text(encoding="utf-8"))
    for name, texts in captions.items():
        assert len(texts) == 4, name
        assert all(PHOTOGRAPHS[name].caption in text for text in texts)


def test_the_same_bytes_every_time(triples: Path, tmp_path: Path) -> None:
    write_triples(tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(triples)
    assert [path.name for path in tmp_path.iterdir()] == ["again"], "nothing is left beside the folder"


def test_a_complete_folder_is_left_as_it_is(triples: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in triples.rglob("*")}
    write_triples(triples)
    assert {path: path.stat().st_mtime_ns for path in triples.rglob("*")} == before


def test_a_folder_with_other_things_is_refused_and_not_touched(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "mine.png").write_bytes(b"mine")
    with pytest.raises(InputError, match="does not hold the demo's triples"):
        write_triples(tmp_path)
    assert files_of(tmp_path) == {"target/mine.png": b"mine"}


def test_triples_in_memory_are_those_on_disk(triples: Path) -> None:
    triple = next(make_triples())
    np.testing.assert_array_equal(triple.target, read(triples / "target" / f"{triple.name}.png"))
    np.testing.assert_array_equal(triple.source, read(triples / "source" / f"{triple.name}.png"))
    np.testing.assert_array_equal(triple.mask, read(triples / "mask" / f"{triple.name}.png") == 255)
