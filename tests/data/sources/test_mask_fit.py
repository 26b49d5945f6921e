import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from data.sources.mask_checks import find_fault_of_pair
from data.sources.mask_fit import compare, fine_cell, looks_right, preview_cell
from demo.photographs import make_triples
from tests.data.sources.made_pairs import Pairs, moved, saved

LIMIT = 10.0


def fault_of(target, source, mask):
    return find_fault_of_pair(target, source, mask, max_megapixels=LIMIT)


def test_inverted_and_moved_masks_are_found_in_pairs_of_photographs_and_right_ones_are_not():
    """200 pairs, each as JPEGs of two qualities; shifts of 8 to 24 px, of which at least 8 are within the picture."""
    pairs, wrong = Pairs(), []
    for number in range(200):
        generator = np.random.default_rng([1, number])
        target, source, mask = pairs.make(number)
        target, source = (saved(picture, quality=int(generator.integers(60, 96))) for picture in (target, source))
        angle, far = generator.uniform(0, 2 * np.pi), generator.uniform(8.5, 24)
        shift = round(far * np.cos(angle)), round(far * np.sin(angle))
        if fault := fault_of(target, source, mask):
            wrong.append((number, "right", fault))
        inverted = fault_of(target, source, ImageOps.invert(mask))
        if inverted is None or inverted.kind != "inverted":
            wrong.append((number, "inverted", inverted))
        elsewhere = fault_of(target, source, moved(mask, *shift))
        if elsewhere is None or elsewhere.kind != "elsewhere":
            wrong.append((number, shift, elsewhere))
    assert not wrong


def test_the_shift_that_would_fit_is_told():
    target, source, mask = Pairs().make(3, (512, 384))
    fault = fault_of(saved(target), saved(source), moved(mask, -40, 24))
    assert "moved by about 40 px to the right and 24 px up it would fit" in fault.what


@pytest.mark.parametrize("quality", [50, 75, 95])
def test_a_source_that_is_the_target_is_found_whatever_its_compression(quality):
    for number in range(10):
        target, _, mask = Pairs().make(number)
        assert fault_of(saved(target, "PNG"), saved(target, quality=quality), mask).kind == "same"
        assert fault_of(saved(target, "PNG"), saved(target, "PNG"), mask).kind == "same"


def test_a_change_as_small_as_a_scratch_or_of_colour_alone_is_one():
    target, _, mask = Pairs().make(0)
    scratched = target.copy()
    left, top, right, bottom = mask.getbbox()
    middle = ((left + right) // 2, (top + bottom) // 2)
    mask = Image.new("L", target.size)
    ImageDraw.Draw(mask).rectangle((middle[0] - 20, middle[1] - 20, middle[0] + 20, middle[1] + 20), fill=255)
    ImageDraw.Draw(scratched).line((middle[0] - 15, middle[1] - 15, middle[0] + 15, middle[1] + 15), (255, 0, 0), 2)
    assert fault_of(saved(target, "PNG"), saved(scratched, "PNG"), mask) is None
    grey = ImageOps.grayscale(target).convert("RGB")
    colourless = Image.composite(grey, target, mask)
    assert fault_of(saved(target, "PNG"), saved(colourless, "PNG"), mask) is None


def with_object(picture, mask, *, shadow=0.0):
    """A picture with a striped thing in the midst of the hole, and its shadow to the right below."""
    left, top, right, bottom = mask.getbbox()
    box = (left + 25, top + 25, right - 25, bottom - 25)
    thing, shade = Image.new("L", picture.size), Image.new("L", picture.size)
    ImageDraw.Draw(thing).ellipse(box, fill=255)
    ImageDraw.Draw(shade).ellipse([side + 20 for side in box], fill=round(255 * shadow))
    shaded = Image.composite(Image.new("RGB", picture.size), picture, shade.filter(ImageFilter.GaussianBlur(3)))
    stripes = Image.fromarray(np.where(np.indices(picture.size[::-1])[1] // 6 % 2, 250, 170).astype(np.uint8))
    return Image.composite(ImageOps.colorize(stripes, "black", "orange"), shaded, thing)


def box_mask(size):
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rectangle((40, 30, 140, 110), fill=255)
    return mask


def test_a_shadow_outside_the_mask_is_none_of_its_faults():
    pairs = Pairs()
    for number in range(20):
        target, _, _ = pairs.make(number)
        mask = box_mask(target.size)
        assert fault_of(saved(target), saved(with_object(target, mask, shadow=0.3)), mask) is None


def test_sources_in_the_place_of_targets_are_found_in_many_pairs_of_a_set():
    """The demo's: targets are photographs, sources have a thing in the hole."""
    right, swapped = [], []
    for triple in make_triples():
        target, source = (saved(Image.fromarray(pixels), "PNG") for pixels in (triple.target, triple.source))
        mask = Image.fromarray(triple.mask.astype(np.uint8) * 255)
        right.append(fault_of(target, source, mask))
        swapped.append(fault_of(source, target, mask))
    assert {fault.kind for fault in swapped if fault} == {"swapped"}
    assert sum(fault is not None for fault in swapped) > 30
    assert sum(fault is not None for fault in right) <= 1  # by accident


@pytest.mark.parametrize("fill", ["grey", "blurred"])
def test_a_source_that_is_painted_over_in_the_hole_is_right(fill):
    pairs = Pairs()
    for number in range(20):
        target, _, mask = pairs.make(number)
        painted = Image.new("RGB", target.size, "grey")
        if fill == "blurred":
            painted = target.filter(ImageFilter.GaussianBlur(10))
        assert fault_of(saved(target), saved(Image.composite(painted, target, mask)), mask) is None


@pytest.mark.parametrize("size", [(16, 16), (64, 48), (192, 144), (1024, 1024), (4000, 3000), (32, 1000)])
def test_cells_are_few_and_their_pictures_of_one_size(size):
    for cell in (preview_cell(*size), fine_cell(*size)):
        assert cell & (cell - 1) == 0
        assert max(size) / cell <= 512
    cell = fine_cell(*size)
    generator = np.random.default_rng(0)
    height, width = (-(-side // cell) for side in reversed(size))
    target = generator.integers(0, 255, (height, width, 3), np.uint8)
    source, mask = 255 - target, np.zeros((height, width), np.uint8)
    mask[: height // 2] = 255
    compare(target, source, mask, cell)
    looks_right(target[..., 0], source[..., 0], mask)
