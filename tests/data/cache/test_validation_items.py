from pathlib import Path

import numpy as np
import pytest

from configs.errors import InputError
from data.cache.manifest import FORMAT_VERSION
from data.cache.validation_items import (
    ValidationItem,
    choose_validation_items,
    read_validation_items,
    validation_items_are_there,
    write_validation_items,
)
from data.cache_layout import VALIDATION
from data.samples.geometry import Bucket, Pixels, plan_crop
from data.samples.plan import PlannedSample
from data.samples.shard_plan import plan_shards
from data.sources.triples import Triple

BUCKET = Bucket(32, 48)


def planned(number, split):
    path = Path(f"{number}.png")
    triple = Triple("cats", f"picture-{number}", path, path, None, f"caption {number % 3}", f"{number * 7919:032x}", "")
    return PlannedSample(triple, (48, 32), BUCKET, plan_crop(48, 32, BUCKET), split)


@pytest.fixture
def plans_and_indexes(tmp_path, write_shard):
    samples = [planned(number, "holdout" if number % 4 == 0 else "train") for number in range(24)]
    plans = plan_shards(samples, size_limit=20_000, text_bytes=500, encoding={}, format_version=FORMAT_VERSION)
    assert len(plans) > 4
    indexes = [write_shard(tmp_path / p.path, BUCKET, [s.triple.key for s in p.samples]) for p in plans]
    return plans, indexes


def pixels_of(number):
    rng = np.random.default_rng(number)
    target, image = rng.integers(0, 256, (2, 32, 48, 3), dtype=np.uint8)
    return Pixels(target, image, rng.random((32, 48)) < 0.3)


def item_of(number, split="holdout"):
    return ValidationItem(f"key-{number}", split, "cats", "shards/cats/a.tar", number, "ein Kätzchen 猫")


def write(cache, numbers, split="holdout"):
    write_validation_items(cache, ((item_of(n, split), pixels_of(n)) for n in numbers), advance=lambda: None)


def test_all_held_out_and_a_few_training_samples_are_watched(plans_and_indexes):
    plans, indexes = plans_and_indexes
    chosen = choose_validation_items(plans, count=5)
    splits = [item.split for item, _ in chosen]
    assert splits == ["holdout"] * 6 + ["train"] * 5
    for item, sample in chosen:
        assert (item.key, item.split, item.dataset) == (sample.triple.key, sample.split, "cats")
        assert item.caption == sample.triple.caption
        (index,) = [index for plan, index in zip(plans, indexes, strict=True) if plan.path == item.shard]
        assert index.keys[item.row] == item.key


def test_who_is_watched_hangs_on_the_pictures_alone(plans_and_indexes):
    plans, _ = plans_and_indexes
    chosen = choose_validation_items(plans, count=5)
    assert choose_validation_items(plans[::-1], count=5) == chosen
    trained = sorted(sample.triple.target_content for plan in plans if plan.split == "train" for sample in plan.samples)
    assert [sample.triple.target_content for item, sample in chosen if item.split == "train"] == trained[:5]
    assert chosen[:6] == choose_validation_items(plans, count=0)


def test_items_come_back_with_their_pixels(tmp_path):
    write(tmp_path, range(3))
    found = read_validation_items(tmp_path, split="holdout", count=2)
    assert [item for item, _ in found] == [item_of(0), item_of(1)]
    for number, (_, pixels) in enumerate(found):
        for name in ("target", "image", "mask"):
            expected = getattr(pixels_of(number), name)
            np.testing.assert_array_equal(getattr(pixels, name), expected)
            assert getattr(pixels, name).dtype == expected.dtype
    assert read_validation_items(tmp_path, split="train", count=9) == []


def test_what_was_there_is_replaced(tmp_path):
    write(tmp_path, range(5))
    write(tmp_path, [7])
    assert [item.key for item, _ in read_validation_items(tmp_path, split="holdout", count=9)] == ["key-7"]
    assert len(list((tmp_path / VALIDATION).iterdir())) == 4


def test_an_error_leaves_what_was_there(tmp_path):
    write(tmp_path, range(2))

    def fail_at_the_second():
        yield item_of(8), pixels_of(8)
        raise InputError("gone.png: no such picture")

    with pytest.raises(InputError, match=r"gone\.png"):
        write_validation_items(tmp_path, fail_at_the_second(), advance=lambda: None)
    assert [item.key for item, _ in read_validation_items(tmp_path, split="holdout", count=9)] == ["key-0", "key-1"]
    assert [path.name for path in tmp_path.iterdir()] == [VALIDATION]


@pytest.mark.parametrize("damage", ["no folder", "no items", "html", "entry", "no picture", "cut", "no png"])
def test_damage_is_named_with_what_to_do(tmp_path, damage):
    write(tmp_path, range(2))
    folder = tmp_path / VALIDATION
    picture = folder / "0001.image.png"
    if damage == "no folder":
        folder.rename(tmp_path / "elsewhere")
    elif damage == "no items":
        (folder / "items.json").unlink()
    elif damage in ("html", "entry"):
        (folder / "items.json").write_text("<!DOCTYPE html>" if damage == "html" else '[{"split": "holdout"}]')
    elif damage == "no picture":
        picture.unlink()
    else:
        picture.write_bytes(picture.read_bytes()[:200] if damage == "cut" else b"<!DOCTYPE html>")
    with pytest.raises(
        InputError, match=rf"{VALIDATION}: damaged .*Delete it and run `fluxfill preprocess CONFIG` again"
    ):
        read_validation_items(tmp_path, split="holdout", count=2)
    if damage in ("no folder", "no items", "html", "no picture"):
        assert not validation_items_are_there(tmp_path)


def test_whole_items_are_there(tmp_path):
    assert not validation_items_are_there(tmp_path)
    write(tmp_path, [])
    assert validation_items_are_there(tmp_path)
    write(tmp_path, range(2))
    assert validation_items_are_there(tmp_path)
