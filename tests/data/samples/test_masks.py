import numpy as np
import pytest
import xxhash
from PIL import Image

from configs.dataset_schema import RandomMasks
from configs.mask_recipe import MaskRecipe
from data.samples.masks import KINDS, contact_sheet, dilate_masks, draw_mask, draw_masks, drawers_of, mask_generator

SIZES = [(64, 64), (48, 96), (96, 48), (256, 256)]


def content(number):
    return xxhash.xxh3_128_hexdigest(f"picture {number}".encode())


def masks_of(kind, height, width, count=100):
    return [draw_mask(kind, height, width, mask_generator(content(number), 0)) for number in range(count)]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "full"])
@pytest.mark.parametrize("size", SIZES)
def test_the_share_that_is_painted_is_as_the_docstring_says(kind, size):
    masks = masks_of(kind, *size)
    low, high = (0.12, 0.65) if kind in ("half_plane", "outpaint") else (0.08, 0.55)
    shares = np.array([mask.mean() for mask in masks])
    assert {mask.shape for mask in masks} == {size} and {mask.dtype for mask in masks} == {np.dtype(bool)}
    assert low <= shares.min() and shares.max() <= high
    # Spread over the range, not crowded in its middle: a model that knows one size of hole fails at the others.
    assert np.quantile(shares, 0.2) < low + 0.35 * (high - low)
    assert np.quantile(shares, 0.8) > low + 0.5 * (high - low)


@pytest.mark.parametrize("kind", ["brush", "box", "polygon"])
def test_holes_of_an_area_are_as_often_small_as_large(kind):
    """Log-uniform: between two ends a hundredfold apart, a tenth of the greatest is the middle."""
    recipe = MaskRecipe(((kind, 1.0),), variants=60, area=(0.005, 0.5))
    masks = [mask for number in range(3) for mask in draw_masks(recipe, content(number), 192, 256)]
    shares = np.array([mask.mean() for mask in masks])
    assert 0.004 < shares.min() < 0.01 and 0.3 < shares.max() < 0.55
    counts = np.histogram(np.log(shares), bins=4, range=(np.log(0.004), np.log(0.55)))[0]
    assert counts.min() > 25  # of 180


@pytest.mark.parametrize("kind", KINDS)
def test_the_smallest_area_still_has_a_hole(kind):
    for number in range(20):
        assert draw_mask(kind, 64, 48, mask_generator(content(number), 0), (0.001, 0.001)).any()


def test_masks_without_an_area_are_those_of_every_cache_before():
    recipe = MaskRecipe((("brush", 1.0), ("box", 1.0), ("polygon", 1.0)), variants=12)
    masks = draw_masks(recipe, content(0), 96, 64)
    assert xxhash.xxh3_64_hexdigest(np.packbits(masks).tobytes()) == "493cb97839ec8249"


def test_a_kind_without_a_drawer_is_found():
    class WithStars(RandomMasks):
        stars: float = 0.0

    drawers = drawers_of(RandomMasks, dict.fromkeys(KINDS, lambda height, width, generator: None))
    assert list(drawers) == list(RandomMasks.model_fields)
    with pytest.raises(TypeError, match="stars: a config may ask for such masks, but nothing here draws them"):
        drawers_of(WithStars, drawers)


def test_full_is_full():
    assert draw_mask("full", 48, 64, mask_generator(content(0), 0)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_is_a_function_of_content_and_variant(kind):
    first = draw_mask(kind, 64, 80, mask_generator(content(1), 0))
    assert np.array_equal(first, draw_mask(kind, 64, 80, mask_generator(content(1), 0)))
    if kind != "full":
        assert not np.array_equal(first, draw_mask(kind, 64, 80, mask_generator(content(1), 1)))
        assert not np.array_equal(first, draw_mask(kind, 64, 80, mask_generator(content(2), 0)))


def test_every_bit_of_the_content_counts():
    """Keys that differ in either half, and ends of the range."""
    keys = ["0" * 32, "0" * 31 + "1", "1" + "0" * 31, "f" * 32]
    numbers = {mask_generator(key, variant).random() for key in keys for variant in (0, 1, 63)}
    assert len(numbers) == 12


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "full"])
def test_a_hole_looks_the_same_at_every_resolution(kind):
    """Drawn at 512 px and halved it is what is drawn at 256 px, but for pixels at its edge."""
    for number in range(10):
        small, large = (draw_mask(kind, side, side, mask_generator(content(number), 0)) for side in (256, 512))
        assert (large[::2, ::2] != small).mean() < 0.02


