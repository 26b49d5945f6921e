import random
from dataclasses import fields

import numpy as np
import pytest
import torch
from safetensors.torch import load

from configs.errors import InputError
from data.cache.shard_index import file_sha256, read_index, rebuild_index
from data.cache.shard_writer import ShardWriter
from data.samples.geometry import Bucket
from data.sources.triples import Triple
from tests.data.made_caches import index_of

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


def test_an_index_comes_back_as_it_was_written(shard):
    path, index, _, _ = shard
    assert_equal(read_index(index_of(path)), index)


def test_a_lost_index_is_rebuilt(shard):
    path, index, _, _ = shard
    index_of(path).unlink()
    assert_equal(rebuild_index(path, index_of(path), plan=index.plan, sha256=index.tar_sha256), index)
    assert_equal(read_index(index_of(path)), index)


def test_a_picture_called_text_is_no_text(tmp_path, make_sample, make_text):
    keys = [Triple("cats", name, tmp_path, tmp_path, None, "", "", "").key for name in ("text", "text-b")]
    path = tmp_path / "a.tar"
    with ShardWriter(path) as writer:
        writer.add_text("text-1", **make_text("text-1"))
        for key in keys:
            writer.add_sample(make_sample(key, BUCKET, text="text-1"))
        index = writer.finish(plan=PLAN)
    assert all(key.startswith("text-") for key in keys)
    assert_equal(rebuild_index(path, index_of(path), plan=PLAN, sha256=index.tar_sha256), index)


def test_an_index_that_cannot_be_written_is_rebuilt_all_the_same(shard, monkeypatch):
    path, index, _, _ = shard
    index_of(path).unlink()

    def refuse(*_):
        raise PermissionError(13, "Read-only file system")

    monkeypatch.setattr("data.cache.shard_index.write_index", refuse)
    assert_equal(rebuild_index(path, index_of(path), plan=index.plan, sha256=index.tar_sha256), index)
    assert not index_of(path).exists()


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
        rebuild_index(path, index_of(path), plan=PLAN, sha256=index.tar_sha256)


def test_a_missing_tar_is_named(shard):
    path, index, _, _ = shard
    path.unlink()
    with pytest.raises(InputError, match=r"48x64-000001.tar: missing shard"):
        rebuild_index(path, index_of(path), plan=PLAN, sha256=index.tar_sha256)


@pytest.mark.fault(6, "every bit of an index flipped")
def test_any_flipped_bit_in_an_index_is_noticed(shard):
    path, _, _, _ = shard
    whole = index_of(path).read_bytes()
    rng = random.Random(0)
    for place in range(rng.randrange(7), len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        index_of(path).write_bytes(damaged)
        with pytest.raises(InputError, match=r"48x64-000001.index: damaged index .* it is rebuilt from the shard"):
            read_index(index_of(path))


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html>", None])
def test_an_index_that_is_none_is_noticed(shard, content):
    path, _, _, _ = shard
    whole = index_of(path).read_bytes()
    index_of(path).write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(InputError, match="damaged index"):
        read_index(index_of(path))
    index_of(path).unlink()
    with pytest.raises(FileNotFoundError):
        read_index(index_of(path))
