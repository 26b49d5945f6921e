import pytest
from PIL import Image

from data.sources.mask_reach import is_surely_left, measure_reach


def reach_of(size, *boxes):
    mask = Image.new("L", size)
    for box in boxes:
        mask.paste(255, box)
    return measure_reach(mask)


def test_a_hole_at_the_side_is_left_in_crops_that_reach_it():
    reach = reach_of((400, 100), (300, 20, 360, 80))
    # The nearest cell of 16 px ends at 320 of 400: 120 of the 200 px from the middle.
    assert not is_surely_left(reach, 16, 0.59, 1)
    assert is_surely_left(reach, 16, 0.61, 1)
    assert is_surely_left(reach, 2, 0.53, 1), "of a cell of 4 px, at 304"
    assert not is_surely_left(reach, 64, 1, 1), "none of 64 px is all hole"


def test_a_hole_at_both_sides_is_not_taken_for_one_in_the_middle():
    """As the box around both would be."""
    reach = reach_of((400, 100), (0, 0, 40, 100), (360, 0, 400, 100))
    assert not is_surely_left(reach, 4, 0.5, 1) and is_surely_left(reach, 4, 0.95, 1)


def test_what_is_kept_counts_as_the_hole_does():
    around = reach_of((400, 400), (0, 40, 400, 400))
    assert is_surely_left(around, 4, 1, 1) and not is_surely_left(around, 4, 1, 0.75)


@pytest.mark.parametrize("boxes", [[], [(7, 0, 10, 100)], [(0, 0, 400, 100)]])
def test_of_no_hole_a_thin_one_and_nothing_but_hole_nothing_is_sure(boxes):
    assert not is_surely_left(reach_of((400, 100), *boxes), 2, 1, 1)


def test_of_pictures_smaller_than_a_cell_and_of_no_mask_nothing_is_sure():
    assert not is_surely_left(reach_of((3, 2), (0, 0, 1, 2)), 2, 1, 1)
    assert not is_surely_left("", 2, 1, 1)
