import numpy as np
import pytest

from tests.trainer.evaluation.photographs import photograph
from trainer.evaluation.paste import cut_window, match_colours, paste, plan_window

COFFEE = (photograph("coffee").permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


def mask_of(height: int, width: int, top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros((height, width), dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


@pytest.mark.parametrize(
    "size, hole",
    [
        ((517, 333), (180, 120, 330, 230)),
        ((4000, 3000), (3950, 10, 4000, 60)),  # a small one in a corner
        ((4000, 3000), (0, 0, 4000, 3000)),  # all of it
        ((100, 90), (40, 40, 50, 50)),
        ((600, 4000), (0, 300, 600, 3500)),  # wider than any bucket
        ((64, 64), (63, 63, 64, 64)),
    ],
)
def test_the_window_holds_the_hole_and_lies_in_the_picture(size, hole):
    mask = mask_of(*size, *hole)
    window = plan_window(mask, 512)
    assert 0 <= window.left < window.right <= size[1] and 0 <= window.top < window.bottom <= size[0]
    assert mask[window.slices].sum() == mask.sum()
    assert window.bucket.height % 16 == window.bucket.width % 16 == 0
    assert 0.8 < window.bucket.height * window.bucket.width / 512**2 < 1.25
    assert 0.45 < window.bucket.width / window.bucket.height < 2.2


@pytest.mark.parametrize(
    "size, hole, window_size",
    [
        ((400, 2000), (180, 980, 220, 1020), (800, 400)),
        ((300, 4000), (130, 1980, 170, 2020), (600, 300)),
        ((2000, 500), (980, 230, 1020, 270), (500, 1000)),
        ((600, 4000), (150, 1600, 450, 2400), (1200, 600)),  # with less context than a wide picture would give
        ((300, 4000), (100, 1600, 140, 2200), (750, 300)),  # the hole itself is as long as 2:1: the least is shown
    ],
)
def test_a_narrow_picture_is_not_squeezed_where_the_hole_allows_it(size, hole, window_size):
    assert plan_window(mask_of(*size, *hole), 1024).size == window_size


def test_no_window_is_squeezed_more_than_its_hole_and_the_steps_of_a_bucket_make_it():
    random = np.random.default_rng(0)
    for _ in range(500):
        height, width = (int(side) for side in np.exp(random.uniform(np.log(16), np.log(3000), 2)))
        (top, bottom), (left, right) = (sorted(random.integers(0, side, 2)) for side in (height, width))
        mask, resolution = mask_of(height, width, top, left, bottom + 1, right + 1), int(random.choice([256, 1024]))
        window = plan_window(mask, resolution)
        assert 0 <= window.left <= left < right + 1 <= window.right <= width
        assert 0 <= window.top <= top < bottom + 1 <= window.bottom <= height
        short, long = sorted(window.size)
        across, down = right + 1 - left, bottom + 1 - top
        length = across if window.size[0] == long else down
        told = (height, width, mask.shape, window)
        if length + 0.25 * max(across, down) <= 2 * short:
            assert long <= 2 * short, told
            exact = [resolution * (a / b) ** 0.5 for a, b in (window.size, window.size[::-1])]
            given = (window.bucket.width, window.bucket.height)
            assert all(abs(side - ideal) <= 8.001 for side, ideal in zip(given, exact, strict=True)), told
        else:
            assert long <= np.ceil(length + 0.25 * max(across, down)), told


def test_a_small_hole_in_a_large_picture_is_filled_at_full_detail_with_context():
    window = plan_window(mask_of(4000, 3000, 2000, 1500, 2100, 1600), 1024)
    assert window.size == (1024, 1024) == (window.bucket.width, window.bucket.height)
    assert window.left < 1500 - 300 and window.right > 1600 + 300


def test_a_large_hole_is_seen_with_its_surroundings():
    window = plan_window(mask_of(4000, 3000, 1000, 800, 2600, 2000), 1024)
    assert window.size[1] >= 1.9 * 1600 and window.size[0] >= 1200 + 1600 - 1


def test_a_pixel_that_is_partly_hole_is_hole():
    """Shrunk, a thin line must not vanish: the model would be shown what it is to paint over."""
    mask = mask_of(2048, 2048, 0, 1000, 2048, 1003)
    window = plan_window(mask, 512)
    part, hole = cut_window(np.zeros((2048, 2048, 3), dtype=np.uint8), mask, window)
    assert part.shape == (window.bucket.height, window.bucket.width, 3) and hole.shape == part.shape[:2]
    assert hole.any(axis=1).all()


@pytest.mark.parametrize("feather", [0, 1, 8, 30])
def test_beyond_the_feathered_seam_every_pixel_is_as_it_was(feather):
    mask = mask_of(128, 128, 40, 50, 80, 90)
    window = plan_window(mask, 64)
    fill = np.random.default_rng(0).integers(0, 256, (window.bucket.height, window.bucket.width, 3)).astype(np.uint8)
    pasted = paste(COFFEE, mask, fill, window, feather=feather)
    assert pasted.shape == COFFEE.shape and pasted.dtype == np.uint8
    rows, columns = np.mgrid[:128, :128]
    away = np.hypot(
        np.maximum(40 - rows, 0) + np.maximum(rows - 79, 0), np.maximum(50 - columns, 0) + np.maximum(columns - 89, 0)
    )
    assert (pasted[away > feather + 1] == COFFEE[away > feather + 1]).all()
    assert (pasted[mask] != COFFEE[mask]).any(axis=1).mean() > 0.9
    if feather > 1:
        assert (pasted[(away > 0) & (away < feather)] != COFFEE[(away > 0) & (away < feather)]).any()


def test_a_right_fill_leaves_no_seam():
    """The picture itself as its fill, at another size and back: what differs is resampling alone."""
    mask = mask_of(128, 128, 40, 40, 90, 90)
    window = plan_window(mask, 128)
    part, _ = cut_window(COFFEE, mask, window)
    pasted = paste(COFFEE, mask, part, window, feather=8)
    assert np.abs(pasted.astype(int) - COFFEE).mean() < 1.5


def test_a_cast_of_the_whole_fill_is_taken_out_by_what_is_known_around_the_hole():
    mask = mask_of(128, 128, 44, 44, 84, 84)
    away = np.where(mask, 0, 5.0)
    cast = np.clip(COFFEE * np.array([0.9, 1.0, 0.95]) + np.array([18, -12, 6]), 0, 255).round().astype(np.uint8)
    matched = match_colours(cast, COFFEE, away)
    before, after = (np.abs(fill.astype(float) - COFFEE)[mask].mean() for fill in (cast, matched))
    assert after < before / 4


def test_a_hole_of_a_colour_of_its_own_keeps_it():
    """Matched is what both show around it, not the hole to its surroundings."""
    mask = mask_of(128, 128, 44, 44, 84, 84)
    fill = COFFEE.copy()
    fill[mask] = (250, 30, 200)
    matched = match_colours(fill, COFFEE, np.where(mask, 0, 5.0))
    assert np.abs(matched[mask] - (250, 30, 200)).max() < 1


def test_a_picture_that_is_all_hole_has_nothing_to_match():
    mask = np.ones((128, 128), dtype=bool)
    window = plan_window(mask, 64)
    fill = np.full((window.bucket.height, window.bucket.width, 3), 77, dtype=np.uint8)
    assert (paste(COFFEE, mask, fill, window, feather=8) == 77).all()
