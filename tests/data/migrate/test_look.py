import numpy as np
import pytest
from PIL import Image, ImageOps

from data.migrate.find import OldTriple
from data.migrate.look import look_at
from data.sources.picture_file import PictureFile
from tests.data.migrate.made_old_pairs import save_triples
from tests.data.sources.made_pairs import Pairs

LIMIT = 10.0


def saved(folder, **pictures):
    """A triple without those that are not given."""
    files = {}
    for role, picture in pictures.items():
        picture.save(folder / f"{role}.png")
        files[role] = PictureFile(str(folder / f"{role}.png"))
    return OldTriple("a", files["target"], files.get("mask"), files.get("masked"))


def with_alpha(picture, hole):
    picture = picture.convert("RGBA")
    picture.putalpha(ImageOps.invert(hole))
    return picture


def test_a_pair_speaks_for_one_colour_and_against_the_other(tmp_path):
    (triple,) = save_triples(tmp_path, 1)
    look = look_at(triple, LIMIT)
    assert look.faults["white"] is None and look.faults["black"].kind == "inverted"
    assert look.shown["white"].masked == "cut out"
    assert look.hole_from == "mask" and look.problems == () and (look.width, look.height) == (192, 144)


@pytest.mark.parametrize("role", ["target", "mask", "masked"])
@pytest.mark.parametrize("spoil", [lambda data: b"<html>", lambda data: data[: len(data) // 2]])
def test_a_damaged_picture_is_named(tmp_path, role, spoil):
    (triple,) = save_triples(tmp_path, 1)
    file = tmp_path / getattr(triple, role).place
    file.write_bytes(spoil(file.read_bytes()))
    (problem,) = look_at(triple, LIMIT).problems
    assert problem.kind in ("unreadable", "truncated") and problem.where == str(file)


def test_pictures_of_other_sizes_are_named(tmp_path):
    target, masked, mask = Pairs().make(0)
    look = look_at(saved(tmp_path, target=target, mask=mask.reduce(2), masked=masked.reduce(3)), LIMIT)
    assert [problem.kind for problem in look.problems] == ["sizes", "sizes"]


def test_transparency_is_the_hole_where_there_is_no_mask(tmp_path):
    target, _, mask = Pairs().make(0)
    of_masked = look_at(saved(tmp_path, target=target, masked=with_alpha(target, mask)), LIMIT)
    of_target = look_at(saved(tmp_path, target=with_alpha(target, mask)), LIMIT)
    for look in (of_masked, of_target):
        assert look.hole_from == "alpha"
        assert look.white_share == pytest.approx(float((np.asarray(mask) > 0).mean()))
    assert of_target.opaque_target and not of_masked.opaque_target


def test_a_target_with_nothing_below_its_transparency_has_no_hole(tmp_path):
    target, _, mask = Pairs().make(0)
    bare = with_alpha(Image.composite(Image.new("RGB", target.size), target, mask), mask)
    look = look_at(saved(tmp_path, target=bare), LIMIT)
    assert look.is_bare and look.hole_from == "none"


def test_without_mask_and_transparency_the_hole_is_where_the_two_differ(tmp_path):
    target, other, _ = Pairs().make(0)
    look = look_at(saved(tmp_path, target=target, masked=other), LIMIT)
    assert look.hole_from == "difference" and look.shown["white"].masked == "a picture"
    (problem,) = look_at(saved(tmp_path, target=target, masked=target), LIMIT).problems
    assert "there is no hole to be seen" in problem.what
    assert look_at(saved(tmp_path, target=target), LIMIT).hole_from == "none"
