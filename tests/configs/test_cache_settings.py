import json
from pathlib import Path
from typing import Annotated, Any

import pytest

from configs.cache_settings import (
    is_place,
    keys_that_shape,
    manifest_settings,
    picture_settings,
    plan_settings,
    tensor_settings,
    worker_settings,
)
from configs.data_schema import CaptionsConfig, DataConfig
from configs.dataset_schema import DatasetConfig, MaskConfig, RandomMasks
from configs.section import Section, Shapes

PHOTOS = DatasetConfig(name="photos", target=Path("a"), mask=Path("m"), weight=2.0)
FLIPPED = DatasetConfig(name="art", target=Path("b"), mask=MaskConfig(random=RandomMasks(box=1), variants=3), flip=True)


def data_config(**keys) -> DataConfig:
    return DataConfig(**{"cache": Path("cache"), "datasets": [PHOTOS, FLIPPED], "resolution": [96, 64]} | keys)


def test_every_key_of_the_section_says_what_it_shapes():
    assert keys_that_shape(Shapes.NOTHING).keys() == DataConfig.model_fields.keys()


def test_a_key_that_does_not_say_what_it_shapes_is_found():
    class WithColour(CaptionsConfig):
        colour: str = "red"

    class InSection(Section):
        captions: WithColour = WithColour()

    class InList(Section):
        captions: list[WithColour]

    class Marked(Section):
        captions: list[Annotated[WithColour, Shapes.PLAN]] | None = None

    for section in (WithColour, InSection, InList):
        with pytest.raises(TypeError, match=r"WithColour\.colour does not say what it shapes\. Add one of Shapes"):
            keys_that_shape(Shapes.TENSORS, section)
    with pytest.raises(TypeError, match=r"Marked\.captions does not say"):  # a mark deeper in its type is not the key's
        keys_that_shape(Shapes.NOTHING, Marked)


def test_workers_compare_all_that_shapes_the_plan():
    """What they compare is in files of workers of other versions too."""
    settings: dict[str, Any] = worker_settings(data_config())
    assert list(settings) == [
        "data.datasets",
        "data.resolution",
        "data.resolution_policy",
        "data.captions",
        "data.holdout",
        "data.shard_size_mib",
        "data.max_megapixels",
        "data.encoders",
    ]
    assert settings["data.captions"] == {"default": "", "trigger": None, "text_length": 512, "text_dtype": "bf16"}
    assert settings["data.encoders"] == {"t5_precision": "auto"}
    (photos, _) = settings["data.datasets"]
    assert list(photos) == ["name", "tars", "table", "target", "members", "columns", "mask", "source", "flip"]


def test_the_manifests_settings_are_those_of_format_1():
    assert json.dumps(manifest_settings(data_config()), sort_keys=True) == (
        '{"data.captions.default": "", "data.captions.text_dtype": "bf16", "data.captions.text_length": 512, '
        '"data.captions.trigger": null, "data.datasets": ["art", "photos"], "data.datasets.art.flip": true, '
        '"data.datasets.art.mask": "random box 1; 3 variants", "data.datasets.photos.flip": false, '
        '"data.datasets.photos.mask": "own", "data.encoders.t5_precision": "auto", "data.holdout": 64, '
        '"data.resolution": [64, 96], "data.resolution_policy": "one"}'
    )


def test_the_order_of_datasets_and_resolutions_does_not_matter():
    other = data_config(datasets=[FLIPPED, PHOTOS], resolution=[64, 96])
    assert manifest_settings(other) == manifest_settings(data_config())


@pytest.mark.parametrize(
    "keys, expected",
    [
        ({}, {"text_length": 512, "text_dtype": "bf16"}),
        ({"captions": {"text_length": 64, "trigger": "sks"}}, {"text_length": 64, "text_dtype": "bf16"}),
        (
            {"captions": {"text_dtype": "int8"}, "encoders": {"t5_precision": "int8", "t5": "cpu"}},
            {"text_length": 512, "text_dtype": "int8", "t5_precision": "int8"},
        ),
    ],
)
def test_the_settings_in_every_shards_hash_are_those_of_format_1(keys, expected):
    assert tensor_settings(data_config(**keys)) == expected


@pytest.mark.parametrize("key, value", [("min_side", 512), ("max_enlarge", 1.5)])
def test_a_later_key_is_compared_once_it_is_set(key, value):
    for settings_of in (manifest_settings, worker_settings):
        assert settings_of(data_config(**{key: value})) == settings_of(data_config()) | {f"data.{key}": value}


def test_the_manifest_says_which_pictures_a_cache_was_made_of_without_tokens():
    assert picture_settings(PHOTOS) == {
        **{f"data.datasets.photos.{key}": None for key in ("columns", "members", "source", "table", "tars")},
        **{"data.datasets.photos.target": "a", "data.datasets.photos.mask.folder": "m"},
    }
    tars = DatasetConfig(name="web", tars=["https://host/a.tar?token=1"], members={"source": "before.png"})
    found = picture_settings(tars)
    assert found["data.datasets.web.tars"] == ["https://host/a.tar"]
    assert found["data.datasets.web.members"] == {"source": ["before.png"]}
    assert {key for key in found if is_place(key)} == found.keys() - {
        "data.datasets.web.members",
        "data.datasets.web.columns",
    }


def test_all_else_that_shapes_a_plan_is_known_without_its_places():
    data = data_config(shard_size_mib=7)
    moved = data_config(shard_size_mib=7, datasets=[PHOTOS.model_copy(update={"target": Path("c"), "mask": Path("d")})])
    assert plan_settings(data, PHOTOS) == plan_settings(moved, moved.datasets[0])
    assert plan_settings(data, PHOTOS) != plan_settings(data_config(), PHOTOS)
    found = plan_settings(data, FLIPPED)
    assert found["data.datasets.flip"] is True and found["data.datasets.mask"] == "random box 1; 3 variants"
    elsewhere = data_config(shard_size_mib=7, encoders={"t5": "cpu"}, captions={"dropout": 0.5})
    assert plan_settings(elsewhere, PHOTOS) == plan_settings(data, PHOTOS), "sections that shape nothing else"
