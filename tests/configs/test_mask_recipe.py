from pathlib import Path

import pytest

from configs.dataset_schema import DatasetConfig
from configs.mask_recipe import MaskRecipe, mask_folder, recipe_of


@pytest.mark.parametrize(
    "mask, recipe, text",
    [
        ("m", MaskRecipe(), "own"),
        ({"folder": "m", "dilate": [2, 9], "variants": 3}, MaskRecipe(dilate=(2, 9), variants=3), None),
        ({"folder": "m", "label": 1}, MaskRecipe(label=1), "own, label 1"),
        ({"folder": "m", "label": "#ff0000"}, MaskRecipe(label="#ff0000"), "own, label #ff0000"),
        ({"random": {"brush": 2, "box": 0, "full": 1}}, MaskRecipe(shares=(("brush", 2.0), ("full", 1.0))), None),
    ],
)
def test_a_recipe_is_what_the_config_says(mask, recipe, text):
    found = recipe_of(DatasetConfig.model_validate({"name": "a", "target": "t", "mask": mask}))
    assert found == recipe
    assert text is None or str(found) == text


def test_recipes_that_differ_are_told_apart_by_their_text():
    recipes = [
        MaskRecipe(),
        MaskRecipe(label=1),
        MaskRecipe(dilate=(0, 4)),
        MaskRecipe(dilate=(0, 4), variants=2),
        MaskRecipe(shares=(("box", 1.0),)),
        MaskRecipe(shares=(("box", 1.0),), variants=2),
        MaskRecipe(shares=(("box", 1.0),), area=(0.01, 0.5)),
        MaskRecipe(shares=(("box", 1.5),)),
        MaskRecipe(shares=(("box", 1.0), ("full", 1.0))),
    ]
    assert len({str(recipe) for recipe in recipes}) == len(recipes)
    assert str(recipes[3]) == "own, grown by 0 to 4 pixels; 2 variants"


@pytest.mark.parametrize(
    "mask, folder", [("m", Path("m")), ({"folder": "m", "dilate": [0, 4]}, Path("m")), ({"random": {"box": 1}}, None)]
)
def test_the_folder_of_own_masks_is_found_whichever_way_it_is_said(mask, folder):
    assert mask_folder(DatasetConfig.model_validate({"name": "a", "target": "t", "mask": mask})) == folder


def test_a_recipe_without_a_label_is_hashed_as_it_was_before_there_were_labels():
    assert MaskRecipe().hashed == {"shares": (), "dilate": (0, 0), "variants": 1}
    assert MaskRecipe(label=1).hashed == {"shares": (), "dilate": (0, 0), "variants": 1, "label": 1}


def test_random_masks_without_an_area_are_hashed_as_they_were_before_there_was_one():
    box = (("box", 1.0),)
    assert MaskRecipe(box).hashed == {"shares": box, "dilate": (0, 0), "variants": 1}
    assert MaskRecipe(box, area=(0.01, 0.5)).hashed == MaskRecipe(box).hashed | {"area": (0.01, 0.5)}


@pytest.mark.parametrize(
    "mask, message",
    [
        ({"random": {"full": 1, "half_plane": 1}, "area": [0.01, 0.5]}, "none of them is drawn"),
        ({"folder": "m", "area": [0.01, 0.5]}, "none of them is drawn"),
        ({"random": {"box": 1}, "area": [0.5, 0.01]}, "the least and the most, from 0.001 to 0.6"),
        ({"random": {"box": 1}, "area": [0.0, 0.5]}, "the least and the most, from 0.001 to 0.6"),
    ],
)
def test_an_area_is_that_of_holes_that_are_drawn(mask, message):
    with pytest.raises(ValueError, match=message):
        DatasetConfig.model_validate({"name": "a", "target": "t", "mask": mask})


def test_random_holes_have_no_label():
    with pytest.raises(ValueError, match="only a dataset's own masks have labels"):
        DatasetConfig.model_validate({"name": "a", "target": "t", "mask": {"random": {"box": 1}, "label": 1}})


def test_masks_of_tars_may_be_labels():
    assert recipe_of(DatasetConfig.model_validate({"name": "a", "tars": "t.tar", "mask": {"label": 1}})).label == 1
