import gc
import json
import random
import shutil
from dataclasses import fields

import numpy as np
import pytest
import torch
import webdataset
from safetensors.torch import load

from configs.errors import InputError
from data.cache.shard_writer import NotFinite, ShardWriter, file_sha256, read_index, rebuild_index
from data.cache_layout import index_path
from data.samples.geometry import Bucket
from data.sources.triples import Triple

BUCKET = Bucket(48, 64)
PLAN = "0123456789abcdef0123456789abcdef"


def assert_equal(first, second):
    for field in fields(first):
        one, two = getattr(first, field.name), getattr(second, field.name)
        if isinstance(one, np.ndarray):
            assert one.dtype == two.dtype, field.name
            np.testing.assert_array_equal(one, two, err_msg=field.name)
        else:
            assert one == two, field.name


@pytest.fixture(params=[1, 3], ids=["one variant", "three variants"])
def shard(request, tmp_path, write_shard):
    """(path, index, keys, variants) of a shard of five samples and two texts."""
    path = tmp_path / "shards" / "48x64-000001.tar"
    keys = [f"sample-{number}" for number in range(5)]
    return path, write_shard(path, BUCKET, keys, num_variants=request.param), keys, request.param


def test_webdataset_alone_reads_every_sample(shard, make_sample, make_text):
    path, _, keys, num_variants = shard
    found = {entry["__key__"]: entry for entry in webdataset.WebDataset(str(path), shardshuffle=False)}
    texts = ["text-0000000000000000", "text-0000000000000001"]
    assert set(found) == {*keys, *texts}
    for text in texts:
        stored = load(found[text]["safetensors"])
        assert stored.keys() == {"t5", "pooled"}
        for name, tensor in make_text(text).items():
            assert torch.equal(stored[name], tensor)
    for row, key in enumerate(keys):
        entry = found[key]
        expected = make_sample(key, BUCKET, text=texts[row % 2], num_variants=num_variants)
        variants = [f"m{number}.safetensors" for number in range(num_variants)]
        assert {name for name in entry if not name.startswith("__")} == {"json", "safetensors", *variants}
        latents = load(entry["safetensors"])
        assert latents.keys() == {"latents"}
        assert torch.equal(latents["latents"], expected.latents)
        for number, variant in enumerate(variants):
            stored = load(entry[variant])
            assert stored.keys() == {"masked_latents", "mask"}
            assert torch.equal(stored["masked_latents"], expected.masked_latents[number])
            bits = np.unpackbits(stored["mask"].numpy(), axis=1).astype(bool)
            np.testing.assert_array_equal(bits, expected.masks[number])
        meta = json.loads(entry["json"])
        assert (meta["text"], meta["tokens"]) == (expected.text, expected.tokens)
        assert meta["caption"] == expected.meta["caption"]
        assert meta["hole_fractions"] == [round(float(mask.mean()), 4) for mask in expected.masks]


def test_a_text_stands_ahead_of_its_first_sample(shard):
    path, _, _, _ = shard
    seen = set()
    for entry in webdataset.WebDataset(str(path), shardshuffle=False):
        if "json" in entry:
            assert json.loads(entry["json"])["text"] in seen
        seen.add(entry["__key__"])


def test_the_index_tells_where_everything_lies(shard, make_sample):
    path, index, keys, num_variants = shard
    data = path.read_bytes()

    def member(place):
        return load(data[place[0] : place[0] + place[1]])

    for row, key in enumerate(keys):
        expected = make_sample(key, BUCKET, text="", num_variants=num_variants)
        assert torch.equal(member(index.latents[row])["latents"], expected.latents)
        for variant in range(num_variants):
            assert torch.equal(member(index.masked[row, variant])["masked_latents"], expected.masked_latents[variant])
        assert index.tokens[row] == expected.tokens
        np.testing.assert_allclose(index.hole_fraction[row], [mask.mean() for mask in expected.masks], atol=1e-4)
    assert index.keys == tuple(keys)
    assert index.text_row.tolist() == [0, 1, 0, 1, 0]
    assert (index.tar_bytes, index.tar_sha256) == (len(data), file_sha256(path))


