import gc
import json
import shutil

import numpy as np
import pytest
import torch
import webdataset
from safetensors.torch import load, save

from data.cache.members import NO_TEXT
from data.cache.shard_writer import ShardWriter
from data.encoders.encode import NotFinite
from data.samples.geometry import Bucket
from tests.data.made_caches import index_of

BUCKET = Bucket(48, 64)


PLAN = "0123456789abcdef0123456789abcdef"


def test_webdataset_alone_reads_every_sample(shard, make_sample, make_text):
    path, _, keys, num_variants = shard
    found = {entry["__key__"]: entry for entry in webdataset.WebDataset(str(path), shardshuffle=False)}
    texts = ["text-0000000000000000", "text-0000000000000001"]
    assert list(found) == keys
    for key, text in zip(keys, texts, strict=False):  # the first that has it
        stored = load(found[key]["text.safetensors"])
        assert stored.keys() == {"t5", "pooled"}
        for name, tensor in make_text(text).items():
            assert torch.equal(stored[name], tensor)
    assert all(load(found[key]["text.safetensors"]) == {} for key in keys[2:])
    for row, key in enumerate(keys):
        entry = found[key]
        expected = make_sample(key, BUCKET, text=texts[row % 2], num_variants=num_variants)
        variants = [f"m{number}.safetensors" for number in range(num_variants)]
        assert {name for name in entry if not name.startswith("__")} == {
            "json",
            "safetensors",
            "text.safetensors",
            *variants,
        }
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


@pytest.mark.parametrize("num_samples", [1, 2, 5])
def test_every_sample_has_the_same_members(tmp_path, write_shard, num_samples):
    """Other programs take those of the first few for everyone's, and one that lacks some for damage."""
    write_shard(tmp_path / "a.tar", BUCKET, [str(number) for number in range(num_samples)])
    samples = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    assert len(samples) == num_samples
    assert {tuple(sample) for sample in samples} == {tuple(samples[0])}


def test_the_empty_text_is_a_safetensors_file_of_nothing():
    assert load(NO_TEXT) == {} and save({}) == NO_TEXT


def test_a_shard_written_twice_has_the_same_bytes(shard, tmp_path, write_shard):
    path, _, keys, num_variants = shard
    again = tmp_path / "elsewhere" / path.name
    write_shard(again, BUCKET, keys, num_variants=num_variants)
    assert again.read_bytes() == path.read_bytes()
    assert index_of(again).read_bytes() == index_of(path).read_bytes()


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
        assert not index_of(path).exists()
        writer.finish(plan=PLAN)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.index", "a.tar"]


def test_an_index_never_stands_beside_a_tar_it_does_not_describe(tmp_path, write_shard, monkeypatch):
    """The new tar may have the old one's size: taken for finished, it would be read at its own checksums' peril."""
    path = tmp_path / "a.tar"
    old = write_shard(path, BUCKET, ["a", "b"])
    old_tar, old_index = path.read_bytes(), index_of(path).read_bytes()
    monkeypatch.setattr("data.cache.shard_writer.write_index", _die)
    with pytest.raises(_Died):
        write_shard(path, BUCKET, ["c", "d"])
    assert len(path.read_bytes()) == old.tar_bytes
    assert path.read_bytes() != old_tar
    assert not index_of(path).exists()

    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    path.write_bytes(old_tar)
    index_of(path).write_bytes(old_index)
    monkeypatch.setattr("pathlib.Path.replace", _die)
    with pytest.raises(_Died):
        write_shard(path, BUCKET, ["c", "d"])
    assert path.read_bytes() == old_tar
    assert not index_of(path).exists()


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
    stored = load(first["text.safetensors"])
    assert {name: tensor.dtype for name, tensor in stored.items()} == {
        "t5": torch.int8,
        "t5_scale": torch.float32,
        "pooled": torch.bfloat16,
    }
    assert all(torch.equal(tensor, text[name]) for name, tensor in stored.items())


@pytest.mark.fault(14, "NaN and infinity in latents and texts that are to be stored")
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


def test_a_name_too_long_for_a_tar_header_is_refused(tmp_path, make_sample, make_text):
    with ShardWriter(tmp_path / "a.tar") as writer:
        writer.add_text("text-1", **make_text("text-1"))
        with pytest.raises(ValueError, match="longer than the 100 bytes a tar header holds"):
            writer.add_sample(make_sample("a" * 90, BUCKET, text="text-1"))
