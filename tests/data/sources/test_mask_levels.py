import io

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter
from skimage import data

from configs.errors import InputError
from data.sources.mask_levels import find_no_mask, select_label
from data.sources.pictures import load_mask, load_stored

SIZE = (160, 120)


def ellipse(mode="L", hole=255, ground=0):
    mask = Image.new(mode, SIZE, ground)
    ImageDraw.Draw(mask).ellipse((30, 20, 100, 90), fill=hole)
    return mask


def problem_of(picture, kind="PNG", **options):
    """What is said of a picture that is saved and given as a mask."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    stored = Image.open(file)
    return find_no_mask(stored.convert("L"), lambda: stored)


SOFT = ellipse().filter(ImageFilter.GaussianBlur(8))
SMOOTHED = ellipse().resize((53, 40), Image.Resampling.LANCZOS)


@pytest.mark.parametrize(
    "mask", [ellipse(), ellipse(hole=250, ground=5), ellipse(hole=180, ground=60), ellipse("1", 1), SOFT, SMOOTHED]
)
def test_masks_may_have_soft_edges_and_compression(mask):
    assert problem_of(mask) is None
    assert problem_of(mask.convert("L"), "JPEG", quality=40) is None


PHOTOGRAPHS = ["astronaut", "cat", "coffee", "rocket", "camera", "moon", "retina", "grass", "brick", "coins"]


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs_are_no_masks(name):
    photograph = Image.fromarray(getattr(data, name)())
    found = problem_of(photograph, "JPEG")
    assert not found.labels
    assert "as in a photograph or a gradient" in found.what


def test_a_gradient_is_no_mask():
    gradient = Image.fromarray(np.tile(np.linspace(0, 255, 160).astype(np.uint8), (120, 1)))
    found = problem_of(gradient)
    assert not found.labels
    assert "of its pixels are grey" in found.what


def with_second(mask, value):
    ImageDraw.Draw(mask).rectangle((110, 90, 150, 115), fill=value)
    return mask


def palette_of_three():
    picture = with_second(ellipse("P", 1), 2)
    picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    return picture


@pytest.mark.parametrize(
    "labels, said",
    [
        (ellipse(hole=1), "0 (79%), 1 (21%)"),
        (ellipse(hole=255, ground=254), "254 (79%), 255 (21%)"),
        (ellipse("RGB", (255, 0, 0)), "#000000 (79%), #ff0000 (21%)"),
        (with_second(ellipse(hole=128), 255), "0 (74%), 128 (21%), 255 (6%)"),
        (with_second(ellipse(hole=1), 2), "0 (74%), 1 (21%), 2 (6%)"),
        (palette_of_three(), "0 (74%), 1 (21%), 2 (6%)"),
    ],
)
def test_labels_are_told_from_brightness_with_their_values(labels, said):
    found = problem_of(labels)
    assert found.labels
    assert found.what == f"its pixels are labels, not brightness: {said}"


@pytest.mark.parametrize(
    "picture, label",
    [
        (ellipse(hole=1), 1),
        (ellipse("1", 1), 1),
        (palette_of_three(), 1),
        (ellipse("RGB", (1, 1, 1)), 1),
        (ellipse("RGB", (255, 0, 0)), "#ff0000"),
        (Image.fromarray(np.asarray(ellipse(hole=7)).astype(np.uint16) * 100), 700),
    ],
)
def test_a_label_is_the_hole_and_all_else_is_kept(tmp_path, picture, label):
    picture.save(tmp_path / "mask.png")
    mask = load_mask(tmp_path / "mask.png", max_megapixels=1, label=label)
    assert np.array_equal(np.asarray(mask), np.asarray(ellipse()))
    assert select_label(load_stored(tmp_path / "mask.png", max_megapixels=1), label).mode == "L"


def test_a_colour_is_found_in_a_jpeg(tmp_path):
    ellipse("RGB", (255, 0, 0)).save(tmp_path / "mask.jpg", quality=95, subsampling=0)
    mask = load_mask(tmp_path / "mask.jpg", max_megapixels=1, label="#ff0000")
    assert np.mean(np.asarray(mask) == np.asarray(ellipse())) > 0.98


def test_a_label_passes_over_transparency(tmp_path):
    picture = ellipse("RGBA", (255, 0, 0, 0), (0, 0, 0, 255))
    picture.save(tmp_path / "mask.png")
    with pytest.raises(InputError, match="partly transparent"):
        load_mask(tmp_path / "mask.png", max_megapixels=1)
    assert np.asarray(load_mask(tmp_path / "mask.png", max_megapixels=1, label="#ff0000")).any()


CLASSES = Image.fromarray(np.array([0, 1, 2, 255], np.uint8).repeat(30)[:, None].repeat(SIZE[0], 1))


@pytest.mark.parametrize(
    "labels, said",
    [
        (CLASSES, "0 (25%), 1 (25%), 2 (25%), 255 (25%)"),  # 255: of no class
        (ellipse("RGB", "red", "white"), "#ffffff (79%), #ff0000 (21%)"),
        (ellipse("RGB", "blue", "white"), "#ffffff (79%), #0000ff (21%)"),
        (ellipse("RGB", "white", "red"), "#ff0000 (79%), #ffffff (21%)"),
        (ellipse("I;16", 1), "0 (79%), 1 (21%)"),
        (ellipse("I;16", 255), "0 (79%), 255 (21%)"),
        (ellipse("I;16", 300, 2), "2 (79%), 300 (21%)"),
    ],
)
def test_labels_of_which_none_is_grey_are_told_too(labels, said):
    found = find_no_mask(load_mask_as_it_was(labels), lambda: labels)
    assert found.labels and said in found.what


def load_mask_as_it_was(picture):
    """As `load_mask` gives it: of 16 bits, the upper 8."""
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    return picture.convert("L")


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_levels_of_video_are_no_labels(mode):
    box = Image.new(mode, (512, 512), "#101010")
    ImageDraw.Draw(box).rectangle((119, 157, 358, 410), fill="#ebebeb")
    for quality in (20, 60, 85):
        assert problem_of(box, "WEBP", quality=quality) is None