def test_a_shard_written_twice_has_the_same_bytes(shard, tmp_path, write_shard):
    path, _, keys, num_variants = shard
    again = tmp_path / "elsewhere" / path.name
    write_shard(again, BUCKET, keys, num_variants=num_variants)
    assert again.read_bytes() == path.read_bytes()
    assert index_path(again).read_bytes() == index_path(path).read_bytes()


def test_headers_of_one_kind_are_alike(shard):
    """What lets a reader check them by comparing bytes."""
    path, index, _, _ = shard
    data = path.read_bytes()
    for places in (index.latents, index.masked.reshape(-1, 2), index.texts):
        headers = set()
        for offset, _ in places.tolist():
            length = int.from_bytes(data[offset : offset + 8], "little")
            headers.add(data[offset : offset + 8 + length])
        assert len(headers) == 1
        assert b"__metadata__" not in headers.pop()


def test_an_index_comes_back_as_it_was_written(shard):
    path, index, _, _ = shard
    assert_equal(read_index(index_path(path)), index)


def test_a_lost_index_is_rebuilt(shard):
    path, index, _, _ = shard
    index_path(path).unlink()
    assert_equal(rebuild_index(path, plan=index.plan, sha256=index.tar_sha256), index)
    assert_equal(read_index(index_path(path)), index)


def test_a_picture_called_text_is_no_text(tmp_path, make_sample, make_text):
    keys = [Triple("cats", name, tmp_path, tmp_path, None, "", "", "").key for name in ("text", "text-b")]
    path = tmp_path / "a.tar"
    with ShardWriter(path) as writer:
        writer.add_text("text-1", **make_text("text-1"))
        for key in keys:
            writer.add_sample(make_sample(key, BUCKET, text="text-1"))
        index = writer.finish(plan=PLAN)
    assert all(key.startswith("text-") for key in keys)
    assert_equal(rebuild_index(path, plan=PLAN, sha256=index.tar_sha256), index)


def test_an_index_that_cannot_be_written_is_rebuilt_all_the_same(shard, monkeypatch):
    path, index, _, _ = shard
    index_path(path).unlink()

    def refuse(*_):
        raise PermissionError(13, "Read-only file system")

    monkeypatch.setattr("data.cache.shard_writer.write_index", refuse)
    assert_equal(rebuild_index(path, plan=index.plan, sha256=index.tar_sha256), index)
    assert not index_path(path).exists()


@pytest.mark.parametrize("damage", ["data", "header", "cut", "member boundary", "empty", "html"])
def test_a_damaged_tar_is_not_indexed(shard, damage):
    path, index, _, _ = shard
    data = bytearray(path.read_bytes())
    if damage == "data":
        data[int(index.latents[2, 0]) + 200] ^= 4
    elif damage == "header":
        data[int(index.latents[2, 0]) - 500] ^= 4
    elif damage == "cut":
        data = data[: len(data) // 2 + 77]
    elif damage == "member boundary":
        data = data[: int(index.latents[2, 0]) - 512]
    else:
        data = b"" if damage == "empty" else b"<!DOCTYPE html><title>404</title>"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"48x64-000001.tar: damaged shard \(sha256 .*run `fluxfill preprocess"):
        rebuild_index(path, plan=PLAN, sha256=index.tar_sha256)


def test_a_missing_tar_is_named(shard):
    path, index, _, _ = shard
    path.unlink()
    with pytest.raises(InputError, match=r"48x64-000001.tar: missing shard"):
        rebuild_index(path, plan=PLAN, sha256=index.tar_sha256)


