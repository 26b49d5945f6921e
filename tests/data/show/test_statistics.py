from collections import Counter
from dataclasses import replace
from statistics import median_low

import pytest

from configs.data_schema import CaptionsConfig
from configs.errors import InputError
from data.cache.shard_writer import ShardWriter
from data.samples.geometry import Bucket
from data.samples.plan import text_name
from data.show.statistics import count_cache, find_shards
from data.sources.items import DEFAULT, NONE, OWN, finish_caption
from tests.data.made_caches import index_of, make_text

SHARDS = [("photos", "48x64", 5), ("photos", "48x64", 3), ("photos", "32x32", 4, "holdout"), ("removal", "48x64", 1)]


def count(cache, name=None):
    rows = find_shards(cache.table, name)
    return count_cache(cache.folder, cache.manifest, cache.table, rows, lambda: None)


@pytest.mark.parametrize("variants, text_dtype", [(1, "bf16"), (4, "bf16"), (2, "int8")])
def test_the_parts_add_up_to_the_files_and_are_what_the_tensors_take(make_cache, variants, text_dtype):
    cache = make_cache(SHARDS, num_variants=variants, text_dtype=text_dtype)
    counted = count(cache)
    files = sum(path.stat().st_size for path in cache.folder.rglob("*.tar"))
    assert sum(counted.parts.values()) == counted.bytes == files
    large, small = 16 * 6 * 8 * 2, 16 * 4 * 4 * 2
    latents = 9 * large + 4 * small
    text = 8 * 6 + 8 * 4 + 4 * 2 if text_dtype == "int8" else 8 * 6 * 2 + 4 * 2
    masks = 9 * 48 * 8 + 4 * 32 * 4
    assert counted.texts == 2 + 2 + 2 + 1
    expected = {
        "latents": latents,
        "masked latents": variants * latents,
        "masks": variants * masks,
        "text": counted.texts * text,
    }
    assert {part: counted.parts[part] for part in expected} == expected
    assert counted.apart == variants * (2 * latents + masks + 13 * text)
    assert counted.parts["headers and padding"] > 0 and counted.parts["JSON"] > 13 * 50


def test_shards_are_counted_by_dataset_bucket_and_split(make_cache):
    counted = count(make_cache(SHARDS, num_variants=3))
    groups = [
        (group.dataset, group.bucket, group.split, group.shards, group.samples, group.variants)
        for group in counted.groups
    ]
    assert groups == [
        ("photos", "32x32", "holdout", 1, 4, 3),
        ("photos", "48x64", "train", 2, 8, 3),
        ("removal", "48x64", "train", 1, 1, 3),
    ]
    assert (counted.samples, counted.masks, sum(counted.hole_fractions)) == (13, 39, 39)


def test_tokens_are_those_of_the_samples(make_cache, make_sample):
    cache = make_cache(SHARDS)
    tokens = [
        make_sample(f"{dataset}-{number}-{row}", Bucket.parse(bucket), text="").tokens
        for number, (dataset, bucket, samples, *_) in enumerate(SHARDS)
        for row in range(samples)
    ]
    counted = count(cache)
    assert counted.tokens == (median_low(tokens), max(tokens))
    assert counted.cut == 0


def test_a_caption_that_fills_the_text_length_is_counted(make_cache):
    cache = make_cache([("a", "32x32", 9)])
    shorter = replace(cache.manifest, text_length=4)
    assert count(replace(cache, manifest=shorter)).cut > 0


def test_one_shard_is_found_by_its_path_or_the_end_of_it(make_cache):
    table = make_cache(SHARDS).table
    assert find_shards(table, None) == [0, 1, 2, 3]
    for name in ("shards/removal/48x64-000003.tar", "48x64-000003", "removal/48x64-000003.tar"):
        assert find_shards(table, name) == [3]
    with pytest.raises(InputError, match=r"--shard 000003: 0 shards have that name \(the first of 4 are shards/photos"):
        find_shards(table, "000003")


def test_the_numbers_of_one_shard_are_its_own(make_cache):
    cache = make_cache(SHARDS)
    counted = count(cache, "48x64-000003")
    assert counted.samples == 1
    assert counted.bytes == (cache.folder / "shards/removal/48x64-000003.tar").stat().st_size


def test_a_lost_index_is_named(make_cache):
    cache = make_cache(SHARDS)
    index_of(cache.folder / str(cache.table.path[1])).unlink()
    with pytest.raises(InputError, match=r"48x64-000001.index: missing. `fluxfill shards verify --repair CONFIG`"):
        count(cache)


@pytest.mark.parametrize("default, whose", [("a photo", DEFAULT), ("", NONE)])
@pytest.mark.parametrize("lacking", [0, 3])
def test_captions_are_counted_by_whose_they_are(make_cache, make_sample, default, whose, lacking):
    """By their texts' names, which stand in the tar alone."""
    cache = make_cache([("photos", "48x64", 12)])
    captions = CaptionsConfig(default=default, trigger="sks")
    own = [f"sks, number {number}" for number in range(12 - lacking)]
    names = sorted(text_name(caption) for caption in own + [finish_caption(None, captions)] * lacking)
    with ShardWriter(cache.folder / str(cache.table.path[0])) as writer:
        for text in dict.fromkeys(names):
            writer.add_text(text, **make_text(text))
        for row, text in enumerate(names):
            writer.add_sample(make_sample(f"{row:02d}", Bucket(48, 64), text=text))
        writer.finish(plan="0" * 32)
    settings = {"data.captions.default": default, "data.captions.trigger": "sks"}
    manifest = replace(cache.manifest, settings=settings)
    counted = count_cache(cache.folder, manifest, cache.table, [0], lambda: None)
    assert counted.captions == Counter({OWN: 12 - lacking, whose: lacking})
    (cache.folder / str(cache.table.path[0])).unlink()
    with pytest.raises(InputError, match=r"48x64-000000\.tar: missing\. Restore it"):
        count_cache(cache.folder, manifest, cache.table, [0], lambda: None)
