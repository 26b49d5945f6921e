from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.errors import InputError
from data.samples.decode import load_pixels
from tests.data.samples.made_pictures import folders, planned, write_pictures


def test_a_picture_that_changed_after_planning_is_refused(config_of, tmp_path):
    folder = write_pictures(tmp_path / "pictures")
    config = config_of(folders(folder))
    sample = planned(config)[0]
    load_pixels(sample, config.data)
    path = Path(sample.triple.target.place)
    with Image.open(path) as picture:
        other = picture.transpose(Image.Transpose.ROTATE_180)
    other.save(path)
    with pytest.raises(InputError, match=rf"{path} or .*: changed since the shards were planned\. Run `fluxfill prep"):
        load_pixels(sample, config.data)


RANDOM = {"random": {"brush": 0.5, "box": 0.3, "outpaint": 0.2}, "variants": 3}


def test_masks_do_not_hang_on_names_order_or_batch(config_of, tmp_path):
    folder = write_pictures(tmp_path / "pictures")
    dataset = {"name": "photos", "target": f"{folder}/target", "mask": RANDOM}
    config = config_of(dataset)
    before = {s.triple.target_content: load_pixels(s, config.data) for s in planned(config)}
    (folder / "target" / "photos").rename(folder / "target" / "renamed")
    (folder / "target" / "renamed" / "00.png").rename(folder / "target" / "zebra.png")
    after = {s.triple.target_content: load_pixels(s, config.data) for s in planned(config)}
    assert before.keys() == after.keys()
    for content, variants in before.items():
        for first, second in zip(variants, after[content], strict=True):
            np.testing.assert_array_equal(first.mask, second.mask)
