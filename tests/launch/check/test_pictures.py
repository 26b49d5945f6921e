import json
from pathlib import Path

import pytest
from PIL import Image

from launch.check.pictures import check_pictures


def of(name: str, checks: list) -> list:
    return [made for made in checks if made.name == name]


def test_pictures_captions_and_buckets_are_counted(situate, folder, progress):
    pictures, checks = check_pictures(situate("data.holdout=2"), progress)
    assert pictures is not None and len(pictures.samples) == 6
    assert {made.state for made in checks} == {"ok"}
    assert of("pictures", checks)[0].what == "4 can be trained on: 4 of photographs; 2 are held out"
    assert of("captions", checks)[0].what == "of 6 samples: 6 of their own, 0 the default, 0 none"
    assert "2 of them held out" in of("buckets", checks)[0].what


def test_most_without_a_caption_is_a_warning(situate, folder, progress):
    for path in sorted((folder / "target").glob("*.txt"))[:4]:
        path.unlink()
    _, checks = check_pictures(situate(), progress)
    (made,) = of("captions", checks)
    assert (
        made.state == "warning"
        and "2 of their own, 0 the default, 4 none" in made.what
        and "data.captions" in made.cure
    )
    _, checks = check_pictures(situate("data.captions.default=a photo", "data.captions.trigger=sks"), progress)
    assert "2 of their own, 4 the default, 0 none" in of("captions", checks)[0].what


def test_several_of_a_kind_are_one_check_that_lists_them(situate, folder, progress):
    masks = sorted((folder / "mask").glob("*.png"))[:3]
    for path in masks:
        path.unlink()
    pictures, checks = check_pictures(situate(), progress)
    (made,) = of("names", checks)
    assert made.state == "error" and made.what == "3 of the kind"
    assert [Path(line.split(": ")[0]).stem for line in made.found] == [path.stem for path in masks]
    assert pictures is not None and len(pictures.samples) == 3


def test_masks_that_their_crop_cuts_off_are_an_error(situate, folder, progress):
    hole = Image.new("L", (640, 64))
    hole.paste(255, (0, 0, 30, 64))
    for name in ("wide-1", "wide-2"):
        Image.new("RGB", hole.size).save(folder / "target" / f"{name}.png")
        for role in ("source", "mask"):  # white in the hole
            hole.save(folder / role / f"{name}.png")
    _, checks = check_pictures(situate(), progress)
    (made,) = of("masks", checks)
    assert made.state == "error" and "Crop the triple yourself" in made.cure
    assert [Path(line.split(": ")[0]).stem for line in made.found] == ["wide-1", "wide-2"]


def test_notes_are_warnings_and_nothing_is_written_for_them(situate, folder, progress):
    (folder / "target" / "lonely.txt").write_text("a caption of nothing")
    _, checks = check_pictures(situate(), progress)
    (made,) = [made for made in checks if made.state == "warning"]
    assert made.name == "captions" and "belongs to no picture" in made.what
    assert [path.name for path in (folder / "cache").iterdir()] == ["scan"]


def test_what_is_much_enlarged_is_a_warning_and_what_is_left_out_is_said(situate, progress):
    _, checks = check_pictures(situate("data.resolution=256"), progress)
    (made,) = of("sizes", checks)
    assert made.state == "warning" and "enlarged above 1.5x" in made.what and "data.max_enlarge" in made.cure
    pictures, (made,) = check_pictures(situate("data.min_side=2000"), progress)
    assert pictures is None and made.state == "error" and "left out by data.min_side" in made.what


@pytest.mark.parametrize("why", ["held out", "min_side"])
def test_a_dataset_of_which_nothing_is_trained_on_is_a_warning(situate, folder, progress, why):
    few = folder / "rare"
    for role in ("target", "source", "mask"):
        (few / role).mkdir(parents=True)
    if why == "held out":
        held = next(s for s in check_pictures(situate("data.holdout=1"), progress)[0].samples if s.split == "holdout")
        for role in ("target", "source", "mask"):
            for path in (folder / role).glob(f"{Path(held.triple.name).stem}.*"):
                path.rename(few / role / path.name)
    else:
        hole = Image.new("L", (24, 24))
        hole.paste(255, (8, 8, 16, 16))
        Image.new("RGB", hole.size).save(few / "target" / "small.png")
        for role in ("source", "mask"):  # white in the hole
            hole.save(few / role / "small.png")
    datasets = [
        {"name": name} | {role: str(place / role) for role in ("target", "source", "mask")}
        for name, place in (("photographs", folder), ("rare", few))
    ]
    limit = "data.holdout=1" if why == "held out" else "data.min_side=25"
    _, checks = check_pictures(situate(f"data.datasets={json.dumps(datasets)}", limit), progress)
    counted, made = of("pictures", checks)
    assert counted.what.startswith(f"{6 - (why == 'held out')} can be trained on: ") and "rare" not in counted.what
    assert made.state == "warning" and "dataset rare is not trained on, and the others share its weight" in made.what
    assert why in made.what and ("data.holdout" if why == "held out" else "Lower the one") in made.cure
