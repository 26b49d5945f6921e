import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.sources.triples import Triple, held_out
from tests.data.sources.made_triples import make_files, triples_of


def test_files_of_one_name_make_a_triple(tmp_path):
    make_files(tmp_path / "target", "b.JPG", "a.png", "deep/er/a.webp", "two.dots.png")
    make_files(tmp_path / "mask", "a.png", "b.png", "deep/er/a.png", "two.dots.png")
    make_files(tmp_path / "source", "a.jpeg", "b.tif", "deep/er/a.bmp", "two.dots.tiff")
    triples = triples_of(tmp_path, source=True)
    assert [triple.name for triple in triples] == ["a", "b", "deep/er/a", "two.dots"]
    for triple in triples:
        parts = [Path(file.place) for file in (triple.target, triple.mask, triple.source)]
        assert [path.parent.relative_to(tmp_path).parts[0] for path in parts] == ["target", "mask", "source"]
        assert {path.stem for path in parts} == {Path(triple.name).name}
        assert triple.dataset == "cats"


def test_a_dataset_without_sources_has_none(tmp_path):
    make_files(tmp_path / "target", "a.png")
    make_files(tmp_path / "mask", "a.png")
    assert triples_of(tmp_path)[0].source is None


def test_keys_fit_a_tar_and_never_meet(tmp_path):
    names = [
        "cat",
        "a/cat",
        "b/cat",
        "a_cat",
        "a-cat",
        "a cat",
        "a.cat",
        "кот",
        "猫",
        "犬",
        "c" * 200,
        "c" * 199 + "d",
        "text",
        "text-0123456789abcdef",
        "-",
    ]
    path = tmp_path / "any"
    keys = [Triple(dataset, name, path, path, None, "", "", "").key for dataset in ("cats", "cats-2") for name in names]
    assert len(set(keys)) == 2 * len(names)
    for key in keys:
        assert re.fullmatch(r"[A-Za-z0-9_-]{1,70}", key)


def test_content_shows_every_change_and_target_content_those_of_the_target(tmp_path):
    for role in ("target", "mask", "source"):
        make_files(tmp_path / role, "a.png")
    (before,) = triples_of(tmp_path, source=True)
    assert before.target_content == before.target.read(1 << 20).content
    for role in ("mask", "source", "target"):
        with (tmp_path / role / "a.png").open("ab") as file:
            file.write(b"\0")
        (after,) = triples_of(tmp_path, source=True)
        assert after.content != before.content
        assert (after.target_content == before.target_content) == (role != "target")
        before = after


def test_copies_of_a_picture_are_held_out_together(tmp_path):
    for number in range(20):
        for name in (f"{number}.png", f"copies/again-{number}.png", f"copies/{number}-flip.jpg"):
            make_files(tmp_path / "mask", Path(name).with_suffix(".png").as_posix())
            (tmp_path / "target" / name).parent.mkdir(parents=True, exist_ok=True)
            pixels = np.full((16, 16, 3), 10 * number, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "target" / name, format="PNG")
    triples = triples_of(tmp_path)
    kept = held_out((triple.target_content for triple in triples), 7)
    sides = {}
    for triple in triples:
        number = re.search(r"\d+", Path(triple.name).name)[0]
        sides.setdefault(number, set()).add(triple.target_content in kept)
    assert all(len(side) == 1 for side in sides.values())
    assert sum(side == {True} for side in sides.values()) == 7


@pytest.mark.parametrize("num_new", [1, 10, 200])
def test_new_pictures_move_few_old_ones_across(num_new):
    old = [f"{number * 2654435761 % 2**32:032x}" for number in range(500)]
    new = [f"{number * 2246822519 % 2**32:032x}" for number in range(1, num_new + 1)]
    before, after = held_out(old, 64), held_out([*old, *new], 64)
    assert len(before) == len(after) == 64
    moved = before - after
    assert len(moved) == len(after & set(new)) <= num_new
    assert after - set(new) <= before, "an old picture came out of training"


def test_nothing_and_more_than_everything_can_be_held_out():
    assert held_out(["a", "b"], 0) == frozenset()
    assert held_out(["a", "b", "b"], 5) == {"a", "b"}
