from dataclasses import replace

import pytest

from data.cache.manifest import FORMAT_VERSION
from data.preprocessing.shard_queue import read_finished
from data.samples.geometry import Bucket, plan_crop
from data.samples.plan import PlannedSample
from data.samples.shard_plan import PlannedShard
from data.sources.picture_file import PictureFile
from data.sources.triples import Triple

SQUARE = Bucket(32, 32)


def planned(name):
    triple = Triple("cats", name, PictureFile(name), PictureFile(name), None, "a cat", "0", "0")
    return PlannedSample(triple, (32, 32), SQUARE, plan_crop(32, 32, SQUARE), "train")


def shard_plan(path, samples, plan):
    return PlannedShard(path, "cats", SQUARE, "train", plan, len(samples), 10_000, FORMAT_VERSION, samples)


@pytest.fixture
def finished(tmp_path, write_shard):
    """(cache, plan) of a finished shard of three samples."""
    path = "shards/cats/32x32-000001.tar"
    index = write_shard(tmp_path / path, SQUARE, ["a", "b", "c"])
    return tmp_path, shard_plan(path, tuple(planned(name) for name in "abc"), index.plan)


def test_a_whole_shard_of_this_plan_is_finished(finished):
    cache, plan = finished
    assert read_finished(cache, plan).keys == ("a", "b", "c")


@pytest.mark.parametrize("difference", ["plan", "bytes", "samples"])
def test_any_other_shard_is_not(finished, difference):
    cache, plan = finished
    if difference == "plan":
        plan = replace(plan, plan="0" * 32)
    elif difference == "samples":
        plan = replace(plan, num_samples=4)
    else:
        with (cache / plan.path).open("ab") as tar:
            tar.write(b"x")
    assert read_finished(cache, plan) is None
