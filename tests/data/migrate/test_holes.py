import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from data.migrate.holes import alpha_hole, difference_hole, is_kept_below, load_opaque, what_is_shown
from data.sources.picture_file import PictureBytes
from tests.data.sources.made_pairs import Pairs

LIMIT = 10.0


def as_jpeg(picture, quality):
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def as_png(picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    return PictureBytes(file.getvalue(), "a.png")


@pytest.mark.parametrize("quality", [60, 75, 95])
@pytest.mark.parametrize("size", [(192, 144), (512, 384)])
def test_a_hole_found_in_the_difference_covers_the_old_mask_and_little_else(size, quality):
    pairs = Pairs()
    for number in range(8):
        target, source, mask = pairs.make(number, size)
        hole = np.asarray(difference_hole(as_jpeg(target, quality), as_jpeg(source, quality))) > 0
        wanted = np.asarray(mask) > 0
        assert (hole & wanted).sum() > 0.995 * wanted.sum()
        margin = 2 * max(2, max(size) // 256) + 8  # its own, and a block of JPEG
        edge = np.asarray(mask.resize((size[0] // 4, size[1] // 4))) > 0
        assert (hole & ~wanted).sum() < margin * 4 * np.abs(np.diff(edge.astype(int), axis=0)).sum() + 16 * margin
        assert hole.mean() < 0.9


def test_compression_alone_makes_no_hole():
    for number in range(8):
        target, _, _ = Pairs().make(number, (512, 384))
        assert not np.asarray(difference_hole(target, as_jpeg(target, 60))).any()


@pytest.mark.parametrize("level", [0, 127, 255])
def test_a_hole_of_one_colour_is_told_from_a_picture_and_from_a_wall(level):
    target, source, mask = (np.asarray(picture.convert("L")) for picture in Pairs().make(4, (512, 384)))
    cut = np.where(mask > 0, level, target).astype(np.uint8)
    assert what_is_shown(cut, mask, 1) == "cut out"
    assert what_is_shown(source, mask, 1) == "a picture"
    assert what_is_shown(np.full_like(target, level), mask, 1) == "unsure"
    assert what_is_shown(cut, np.zeros_like(mask), 1) == "unsure"


def test_the_picture_below_a_transparent_hole_comes_back():
    target, _, mask = Pairs().make(1)
    clear = target.convert("RGBA")
    clear.putalpha(ImageOps.invert(mask))
    png = as_png(clear)
    hole = alpha_hole(png, max_megapixels=LIMIT)
    assert hole.tobytes() == mask.tobytes()
    assert load_opaque(png, max_megapixels=LIMIT).tobytes() == target.tobytes()
    assert is_kept_below(png, hole, max_megapixels=LIMIT)
    clear.putalpha(255)
    assert alpha_hole(as_png(clear), max_megapixels=LIMIT) is None
    assert alpha_hole(as_png(target), max_megapixels=LIMIT) is None