def test_borders_reach_the_edge_of_the_picture():
    for mask in masks_of("outpaint", 64, 80):
        edges = [mask[0], mask[-1], mask[:, 0], mask[:, -1]]
        assert any(edge.all() for edge in edges), "no side is continued"
        kept = ~mask
        rows, columns = np.flatnonzero(kept.any(axis=1)), np.flatnonzero(kept.any(axis=0))
        assert kept[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all(), "what is kept is no rectangle"


def test_brush_strokes_are_no_boxes():
    for mask in masks_of("brush", 128, 128, count=20):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        assert mask.sum() < 0.8 * box


def test_kinds_come_in_their_shares():
    """Told apart by what they are: full is full, a half plane and a border touch a corner, a polygon seldom."""
    recipe = MaskRecipe(shares=(("box", 1.0), ("full", 3.0)))
    full = [draw_masks(recipe, content(number), 32, 32)[0].all() for number in range(400)]
    assert 0.68 < np.mean(full) < 0.82


def test_variants_differ_and_do_not_hang_on_how_many_there_are():
    few, many = (MaskRecipe(shares=(("brush", 0.5), ("box", 0.5)), variants=count) for count in (2, 5))
    first, all_of_them = draw_masks(few, content(3), 64, 64), draw_masks(many, content(3), 64, 64)
    assert all(np.array_equal(a, b) for a, b in zip(first, all_of_them[:2], strict=True))
    assert len({mask.tobytes() for mask in all_of_them}) == 5


def own_mask():
    mask = np.zeros((64, 64), dtype=bool)
    mask[20:30, 24:40] = True
    return mask


def test_a_dilated_mask_grows_to_all_sides_by_its_radius():
    recipe = MaskRecipe(dilate=(5, 5))
    (grown,) = dilate_masks(own_mask(), recipe, content(0))
    y, x = np.mgrid[:64, :64]
    distance = np.hypot(np.maximum(np.maximum(20 - y, y - 29), 0), np.maximum(np.maximum(24 - x, x - 39), 0))
    np.testing.assert_array_equal(grown, distance <= 5)


def test_dilation_is_drawn_from_its_range_for_every_variant():
    recipe = MaskRecipe(dilate=(0, 6), variants=8)
    tops = {
        20 - np.flatnonzero(mask.any(axis=1))[0]
        for number in range(20)
        for mask in dilate_masks(own_mask(), recipe, content(number))
    }
    assert tops == set(range(7))


def test_dilation_at_the_edge_stays_in_the_picture():
    mask = np.zeros((32, 32), dtype=bool)
    mask[0, 31] = True
    (grown,) = dilate_masks(mask, MaskRecipe(dilate=(4, 4)), content(0))
    assert grown[0, 27:].all() and grown[:5, 31].all() and grown.sum() < 25


def test_dilation_leaves_something_to_keep():
    mask = np.ones((32, 32), dtype=bool)
    mask[16, 16] = False
    (grown,) = dilate_masks(mask, MaskRecipe(dilate=(24, 24)), content(0))
    np.testing.assert_array_equal(grown, mask)


def test_masks_without_dilation_are_as_they_are(tmp_path):
    (same,) = dilate_masks(own_mask(), MaskRecipe(), content(0))
    np.testing.assert_array_equal(same, own_mask())


def test_the_sheet_shows_every_kind(tmp_path):
    sheet = contact_sheet(columns=2)
    sheet.save(tmp_path / "masks.png")
    with Image.open(tmp_path / "masks.png") as picture:
        colors = np.asarray(picture.convert("L"))
    assert sheet.height > (len(KINDS) - 1) * 112
    assert (colors == 64).mean() > 0.2, "no masks"
