"""A cache that was begun in format 1 stays in it: nothing of it is encoded again, and runs go on."""

from itertools import chain
from pathlib import Path

import pytest

from data.batches.row_filler import RowPolicy
from data.cache.manifest import NewerFormat, read_manifest
from data.cache.open_cache import open_cache
from data.cache.shard_index import read_index
from data.cache_layout import MANIFEST
from data.online.training_set import plan_online
from data.preprocessing.run import dry_run, preprocess
from data.preprocessing.shard_queue import read_finished
from data.verify.cache import verify_cache
from data.verify.repair import repair_cache
from tests.data.batches.streams import open_stream, rows_by_position, take
from tests.data.preprocessing.made_jobs import QUIET, files_below, leftovers, stamps, write_triple

PICTURES = 40


@pytest.fixture
def old(make_pictures, config_of, monkeypatch):
    """(folder of pictures, config) of a cache that the first release made."""
    folder = make_pictures(PICTURES)
    config = config_of(folder, "data.holdout=2")
    monkeypatch.setattr("data.cache.manifest.FORMAT_VERSION", 1)
    preprocess(config, QUIET)
    monkeypatch.undo()
    assert read_manifest(config.data.cache).format_version == 1
    return folder, config


@pytest.fixture
def no_encoders(monkeypatch):
    """Encoding is an error."""
    monkeypatch.setattr("data.preprocessing.run.load_encoders", None)


def check(cache):
    return verify_cache(cache, threads=1, start=lambda _: None, advance=lambda _: None)


def formats_of(cache):
    """Of every shard, by its index: which lies where its format says."""
    found = {path: read_index(path).format_version for path in cache.rglob("*.index")}
    assert all(path.is_relative_to(cache / ("shards" if number == 1 else "index")) for path, number in found.items())
    assert len(found) == len(list(cache.rglob("*.tar")))
    return set(found.values())


def test_a_finished_one_is_not_touched(old, no_encoders):
    _, config = old
    before = stamps(config.data.cache)
    preprocess(config, QUIET)
    assert stamps(config.data.cache) == before
    dry_run(config, QUIET)


@pytest.mark.parametrize("manifest", ["missing", "damaged"])
def test_an_interrupted_one_is_completed_in_its_format_and_keeps_its_shards(old, manifest):
    _, config = old
    cache = config.data.cache
    whole = {name: path.read_bytes() for name, path in files_below(cache).items()}
    lost = sorted(cache.rglob("*.tar"))[1]
    lost.unlink()
    (cache / MANIFEST).unlink() if manifest == "missing" else (cache / MANIFEST).write_text("{}")
    kept = stamps(cache, ".tar")
    preprocess(config, QUIET)
    assert stamps(cache, ".tar").items() > kept.items()
    assert {name: path.read_bytes() for name, path in files_below(cache).items()} == whole


def test_changed_and_new_pictures_are_added_in_its_format(old):
    folder, config = old
    cache = config.data.cache
    before = stamps(cache, ".tar")
    write_triple(folder, "picture-07", seed=7, hole=(0, 0, 5, 5))
    write_triple(folder, "a-new-one", seed=100)
    preprocess(config, QUIET)
    after = stamps(cache, ".tar")
    assert 0 < sum(before.get(name) != stamp for name, stamp in after.items()) < len(after)
    assert formats_of(cache) == {1} and read_manifest(cache).format_version == 1
    assert leftovers(cache) == [] and check(cache).problems == []


def test_an_online_run_reads_its_shards(old):
    """By the plan that such a run makes: what it finds is not encoded."""
    _, config = old
    plans = plan_online(config, Path(config.model.base), QUIET)
    indexes = [read_finished(config.data.cache, plan) for plan in plans]
    assert {index.format_version for index in indexes} == {1}


def test_one_that_is_begun_now_is_in_format_2_and_trains_alike(old, config_of):
    """Rows, their order and every number: a run of the one goes on from the other, and its losses are the same."""
    folder, config = old
    new = config_of(folder, "data.holdout=2", cache="new")
    preprocess(new, QUIET)
    assert formats_of(config.data.cache) == {1} and formats_of(new.data.cache) == {2}
    caches = [open_cache(each, Path(each.model.base)) for each in (config, new)]
    one, other = (open_stream(cache) for cache in caches)
    assert one.order.settings == other.order.settings
    one.close()
    other.close()
    policy = RowPolicy(caption_dropout=0.1)
    rows = [rows_by_position(chain.from_iterable(take(cache, 20, policy=policy))) for cache in caches]
    assert rows[0] == rows[1] and len(rows[0]) == 20 * 7


def test_what_is_damaged_is_mended_in_its_format(old):
    _, config = old
    cache = config.data.cache
    whole = {name: path.read_bytes() for name, path in files_below(cache).items()}
    bad, lost, *_ = sorted(cache.rglob("*.tar"))
    bad.write_bytes(bad.read_bytes()[:9000])
    lost.with_suffix(".index").unlink()
    checked, changed = repair_cache(config, lambda: check(cache), QUIET)
    assert checked.bad == [bad.relative_to(cache).as_posix()] and changed == []
    now = {name: path.read_bytes() for name, path in files_below(cache).items() if not name.startswith("quarantine")}
    assert now == whole
    aside = {path.name for path in (cache / "quarantine").rglob("*") if path.is_file()}
    assert aside == {bad.name, bad.with_suffix(".index").name}


def test_a_cache_of_a_newer_format_is_refused_and_left_alone(old, monkeypatch):
    """An older release would else take it for damaged, and encode all of it."""
    _, config = old
    before = stamps(config.data.cache)
    monkeypatch.setattr("data.cache.manifest.FORMAT_VERSION", 0)
    with pytest.raises(NewerFormat, match=r"format version 1, this fluxfill reads up to 0\. Update fluxfill"):
        preprocess(config, QUIET)
    assert stamps(config.data.cache) == before
