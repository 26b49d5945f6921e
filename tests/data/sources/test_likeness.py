import numpy as np
import pytest
from PIL import Image, ImageChops, ImageFilter, ImageOps
from skimage import data

from data.sources.likeness import find_other_scene
from data.sources.mask_checks import find_fault_of_pair
from data.sources.pictures import load_preview
from tests.data.sources.made_pairs import Pairs, moved, saved

SQUARE, WIDE = (256, 256), (192, 144)
COUNT = 40
# pictures that still show the same, as sources do that were lit, graded or saved otherwise
KEPT = {
    "as it was": lambda picture: picture,
    "darker": lambda picture: picture.point(lambda level: level * 0.3),
    "of another contrast": lambda picture: picture.point(lambda level: 255 * (level / 255) ** 2.2),
    "lit from the right": lambda picture: Image.composite(
        picture, Image.new("RGB", picture.size), Image.linear_gradient("L").rotate(90).resize(picture.size)
    ),
    "of other colours": lambda picture: Image.merge("RGB", picture.split()[::-1]),
    "grey": lambda picture: ImageOps.grayscale(picture).convert("RGB"),
    "blurred": lambda picture: picture.filter(ImageFilter.GaussianBlur(picture.width / 64)),
    "negative": ImageOps.invert,
    "solarised": lambda picture: ImageOps.solarize(picture, 100),
    "moved": lambda picture: ImageChops.offset(picture, round(picture.width * 0.02)),
    "enlarged": lambda picture: ImageOps.crop(picture, round(picture.width * 0.02)).resize(picture.size),
}


def preview(picture, quality=60):
    return load_preview(saved(picture, quality=quality), 2, max_megapixels=1)


def kind_of(target, source, mask):
    found = find_other_scene(preview(target), preview(source), np.asarray(mask.reduce(2)))
    return found and found.kind


@pytest.mark.parametrize("change", KEPT.values(), ids=KEPT)
def test_a_source_of_the_same_scene_is_one_whatever_its_light_and_wherever_the_mask_lies(change):
    pairs = Pairs()
    for number in range(COUNT):
        target, source, mask = pairs.make(number, WIDE)
        for placed in (mask, ImageOps.invert(mask), moved(mask, 24, -10)):
            assert kind_of(target, change(source), placed) is None


def test_things_on_white_are_not_taken_for_other_pictures():
    pairs, white = Pairs(), Image.new("RGB", SQUARE, "white")
    for number in range(COUNT):
        target, source, mask = pairs.make(number, SQUARE)
        target, source = (Image.composite(picture, white, mask) for picture in (target, source))
        assert kind_of(target, source, mask) is None
        assert kind_of(target, white, mask) is None
        assert kind_of(target, source, ImageOps.invert(mask)) is None


@pytest.mark.parametrize("size", [SQUARE, WIDE])
def test_another_picture_as_source_is_found(size):
    pairs = Pairs()
    kinds = [kind_of(pairs.make(n, size)[0], *pairs.make(n + 1000, size)[1:]) for n in range(COUNT)]
    assert set(kinds) <= {"another picture", None}
    assert kinds.count("another picture") >= 0.9 * COUNT


@pytest.mark.parametrize("turn", Image.Transpose)
def test_a_source_that_exif_could_have_turned_is_found_and_said_with_the_word(turn):
    pairs, found = Pairs(), []
    for number in range(COUNT):
        target, source, mask = pairs.make(number, SQUARE)
        if fault := find_fault_of_pair(saved(target), saved(source.transpose(turn)), mask, max_megapixels=1):
            found.append(fault)
    named = [fault for fault in found if fault.kind == "turned source"]
    assert len(named) >= 0.9 * COUNT
    assert all("EXIF" in fault.what and fault.is_of_source for fault in named)


def test_pictures_too_small_or_too_smooth_to_tell_are_passed_over():
    generator = np.random.default_rng(0)
    first, second = generator.integers(0, 256, (2, 20, 20), np.uint8)
    assert find_other_scene(first, second, np.zeros_like(first)) is None
    assert kind_of(Image.new("RGB", SQUARE, "navy"), Image.new("RGB", SQUARE, "orange"), Image.new("L", SQUARE)) is None


@pytest.mark.parametrize("change", ["moved", "enlarged", "negative"])
@pytest.mark.parametrize("name", ["grass", "gravel", "brick", "page"])
def test_textures_that_are_a_little_elsewhere_are_still_the_same(name, change):
    target = Image.fromarray(getattr(data, name)()).convert("RGB").resize(SQUARE)
    assert kind_of(target, KEPT[change](target), Image.new("L", SQUARE)) is None