def test_any_flipped_bit_in_an_index_is_noticed(shard):
    path, _, _, _ = shard
    whole = index_path(path).read_bytes()
    rng = random.Random(0)
    for place in range(rng.randrange(7), len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        index_path(path).write_bytes(damaged)
        with pytest.raises(InputError, match=r"48x64-000001.index: damaged index .* it is rebuilt from the shard"):
            read_index(index_path(path))


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html>", None])
def test_an_index_that_is_none_is_noticed(shard, content):
    path, _, _, _ = shard
    whole = index_path(path).read_bytes()
    index_path(path).write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(InputError, match="damaged index"):
        read_index(index_path(path))
    index_path(path).unlink()
    with pytest.raises(FileNotFoundError):
        read_index(index_path(path))


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_shard_that_is_not_finished_leaves_nothing(tmp_path, make_sample, make_text):
    path = tmp_path / "shards" / "a.tar"

    def stop_halfway():
        with ShardWriter(path) as writer:
            writer.add_text("text-1", **make_text("text-1"))
            writer.add_sample(make_sample("a", BUCKET, text="text-1"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_halfway()
    gc.collect()  # a tar that was not closed would write its end now
    assert list(path.parent.iterdir()) == []


def test_no_name_is_there_before_the_shard_is_whole(tmp_path, make_sample, make_text):
    path = tmp_path / "a.tar"
    with ShardWriter(path) as writer:
        writer.add_text("text-1", **make_text("text-1"))
        writer.add_sample(make_sample("a", BUCKET, text="text-1"))
        assert not path.exists()
        assert not index_path(path).exists()
        writer.finish(plan=PLAN)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.index", "a.tar"]


def test_an_index_never_stands_beside_a_tar_it_does_not_describe(tmp_path, write_shard, monkeypatch):
    """The new tar may have the old one's size: taken for finished, it would be read at its own checksums' peril."""
    path = tmp_path / "a.tar"
    old = write_shard(path, BUCKET, ["a", "b"])
    old_tar, old_index = path.read_bytes(), index_path(path).read_bytes()
    monkeypatch.setattr("data.cache.shard_writer.write_index", _die)
    with pytest.raises(_Died):
        write_shard(path, BUCKET, ["c", "d"])
    assert len(path.read_bytes()) == old.tar_bytes
    assert path.read_bytes() != old_tar
    assert not index_path(path).exists()

    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    path.write_bytes(old_tar)
    index_path(path).write_bytes(old_index)
    monkeypatch.setattr("pathlib.Path.replace", _die)
    with pytest.raises(_Died):
        write_shard(path, BUCKET, ["c", "d"])
    assert path.read_bytes() == old_tar
    assert not index_path(path).exists()


class _Died(BaseException):
    """As if the process had been killed at this place."""


def _die(*_):
    raise _Died


def test_a_text_of_8_bits_is_stored_with_its_scales_once(tmp_path, make_sample, make_text):
    text = make_text("text-1", "int8")
    with ShardWriter(tmp_path / "a.tar") as writer:
        writer.add_text("text-1", **text)
        writer.add_sample(make_sample("a", BUCKET, text="text-1"))
        writer.finish(plan=PLAN)
    first = next(iter(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)))
    stored = load(first["safetensors"])
    assert {name: tensor.dtype for name, tensor in stored.items()} == {
        "t5": torch.int8,
        "t5_scale": torch.float32,
        "pooled": torch.bfloat16,
    }
    assert all(torch.equal(tensor, text[name]) for name, tensor in stored.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", ["latents", "masked_latents", "t5", "pooled"])
def test_numbers_that_are_not_finite_are_refused(tmp_path, make_sample, make_text, tensor, value):
    text, sample = make_text("text-1"), make_sample("a", BUCKET, text="text-1")
    broken = {"latents": sample.latents, "masked_latents": sample.masked_latents[0]} | text
    broken[tensor].view(-1)[3] = value

    def write():
        with ShardWriter(tmp_path / "a.tar") as writer:
            writer.add_text("text-1", **text)
            writer.add_sample(sample)

    with pytest.raises(NotFinite, match=rf"a.tar: {tensor} of (a|text-1) holds NaN or infinity"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_name_too_long_for_a_tar_header_is_refused(tmp_path, make_text):
    with (
        ShardWriter(tmp_path / "a.tar") as writer,
        pytest.raises(ValueError, match="longer than the 100 bytes a tar header holds"),
    ):
        writer.add_text("text-" + "a" * 90, **make_text("any"))
