import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from safetensors.torch import load, load_file

from configs.errors import InputError
from data.cache.manifest import read_manifest
from data.cache.open_cache import open_cache
from data.cache.validation_items import read_validation_items
from data.cache_layout import EMPTY_TEXT, VALIDATION
from data.encoders.encode import encode_captions, encode_pixels
from data.preprocessing.run import preprocess
from data.sources.pictures import load_mask
from tests.data.made_caches import index_of
from tests.data.preprocessing.made_jobs import (
    QUIET,
    files_below,
    leftovers,
    shard_bytes,
    stamps,
    write_triple,
)


def samples_of(cache):
    """Every stored sample: (split, bucket, meta, tensors), through webdataset alone."""
    for path, split, bucket in zip(cache.table.path, cache.table.split, cache.table.bucket, strict=True):
        texts = {}
        for entry in webdataset.WebDataset(str(cache.folder / str(path)), shardshuffle=False):
            meta = json.loads(entry["json"])
            texts.setdefault(meta["text"], load(entry["text.safetensors"]))
            tensors = load(entry["safetensors"]) | load(entry["m0.safetensors"]) | texts[meta["text"]]
            yield str(split), str(bucket), meta, tensors


def test_every_triple_is_stored_once_and_whole(cache, triples):
    seen, counts = set(), {"train": 0, "holdout": 0}
    for split, bucket, meta, tensors in samples_of(cache):
        height, width = map(int, bucket.split("x"))
        assert meta["original_size"] == [height, width]
        assert meta["crop"] == [0, 0, height, width]
        name = meta["target"]
        assert meta["dataset"] == "photographs"
        assert meta["caption"] == (triples / "target" / name).with_suffix(".txt").read_text().strip()
        expected = np.asarray(load_mask(triples / "mask" / name, max_megapixels=1)) >= 128
        bits = np.unpackbits(tensors.pop("mask").numpy(), axis=1).astype(bool)
        np.testing.assert_array_equal(bits, expected)
        assert meta["hole_fractions"] == [round(float(expected.mean()), 4)]
        shapes = {kind: tuple(tensor.shape) for kind, tensor in tensors.items()}
        latents = (16, height // 8, width // 8)
        assert shapes == {"latents": latents, "masked_latents": latents, "t5": (32, 64), "pooled": (32,)}
        for kind, tensor in tensors.items():
            assert tensor.dtype == torch.bfloat16
            assert torch.isfinite(tensor).all(), kind
        assert not torch.equal(tensors["latents"], tensors["masked_latents"])
        seen.add(name)
        counts[split] += 1
    assert seen == {path.name for path in (triples / "target").glob("*.png")}
    assert counts == {"train": 48, "holdout": 48} == cache.manifest.samples["photographs"]


def test_constants_stand_beside_the_manifest(cache):
    empty = load_file(cache.folder / EMPTY_TEXT)
    assert (empty["t5"].shape, empty["pooled"].shape) == ((32, 64), (32,))
    for bucket in sorted(set(cache.table.bucket.tolist())):
        height, width = map(int, bucket.split("x"))
        blank = load_file(cache.folder / f"blank_{bucket}.safetensors")["masked_latents"]
        assert blank.shape == (16, height // 8, width // 8)
        assert torch.isfinite(blank).all()


def test_held_out_pictures_are_kept_for_validation(cache, triples):
    held_out = read_validation_items(cache.folder, split="holdout", count=100)
    trained = read_validation_items(cache.folder, split="train", count=100)
    assert (len(held_out), len(trained)) == (48, 48)
    for item, pixels in [*held_out[:5], *trained[:5]]:
        name = item.key.rsplit("-", 1)[0]
        for role, found in (("target", pixels.target), ("source", pixels.image)):
            with Image.open(triples / role / f"{name}.png") as picture:
                np.testing.assert_array_equal(found, np.asarray(picture))


def test_shards_say_nothing_of_the_machine_they_were_made_on(cache, triples, tiny_model):
    for data in shard_bytes(cache.folder).values():
        for secret in (triples.parent, tiny_model.parent, cache.folder.parent):
            assert str(secret).encode() not in data


def test_each_resolution_and_each_dataset_is_stored(make_pictures, config_of, tmp_path):
    folder = make_pictures(3)
    write_triple(tmp_path / "others", "wide", size=(96, 48), seed=50, hole=(40, 16, 60, 32))
    both = (
        f"data.datasets=[{{name: noise, target: {folder}/target, mask: {folder}/mask}}, "
        f"{{name: others, target: {tmp_path}/others/target, mask: {tmp_path}/others/mask, weight: 2}}]"
    )
    config = config_of(folder, both, "data.resolution=[32,48]", "data.resolution_policy=each")
    preprocess(config, QUIET)
    table = open_cache(config, Path(config.model.base)).table
    rows = sorted(zip(table.dataset.tolist(), table.bucket.tolist(), table.samples.tolist(), strict=True))
    assert rows == [("noise", "32x32", 3), ("noise", "48x48", 3), ("others", "32x32", 1), ("others", "32x64", 1)]


def test_a_second_run_touches_nothing(make_pictures, config_of):
    config = config_of(make_pictures(5), "data.holdout=2")
    preprocess(config, QUIET)
    before = stamps(config.data.cache)
    preprocess(config, QUIET)
    assert stamps(config.data.cache) == before


def test_only_the_shards_of_changed_pictures_are_written_anew(make_pictures, config_of):
    folder = make_pictures(40)
    config = config_of(folder)
    cache = config.data.cache
    preprocess(config, QUIET)
    assert len(stamps(cache, ".tar")) >= 3

    def shards_written(change):
        before = stamps(cache, ".tar")
        change()
        preprocess(config, QUIET)
        after = stamps(cache, ".tar")
        open_cache(config, Path(config.model.base))
        indexes = {name.replace("shards/", "index/").replace(".tar", ".index") for name in after}
        assert stamps(cache, ".index").keys() == indexes
        assert leftovers(cache) == []
        return sum(before.get(name) != stamp for name, stamp in after.items()), len(after)

    written, shards = shards_written(lambda: write_triple(folder, "picture-07", seed=7, hole=(0, 0, 5, 5)))
    assert written == 1 < shards
    written, shards = shards_written(lambda: write_triple(folder, "a-new-one", seed=100))
    assert 1 <= written <= 2 < shards
    written, shards = shards_written(lambda: (folder / "target" / "picture-09.txt").write_text("another caption"))
    assert 1 <= written <= 3
    written, shards = shards_written(lambda: [path.unlink() for path in folder.glob("*/picture-11.*")])
    assert written <= 1 < shards

    fresh = config_of(folder, cache="fresh")
    preprocess(fresh, QUIET)
    assert shard_bytes(cache) == shard_bytes(fresh.data.cache), "what was there before shows"
    assert read_manifest(cache) == read_manifest(fresh.data.cache)


@pytest.mark.parametrize("lost", ["tar", "index", "manifest", "table", "empty text", "blank", "validation", "picture"])
def test_what_is_lost_or_damaged_is_mended(make_pictures, config_of, lost):
    config = config_of(make_pictures(4), "data.holdout=1")
    cache = config.data.cache
    preprocess(config, QUIET)
    whole = {name: path.read_bytes() for name, path in files_below(cache).items()}
    (tar, *_) = sorted(cache.rglob("*.tar"))
    if lost in ("tar", "index"):
        (tar if lost == "tar" else index_of(tar)).unlink()
    elif lost in ("manifest", "table"):
        (cache / {"manifest": "manifest.json", "table": "shards.npz"}[lost]).write_text("<!DOCTYPE html>")
    elif lost == "validation":
        shutil.rmtree(cache / VALIDATION)
    else:
        name = {"empty text": EMPTY_TEXT, "blank": "blank_32x32.safetensors", "picture": f"{VALIDATION}/0000.mask.png"}[
            lost
        ]
        (cache / name).unlink()
    preprocess(config, QUIET)
    mended = {name: path.read_bytes() for name, path in files_below(cache).items()}
    mended.pop("shards.npz"), whole.pop("shards.npz")  # a zip holds the time of day
    assert mended == whole


def test_other_settings_make_every_shard_anew(make_pictures, config_of):
    folder = make_pictures(4)
    config = config_of(folder)
    preprocess(config, QUIET)
    before = stamps(config.data.cache, ".tar")
    longer = config_of(folder, "data.captions.text_length=64")
    preprocess(longer, QUIET)
    after = stamps(config.data.cache, ".tar")
    assert before.keys() == after.keys()
    assert not set(before.values()) & set(after.values())
    with pytest.raises(InputError, match="text_length is 512, the cache was made with 64"):
        open_cache(config, Path(config.model.base))
    assert load_file(config.data.cache / EMPTY_TEXT)["t5"].shape == (64, 64)


def test_text_of_int8_is_another_cache_and_says_so(make_pictures, config_of):
    folder = make_pictures(4)
    config = config_of(folder)
    preprocess(config, QUIET)
    before = shard_bytes(config.data.cache)
    int8 = config_of(folder, "data.encoders.t5_precision=int8")
    preprocess(int8, QUIET)
    after = shard_bytes(int8.data.cache)
    assert before.keys() == after.keys()
    assert not set(before.values()) & set(after.values())
    assert read_manifest(int8.data.cache).settings["data.encoders.t5_precision"] == "int8"
    with pytest.raises(InputError, match="t5_precision is 'auto', the cache was made with 'int8'"):
        open_cache(config, Path(config.model.base))


def test_large_pictures_go_through_the_vae_by_their_pixels_and_captions_by_their_number(
    make_pictures, config_of, monkeypatch
):
    """Else the encoders' first batch of 1024 px takes 20 GiB beside T5, and no card of 24 GB can preprocess."""
    config = config_of(make_pictures(3), "data.resolution=1024", "data.shard_size_mib=64")
    sizes: dict[str, list[int]] = {"pictures": [], "captions": []}

    def count_pictures(vae, batch):
        sizes["pictures"].append(len(batch.target))
        return encode_pixels(vae, batch)

    def count_captions(encoders, captions, **options):
        sizes["captions"].append(len(captions))
        return encode_captions(encoders, captions, **options)

    monkeypatch.setattr("data.preprocessing.encode_shards.encode_pixels", count_pictures)
    monkeypatch.setattr("data.preprocessing.encode_shards.encode_captions", count_captions)
    preprocess(config, QUIET)
    assert config.data.encode_batch_size == 8
    assert sizes == {"pictures": [2, 1], "captions": [3]}


def test_an_exception_leaves_no_part_and_no_manifest(make_pictures, config_of, monkeypatch):
    folder = make_pictures(6)
    config = config_of(folder, "data.encode_batch_size=2")
    cache = config.data.cache
    preprocess(config, QUIET)
    before = shard_bytes(cache)
    write_triple(folder, "picture-01", seed=1, hole=(0, 0, 5, 5))
    calls = []

    def fail_at_the_second(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("as of a broken GPU")
        return encode_pixels(*arguments)

    monkeypatch.setattr("data.preprocessing.encode_shards.encode_pixels", fail_at_the_second)
    with pytest.raises(RuntimeError, match="as of a broken GPU"):
        preprocess(config, QUIET)
    assert leftovers(cache) == []
    assert shard_bytes(cache) == before
    assert not (cache / "manifest.json").exists(), "it would speak of a cache that is being changed"
    preprocess(config, QUIET)
    assert open_cache(config, Path(config.model.base)).table.samples.sum() == 6
    assert shard_bytes(cache) != before


def test_what_a_killed_worker_had_half_written_is_removed(make_pictures, config_of):
    folder = make_pictures(4)
    config = config_of(folder, "data.holdout=1")
    cache = config.data.cache
    preprocess(config, QUIET)
    whole = files_below(cache).keys()
    write_triple(folder, "picture-01", seed=1, hole=(0, 0, 5, 5))
    for name in whole:
        if not name.startswith(f"{VALIDATION}/"):
            (cache / f"{name}.0123abcd.part").write_bytes(b"half")
    (cache / f"{VALIDATION}.part").mkdir()
    preprocess(config, QUIET)
    assert leftovers(cache) == []
    assert not (cache / f"{VALIDATION}.part").exists()


def test_what_a_worker_left_behind_the_end_of_the_others_is_removed_and_nothing_else_touched(make_pictures, config_of):
    """It woke when they were done, and died."""
    config = config_of(make_pictures(4))
    preprocess(config, QUIET)
    before = stamps(config.data.cache)
    for name in before:
        if "/" not in name or name.startswith(("shards/", "index/")):
            (config.data.cache / f"{name}.0123abcd.part").write_bytes(b"half")
    preprocess(config, QUIET)
    assert stamps(config.data.cache) == before
