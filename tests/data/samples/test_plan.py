"""Planned samples and shards against the marks on the schema: what a key shapes, and what it must not."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.progress import Progress

from configs.cache_settings import keys_that_shape, tensor_settings
from configs.errors import InputError
from configs.schema import Config
from configs.section import Shapes
from data.cache.manifest import FORMAT_VERSION
from data.samples.plan import plan_samples
from data.samples.shard_plan import plan_shards

# Of every key that does not only say where pictures lie: a value other than the default.
OTHER_VALUES: dict[str, Any] = {
    "preprocess": "never",
    "mode": "online",
    "encoder_devices": ["cpu"],
    "local_cache": "copies",
    "local_cache_gib": 1.0,
    "datasets.name": "cats",
    "datasets.mask": {"random": {"box": 1.0}, "variants": 2},
    "datasets.check_masks": "warn",
    "datasets.flip": True,
    "datasets.weight": 2.0,
    "resolution": [64],
    "resolution_policy": "each",
    "min_side": 30,
    "max_enlarge": 1.2,
    "captions.default": "a picture",
    "captions.trigger": "sks",
    "captions.dropout": 0.5,
    "captions.text_length": 64,
    "captions.text_dtype": "int8",
    "mask_choice": "cycle",
    "mask_dropout": 0.5,
    "holdout": 3,
    "shard_size_mib": 1,
    "max_megapixels": 1.0,
    "copies_gib": 1.0,
    "encode_batch_size": 3,
    "encoders.vae": "cpu",
    "encoders.clip": "cpu",
    "encoders.t5": "cpu",
    "encoders.t5_precision": "int8",
    "reader_threads": 1,
    "streams": 2,
}
PLACES = {"cache", *(f"datasets.{key}" for key in ("tars", "table", "target", "members", "columns", "source"))}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0)
    for role in ("target", "mask"):
        (folder / role).mkdir()
    for number in range(8):
        side = 24 if number == 7 else 48
        Image.fromarray(noise.integers(0, 255, (side, side, 3), np.uint8)).save(folder / f"target/{number}.png")
        Image.fromarray(np.tri(side, dtype=np.uint8) * 255).save(folder / f"mask/{number}.png")
    return folder


def plan_of(folder, key: str = "", value: object = None) -> dict[str, str]:
    """Path -> plan of every shard of a small job, one key of `data` changed."""
    dataset: dict[str, Any] = {"name": "dogs", "target": folder / "target", "mask": folder / "mask"}
    data: dict[str, Any] = {"cache": folder / "cache", "datasets": [dataset], "resolution": [32, 48], "holdout": 2}
    section, _, last = key.rpartition(".")
    if section == "datasets":
        dataset[last] = value
    elif section:
        data[section] = {last: value}
    elif key:
        data[key] = value
    if key == "encoder_devices":
        data["mode"] = "online"
    config = Config.model_validate(
        {
            "run": {"name": "a"},
            "model": {"base": "b"},
            "method": {"type": "full"},
            "data": data,
            "train": {"steps": 200, "global_batch_size": 1, "lr": 1e-4},
        }
    )
    samples = plan_samples(config, Progress(disable=True))
    encoding = tensor_settings(config.data)
    plans = plan_shards(samples, size_limit=1 << 20, text_bytes=1000, encoding=encoding, format_version=FORMAT_VERSION)
    return {plan.path: plan.plan for plan in plans}


def dotted(keys: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, below in keys.items():
        if below is True:
            yield f"{prefix}{key}"
        else:
            yield from dotted(below.get("__all__", below), f"{prefix}{key}.")


def test_a_shards_plan_follows_the_keys_that_are_marked_so(pictures):
    """A key that shapes samples changes shards, one that shapes tensors changes all, one that shapes nothing, none."""
    before = plan_of(pictures)
    least = {mark: set(dotted(keys_that_shape(mark))) for mark in Shapes}
    assert OTHER_VALUES.keys() == least[Shapes.NOTHING] - PLACES, "a key without another value to try"
    for key, value in OTHER_VALUES.items():
        after = plan_of(pictures, key, value)
        if key in least[Shapes.TENSORS]:
            assert after.keys() == before.keys() and not set(after.values()) & set(before.values()), key
        elif key in least[Shapes.SAMPLES]:
            assert after != before, key
        elif key not in least[Shapes.PLAN]:
            assert after == before, key


def test_pictures_that_are_too_small_are_left_out_and_counted(pictures, capsys):
    assert plan_of(pictures, "min_side", 30) != plan_of(pictures)
    assert "1 of 8 pictures are left out by data.min_side 30 and data.max_enlarge null" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"8 of 8 pictures are left out by data\.min_side 64 .*\. Lower the one"):
        plan_of(pictures, "min_side", 64)
