"""Format 2 stays readable, and a run on it is one on format 1. format_v2/ holds the samples of format_v1/ (make.py)."""

import json
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load
from webdataset import WebDataset

from data.batches.row_filler import RowPolicy
from data.cache.manifest import read_manifest, read_shard_table
from data.cache.open_cache import Cache
from data.cache.shard_index import read_index, rebuild_index
from data.cache_layout import index_path
from data.samples.geometry import Bucket
from data.show.statistics import count_cache
from data.show.stored_samples import read_samples
from data.verify.cache import verify_cache
from tests.data.batches.streams import rows_by_position, take
from tests.data.cache.test_format_v1 import expected_t5, formulas

HERE = Path(__file__).parent


@pytest.fixture(params=["bf16", "int8"])
def caches(request) -> tuple[Cache, Cache]:
    """One of format 1 and one of format 2, of the same samples."""
    folders = [HERE / f"format_v{number}" / request.param for number in (1, 2)]
    first, second = (Cache(folder, read_manifest(folder), read_shard_table(folder)) for folder in folders)
    return first, second


@pytest.fixture
def new(caches) -> Cache:
    return caches[1]


def test_a_run_gets_the_same_rows_in_the_same_order_as_from_format_1(caches):
    """Every tensor of every row to the bit: noise, sigma's number and masks too. So losses are the same."""
    policy = RowPolicy(caption_dropout=0.2, mask_dropout=0.1)
    one, other = (rows_by_position(chain.from_iterable(take(cache, 12, policy=policy))) for cache in caches)
    assert list(one) == list(other) and len(one) == 12 * 7
    assert one == other


def test_webdataset_alone_reads_it(new):
    for path, _, bucket, _, count in formulas.SHARDS:
        texts: dict = {}
        found = []
        for entry in WebDataset(str(new.folder / path), shardshuffle=False):
            key = entry["__key__"]
            sample = formulas.sample_of(key, Bucket.parse(bucket))
            assert json.loads(entry["json"])["text"] == sample.text
            assert torch.equal(load(entry["safetensors"])["latents"], sample.latents)
            for variant in range(2):
                stored = load(entry[f"m{variant}.safetensors"])
                assert torch.equal(stored["masked_latents"], sample.masked_latents[variant])
                bits = np.unpackbits(stored["mask"].numpy(), axis=1).astype(bool)
                np.testing.assert_array_equal(bits, sample.masks[variant])
            text = texts[sample.text] = load(entry["text.safetensors"]) or texts[sample.text]
            t5 = text["t5"].float() * (text["t5_scale"][:, None] if "t5_scale" in text else 1)
            assert torch.equal(t5.bfloat16(), expected_t5(sample.text, new.manifest.text_dtype))
            found.append(key)
        assert found == formulas.keys_of(path, count)


def test_it_is_whole_by_todays_rules(caches):
    counted = []
    for cache in caches:
        assert verify_cache(cache.folder, threads=1, start=lambda _: None, advance=lambda _: None).problems == []
        counts = count_cache(cache.folder, cache.manifest, cache.table, range(4), lambda: None)
        counts.parts.pop("headers and padding")
        counted.append(replace(counts, groups=[]))
    assert counted[0] == counted[1]


def test_its_samples_are_shown(caches):
    shown = [list(read_samples(cache.folder, cache.manifest, cache.table, [(0, 2), (3, 1)])) for cache in caches]
    for one, other in zip(*shown, strict=True):
        assert (one.key, one.meta) == (other.key, other.meta)
        assert torch.equal(one.latents, other.latents)


def test_its_lost_index_is_rebuilt_to_the_same_bytes(new, tmp_path):
    for path, plan, sha256 in zip(new.table.path, new.table.plan, new.table.sha256, strict=True):
        tar, stored = new.folder / str(path), index_path(new.folder / str(path), 2)
        rebuilt = tmp_path / "a folder that is gone too" / "again.index"
        rebuild_index(tar, rebuilt, plan=str(plan), sha256=str(sha256))
        assert read_index(stored).keys == read_index(rebuilt).keys
        assert rebuilt.read_bytes() == stored.read_bytes()


def test_todays_writer_gives_the_same_files(new, tmp_path):
    """A change of the bytes is a change of the format, or of a library under it: know it before a release does."""
    formulas.make(tmp_path / "again", new.manifest.text_dtype, format_version=2)
    for path in new.table.path:
        assert (tmp_path / "again" / str(path)).read_bytes() == (new.folder / str(path)).read_bytes()
        index = index_path(Path(str(path)), 2)
        assert (tmp_path / "again" / index).read_bytes() == (new.folder / index).read_bytes()


def test_only_shards_lie_where_other_programs_look_for_them(new):
    assert {path.suffix for path in (new.folder / "shards").rglob("*") if path.is_file()} == {".tar"}
