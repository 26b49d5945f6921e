from dataclasses import replace

import pytest
from PIL import Image

from configs.data_schema import CaptionsConfig
from data.migrate.decide import decide
from data.migrate.find import OldTriple
from data.migrate.look import look_at
from data.sources.picture_file import PictureFile
from data.sources.problems import Problem
from tests.data.migrate.made_old_pairs import save_triples

LIMIT = 10.0


def decided(triples, given="auto", captions=None):
    return decide(triples, [look_at(triple, LIMIT) for triple in triples], given, captions or CaptionsConfig())


@pytest.mark.parametrize("colour", ["white", "black"])
def test_the_colour_of_the_hole_and_what_the_masked_pictures_are_is_seen_in_200_pairs(tmp_path, colour):
    """Every other masked picture is the target with a hole, the others have something else there."""
    triples = save_triples(
        tmp_path, 200, white_is_hole=colour == "white", cut=lambda number: number % 2 == 0 or number > 190
    )
    found = decided(triples)
    assert (found.hole.colour, found.hole.how) == (colour, "seen")
    assert getattr(found.hole, colour) == found.hole.white + found.hole.black == 200
    assert [triple.problems for triple in found.triples if triple.problems] == []
    assert [triple.keeps_source for triple in found.triples] == [n % 2 == 1 and n <= 190 for n in range(200)]
    assert {triple.hole_from for triple in found.triples} == {"mask" if colour == "white" else "inverted mask"}
    assert all(0.1 < triple.hole_share < 0.6 for triple in found.triples)


def test_a_mask_out_of_line_is_left_out_not_turned(tmp_path):
    triples = save_triples(tmp_path, 8)
    others = tmp_path / "others"
    others.mkdir()
    triples[3] = save_triples(others, 4, white_is_hole=False)[3]
    found = decided(triples)
    assert [triple.name for triple in found.triples if not triple.kept] == ["003"]
    (problem,) = found.triples[3].problems
    assert problem.kind == "inverted masks" and "the other way round than 7 of 8" in problem.what
    as_given = decided(triples, given="black")
    assert [triple.name for triple in as_given.triples if triple.kept] == ["003"]


def test_without_masked_pictures_white_is_assumed_and_said(tmp_path):
    triples = [replace(triple, masked=None) for triple in save_triples(tmp_path, 3)]
    found = decided(triples)
    assert found.hole.how == "assumed" and "nothing shows" in str(found.hole)
    assert all(triple.kept and not triple.keeps_source for triple in found.triples)


def test_exchanged_folders_of_a_set_with_holes_are_seen_in_every_pair(tmp_path):
    triples = [replace(triple, target=triple.masked, masked=triple.target) for triple in save_triples(tmp_path, 12)]
    found = decided(triples)
    said = [problem.what for triple in found.triples for problem in triple.problems]
    assert not any(triple.kept for triple in found.triples)
    assert sum("the hole is cut out of the target" in what for what in said) >= 8


@pytest.mark.parametrize("is_set_of_holes", [True, False])
def test_a_masked_picture_that_is_its_target_is_named_and_kept_out_where_it_would_be_the_source(
    tmp_path, is_set_of_holes
):
    triples = save_triples(tmp_path, 6, cut=lambda _: is_set_of_holes)
    triples[2] = replace(triples[2], masked=triples[2].target)
    third = decided(triples).triples[2]
    assert (third.kept, third.problems[0].kind) == (is_set_of_holes, "sources")


def test_a_target_that_has_the_hole_itself_is_left_out(tmp_path):
    triples = save_triples(tmp_path, 6)
    triples[2] = replace(triples[2], target=triples[2].masked)
    third = decided(triples).triples[2]
    assert not third.kept and "nothing is left of what was there" in third.problems[0].what


def test_of_the_same_picture_in_two_files_the_first_is_kept(tmp_path):
    triples = save_triples(tmp_path, 3)
    copy = tmp_path / "copy.jpg"
    copy.write_bytes((tmp_path / "000_target.jpg").read_bytes())
    again = replace(triples[0], name="copy", target=PictureFile(str(copy)))
    other_mask = replace(triples[0], name="other_mask")
    found = decided([*triples, again, other_mask])
    assert [triple.name for triple in found.triples if not triple.kept] == ["copy"]
    said = found.triples[3].problems[0].what
    assert said.endswith("000_target.jpg, with the same mask and masked picture")


def test_of_one_target_with_several_masks_every_triple_is_kept(tmp_path):
    """As object removal has them: an empty room photographed once, a copy of it beside each object that was there."""
    triples = save_triples(tmp_path, 4, cut=lambda _: False)
    room = Image.open(triples[0].target.place)
    for number in range(3):
        box = (10 + 60 * number, 40, 50 + 60 * number, 100)
        mask = Image.new("L", room.size)
        mask.paste(255, box)
        before = room.copy()
        before.paste(Image.effect_noise((40, 60), 120).convert("RGB"), box)
        places = [tmp_path / f"room{number}_{role}" for role in ("target.jpg", "mask.png", "masked.png")]
        places[0].write_bytes((tmp_path / "000_target.jpg").read_bytes())
        mask.save(places[1])
        before.save(places[2])
        triples.append(OldTriple(f"room{number}", *(PictureFile(str(place)) for place in places)))
    found = decided(triples)
    assert [(triple.name, triple.problems) for triple in found.triples if triple.problems] == []
    assert all(triple.kept and triple.keeps_source for triple in found.triples)
    no_masks = [replace(triple, mask=None, masked=None) for triple in triples]
    assert sum(triple.kept for triple in decided(no_masks).triples) == 4  # drawn masks tell no two copies apart


def test_captions_get_the_default_and_the_trigger_word(tmp_path):
    triples = save_triples(tmp_path, 3)
    triples[0] = replace(triples[0], caption="a sofa\nin a room", caption_from="target")
    triples[1] = replace(triples[1], caption=" ", caption_from="masked")
    captions = CaptionsConfig(default="a room", trigger="sks")
    assert [(triple.caption, triple.caption_from) for triple in decided(triples, captions=captions).triples] == [
        ("sks, a sofa in a room", "target"),
        ("sks, a room", "default"),
        ("sks, a room", "default"),
    ]
    assert [triple.caption for triple in decided(triples).triples] == ["a sofa in a room", None, None]


def test_without_mask_and_masked_picture_there_is_no_hole_where_others_have_one(tmp_path):
    triples = [replace(triple, mask=None) for triple in save_triples(tmp_path, 3)]
    missing = Problem("names", triples[2].target.place, "no masked picture of the same name", "Add it.")
    triples[2] = replace(triples[2], masked=None, no_masked=missing)
    found = decided(triples)
    assert [(triple.kept, triple.hole_from) for triple in found.triples] == [
        (True, "difference"),
        (True, "difference"),
        (False, "none"),
    ]
    assert found.hole.how == "no masks"
