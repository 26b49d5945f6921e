import base64
import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageChops

from data.migrate.report import MigratedTriple
from data.migrate.thumbnails import Thumbnail, draw_triple
from data.sources.problems import MASKS, Problem
from tests.data.migrate.made_reports import HOLE, SIDE, make_triple

NEAR_EDGE = 4  # px, in which a picture that was compressed is blurred


def draw(triple: MigratedTriple) -> dict[str, Thumbnail]:
    return {thumbnail.title: thumbnail for thumbnail in draw_triple(triple, max_megapixels=1)}


def pixels(thumbnail: Thumbnail) -> np.ndarray:
    """int [SIDE, SIDE, 3]."""
    data = base64.b64decode(thumbnail.uri.removeprefix("data:image/webp;base64,"))
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def inside(picture: np.ndarray) -> np.ndarray:
    left, top, right, bottom = HOLE
    return picture[top + NEAR_EDGE : bottom - NEAR_EDGE, left + NEAR_EDGE : right - NEAR_EDGE]


def outside(picture: np.ndarray) -> np.ndarray:
    return picture[: HOLE[1] - NEAR_EDGE]


@pytest.mark.parametrize("inverted", [False, True])
def test_the_hole_is_grey_where_fill_looks_and_tinted_on_the_target(tmp_path, inverted):
    triple = make_triple(tmp_path, "a")
    if inverted:
        ImageChops.invert(Image.open(triple.mask)).save(triple.mask)
        triple = replace(triple, hole_from="inverted mask")
    drawn = draw(triple)
    assert list(drawn) == ["target", "mask", "as Fill sees it", "hole on target"]
    target, mask, seen, marked = map(pixels, drawn.values())
    assert (inside(mask) == (0 if inverted else 255)).all() and (outside(mask) == (255 if inverted else 0)).all()
    assert abs(inside(seen) - 128).max() <= 8
    assert abs(outside(seen) - outside(target)).max() <= 24
    assert abs(outside(marked) - outside(target)).max() <= 24
    assert abs(inside(marked) - inside(target)).mean(axis=(0, 1)).min() > 20


def test_a_source_that_is_kept_is_shown_and_is_what_fill_sees(tmp_path):
    triple = make_triple(tmp_path, "a", keeps_source=True)
    Image.new("RGB", (SIDE, SIDE), (10, 200, 10)).save(triple.masked or "")
    drawn = draw(triple)
    assert list(drawn) == ["target", "source, kept", "mask", "as Fill sees it", "hole on target"]
    assert abs(outside(pixels(drawn["as Fill sees it"])) - (10, 200, 10)).max() <= 8
    assert abs(inside(pixels(drawn["as Fill sees it"])) - 128).max() <= 8


def test_a_triple_with_a_problem_shows_its_masked_picture_too(tmp_path):
    drawn = draw(make_triple(tmp_path, "a", problems=(Problem(MASKS, "", "is odd", ""),)))
    assert "masked picture" in drawn


def test_what_cannot_be_drawn_says_why(tmp_path):
    triple = make_triple(tmp_path, "a")
    Image.new("L", (40, 40), 255).save(triple.mask or "")
    assert draw(triple)["as Fill sees it"] == ("as Fill sees it", "", "the mask is 40x40, the picture 160x160", False)
    (tmp_path / "mask" / "a.png").write_bytes(b"no picture")
    drawn = draw(replace(triple, kept=False))
    assert (drawn["mask"].uri, drawn["mask"].note) == ("", "cannot be read")
    assert drawn["hole"].note == "not known" and drawn["target"].uri
    assert draw(replace(triple, mask=None, hole_from="none"))["hole"].note == "drawn at random while training"


def test_large_pictures_become_small_ones(tmp_path):
    triple = make_triple(tmp_path, "a")
    Image.effect_noise((1200, 800), 60).convert("RGB").save(triple.target)
    target = draw(triple)["target"]
    assert pixels(target).shape == (171, 256, 3) and len(target.uri) < 40_000 and not target.enlarged
