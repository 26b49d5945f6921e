from dataclasses import replace

import pytest

from data.cache.build_manifest import delete_unplanned
from data.samples.geometry import Bucket
from data.samples.shard_plan import ShardSpec
from tests.data.samples.test_shard_plan import many_samples, plan

PLAN = ShardSpec("shards/photos/512x512-000001.tar", "photos", Bucket(512, 512), "train", "plan", 0, 0, 2)
INDEXES = {1: "shards/photos/512x512-000001.index", 2: "index/photos/512x512-000001.index"}


def write(cache, *names):
    for name in names:
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_text("x")


def files_of(cache):
    return {path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.is_file()}


@pytest.mark.parametrize("format_version", [1, 2])
def test_what_no_plan_names_is_deleted(tmp_path, format_version):
    planned = [PLAN.path, INDEXES[format_version], "blank_512x512.safetensors"]
    write(
        tmp_path,
        *planned,
        "shards/photos/512x512-000003.tar",
        "shards/photos/512x512-000003.index",
        "index/photos/512x512-000003.index",
        INDEXES[3 - format_version],
        "shards/photos/holdout-512x512-000001.tar",
        "shards/gone/64x96-12345678.tar",
        "shards/photos/512x512-000001.tar.0123abcd.part",
        "blank_64x96.safetensors",
        "blank_512x512.safetensors.0123abcd.part",
        "manifest.json.0123abcd.part",
    )
    delete_unplanned(tmp_path, [replace(PLAN, format_version=format_version)])
    assert files_of(tmp_path) == set(planned)


def test_whatever_was_planned_is_deleted_when_it_no_longer_is(tmp_path):
    paths = [shard.path for shard in plan(many_samples(), size_limit=40_000)]
    assert any(len(path.split("-")) == 3 for path in paths), "none is named for its caption"
    write(tmp_path, *paths)
    delete_unplanned(tmp_path, [])
    assert files_of(tmp_path) == set()


@pytest.mark.parametrize(
    "name",
    ["shards/000.tar", "shards/photos/cats.tar", "shards/a/b/512x512-000003.tar", "my.safetensors", "download.part"],
)
def test_what_preprocessing_never_wrote_is_left_alone(tmp_path, name):
    write(tmp_path, name)
    delete_unplanned(tmp_path, [PLAN])
    assert files_of(tmp_path) == {name}
