"""Format 1 stays readable. tests/data/format_v1/ holds two caches that its make.py wrote once; nobody rewrites them."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load
from webdataset import WebDataset

from data.batches.batch_stream import BatchStream
from data.batches.cached_rows import CachedRows
from data.batches.order import Order, OrderSettings, hash_shards
from data.batches.row_filler import RowPolicy
from data.cache.manifest import read_manifest, read_shard_table
from data.cache.open_cache import Cache
from data.cache.shard_index import read_index, rebuild_index
from data.cache.validation_items import read_validation_items
from data.samples.geometry import Bucket
from data.show.statistics import count_cache
from data.verify.cache import verify_cache

FOLDER = Path(__file__).parent / "format_v1"


def _load_formulas():
    spec = importlib.util.spec_from_file_location("format_v1_make", FOLDER / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


formulas = _load_formulas()


@pytest.fixture(params=["bf16", "int8"])
def old(request) -> Cache:
    folder = FOLDER / request.param
    return Cache(folder, read_manifest(folder), read_shard_table(folder))


def expected_t5(name: str, text_dtype: str) -> torch.Tensor:
    """What training gets of a text, from the formula, without this project's dequantisation."""
    t5 = formulas.numbers(f"t5 {name}", formulas.TEXT_LENGTH, formulas.TEXT_WIDTH)
    if text_dtype == "bf16":
        return t5.bfloat16()
    scale = t5.abs().amax(dim=-1, keepdim=True) / 127
    return ((t5 / scale).round() * scale).bfloat16()


def test_the_reader_gives_every_tensor_as_it_was(old):
    table = old.table
    samples = np.where(table.split == "train", table.samples, 0)
    weights = dict.fromkeys(table.dataset.tolist(), 1.0)
    settings = OrderSettings.current(
        seed=1, global_batch_size=1, weights=weights, shards=hash_shards(table.path, samples, table.plan)
    )
    order = Order(table.dataset, table.bucket, samples, settings)
    policy = RowPolicy(caption_dropout=0.2)
    source = CachedRows(old, order, policy=policy)
    stream = BatchStream(old.manifest, order, source, rank=0, world_size=1, micro_batch_size=1)
    seen, dropped = set(), 0
    for _ in range(80):
        for rows in next(stream):
            (key,) = stream.keys(stream.current)
            moved = rows.to(torch.device("cpu"))
            sample = formulas.sample_of(key, rows.bucket)
            (variant,) = (v for v in range(2) if torch.equal(moved.masked_latents[0], sample.masked_latents[v]))
            assert torch.equal(moved.latents[0], sample.latents)
            bits = np.unpackbits(moved.mask[0].numpy(), axis=1).astype(bool)
            np.testing.assert_array_equal(bits, sample.masks[variant])
            texts = {name: expected_t5(name, old.manifest.text_dtype) for name in (sample.text, "")}
            (text,) = (name for name, t5 in texts.items() if torch.equal(moved.t5[0], t5))
            assert torch.equal(moved.pooled[0], formulas.numbers(f"pooled {text}", 8).bfloat16())
            dropped += text == ""
            seen.add((key, variant))
    stream.close()
    assert len(seen) == 7 * 2 and 5 < dropped < 30


def test_webdataset_alone_reads_it(old):
    for path, _, bucket, _, count in formulas.SHARDS:
        entries = {entry["__key__"]: entry for entry in WebDataset(str(old.folder / path), shardshuffle=False)}
        for key in formulas.keys_of(path, count):
            sample = formulas.sample_of(key, Bucket.parse(bucket))
            assert torch.equal(load(entries[key]["safetensors"])["latents"], sample.latents)
            for variant in range(2):
                stored = load(entries[key][f"m{variant}.safetensors"])
                assert torch.equal(stored["masked_latents"], sample.masked_latents[variant])
                bits = np.unpackbits(stored["mask"].numpy(), axis=1).astype(bool)
                np.testing.assert_array_equal(bits, sample.masks[variant])
            text = load(entries[sample.text]["safetensors"])
            t5 = text["t5"].float() * (text["t5_scale"][:, None] if "t5_scale" in text else 1)
            assert torch.equal(t5.bfloat16(), expected_t5(sample.text, old.manifest.text_dtype))


def test_it_is_whole_by_todays_rules(old):
    assert verify_cache(old.folder, threads=1, start=lambda _: None, advance=lambda _: None).problems == []
    assert count_cache(old.folder, old.manifest, old.table, range(4), lambda: None).samples == 8
    ((item, pixels),) = read_validation_items(old.folder, split="holdout", count=9)
    assert item.shard == formulas.SHARDS[2][0] and pixels.mask.sum() == 16 * 24


def test_its_lost_index_is_rebuilt_to_the_same_bytes(old, tmp_path):
    for path, plan, sha256 in zip(old.table.path, old.table.plan, old.table.sha256, strict=True):
        tar = tmp_path / Path(str(path)).name
        tar.write_bytes((old.folder / str(path)).read_bytes())
        rebuild_index(tar, tar.with_suffix(".index"), plan=str(plan), sha256=str(sha256))
        stored = (old.folder / str(path)).with_suffix(".index")
        assert read_index(stored).keys == read_index(tar.with_suffix(".index")).keys
        assert tar.with_suffix(".index").read_bytes() == stored.read_bytes()


def test_todays_writer_gives_the_same_tars(old, tmp_path):
    """A change of the bytes is a change of the format, or of a library under it: know it before a release does."""
    formulas.make(tmp_path / "again", old.manifest.text_dtype)
    for path in old.table.path:
        assert (tmp_path / "again" / str(path)).read_bytes() == (old.folder / str(path)).read_bytes()
