import os
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from configs.errors import InputError
from data.batches.row_filler import RowPolicy
from data.batches.shard_reader import DamagedSample, DamagedShard, ShardReader
from data.cache.shard_writer import ShardWriter
from data.samples.geometry import Bucket
from tests.data import made_caches
from tests.data.batches.streams import copy_of, open_stream, open_tars
from tests.data.made_caches import index_of, make_sample

ONE_SHARD = [("a", "48x64", 5)]


@pytest.fixture
def one_shard(make_cache):
    """(cache, path, index) of a single shard of five samples, two texts and two variants."""
    cache = make_cache(ONE_SHARD, num_variants=2)
    path = cache.folder / str(cache.table.path[0])
    return cache, path, ShardReader(cache).shard(0).index


def read_everything(cache):
    """Every member of the first shard, as bytes. Raises what the reader raises."""
    reader, manifest = ShardReader(cache), cache.manifest
    bucket = Bucket.parse(str(cache.table.bucket[0]))
    h, w = bucket.latent_size
    sizes = {
        "latents": 16 * h * w * 2,
        "masked_latents": 16 * h * w * 2,
        "mask": bucket.height * bucket.width // 8,
        "t5": manifest.text_length * manifest.text_width * 2,
        "pooled": manifest.pooled_width * 2,
    }
    out = {name: memoryview(bytearray(size)) for name, size in sizes.items()}
    found = []
    for row in range(int(cache.table.samples[0])):
        for variant in range(reader.num_variants(0)):
            reader.read(0, row, out, variant=variant)
            found += [bytes(value) for value in out.values()]
    return found


@pytest.mark.fault(6, "a bit flipped anywhere in a shard, while training")
def test_a_flipped_bit_in_a_shard_is_named_or_changes_nothing(one_shard):
    """Tar headers are not read: WebDataset's reader takes a bad one for the end, this one loses nothing by it."""
    cache, path, index = one_shard
    whole, expected = path.read_bytes(), read_everything(cache)
    data = np.zeros(len(whole), bool)
    for offset, size in [*index.latents.tolist(), *index.masked.reshape(-1, 2).tolist(), *index.texts.tolist()]:
        data[offset : offset + size] = True
    for place in range(3, len(whole), 61):
        damaged = bytearray(whole)
        damaged[place] ^= 32
        path.write_bytes(damaged)
        if data[place]:
            with pytest.raises(DamagedShard, match=r"48x64-000000\.tar: (first|the text of a-0-\d|a-0-\d).*Delete the"):
                read_everything(cache)
        else:
            assert read_everything(cache) == expected


@pytest.mark.fault(5, "cut behind any byte, after the run has opened it")
@pytest.mark.parametrize("where", ["data", "header", "member boundary", "sample boundary", "empty", "last byte"])
def test_a_cut_shard_is_named(one_shard, where):
    cache, path, index = one_shard
    member = int(index.latents[2, 0])
    size = {
        "data": member + 300,
        "header": member - 200,
        "member boundary": int(index.masked[2, 0, 0]) - 512,
        "sample boundary": member - 512,
        "empty": 0,
        "last byte": int(cache.table.bytes[0]) - 1,
    }[where]
    os.truncate(path, size)
    with pytest.raises(
        DamagedShard, match=rf"48x64-000000\.tar: {size} bytes, the manifest says {cache.table.bytes[0]}"
    ):
        read_everything(cache)


@pytest.mark.fault(6, "a part of a shard overwritten with zeros")
@pytest.mark.parametrize("what", ["tar header", "tensor", "safetensors header", "from a tensor to the next sample"])
def test_zeros_over_a_part_of_a_shard_are_named_or_change_nothing(one_shard, what):
    """A sector that was lost. WebDataset ends a shard early at a tar header of zeros, without a word."""
    cache, path, index = one_shard
    expected, member = read_everything(cache), int(index.latents[2, 0])
    start, end = {
        "tar header": (member - 512, member),
        "tensor": (member + 200, member + 712),
        "safetensors header": (member, member + 60),
        "from a tensor to the next sample": (member + 300, int(index.latents[3, 0])),
    }[what]
    data = bytearray(path.read_bytes())
    data[start:end] = bytes(end - start)
    path.write_bytes(data)
    if what == "tar header":
        assert read_everything(cache) == expected
    else:
        with pytest.raises(DamagedSample, match=r"48x64-000000\.tar: a-0-2 \(latents, .* does not match its checksum"):
            read_everything(cache)


def test_the_first_members_damage_is_that_members_alone(one_shard):
    """Its header tells the reader how the shard's members look; the next ones tell it too."""
    cache, path, index = one_shard
    data = bytearray(path.read_bytes())
    for place in (index.latents[0, 0], index.masked[0, 0, 0], index.texts[0, 0]):
        data[int(place) + 3] ^= 255
    path.write_bytes(data)
    reader, out = ShardReader(cache), {"latents": memoryview(bytearray(16 * 6 * 8 * 2))}
    reader.read(0, 1, out)
    with pytest.raises(DamagedSample, match="a-0-0"):
        reader.read(0, 0, out)


@pytest.mark.fault(5, "cut while it is read")
def test_a_shard_that_is_cut_while_it_is_read_is_named(one_shard):
    cache, path, index = one_shard
    reader = ShardReader(cache)
    out = np.empty(16 * 6 * 8 * 2, np.uint8)
    reader.read(0, 0, {"latents": memoryview(out)})
    os.truncate(path, int(index.latents[3, 0]) + 100)
    reader.read(0, 2, {"latents": memoryview(out)})
    for row in (3, 4):
        with pytest.raises(DamagedShard, match=rf"a-0-{row} \(latents, \d+ bytes at \d+\): the file ends there"):
            reader.read(0, row, {"latents": memoryview(out)})


def test_a_page_in_the_place_of_a_shard_is_named(one_shard):
    cache, path, _ = one_shard
    page = b"<!DOCTYPE html><title>404</title>"
    path.write_bytes(page)
    with pytest.raises(DamagedShard, match=rf"{len(page)} bytes, the manifest says"):
        read_everything(cache)
    path.write_bytes(page + b" " * (int(cache.table.bytes[0]) - len(page)))
    with pytest.raises(DamagedShard, match=r"first latents member: no safetensors header"):
        read_everything(cache)


@pytest.mark.fault(7, "removed while the run goes on")
def test_a_missing_shard_is_waited_for_and_then_named(one_shard, no_waits, caplog):
    cache, path, _ = one_shard
    path.rename(path.with_suffix(".gone"))
    with pytest.raises(InputError, match=r"48x64-000000\.tar: cannot be opened \(No such file.*failed 8 time\(s\)"):
        read_everything(cache)
    assert sum("attempt" in record.message for record in caplog.records) == 7


@pytest.mark.fault(8, "reads that fail a few times")
@pytest.mark.parametrize("call", ["open", "preadv"])
def test_a_storage_that_fails_for_a_while_costs_time_alone(one_shard, no_waits, monkeypatch, call):
    cache, path, _ = one_shard
    expected = read_everything(cache)
    works, failures = getattr(os, call), [OSError(5, "Input/output error"), OSError(116, "Stale file handle")] * 3

    def fail_at_first(target, *arguments):
        if failures and (call == "preadv" or target == path):
            raise failures.pop()
        return works(target, *arguments)

    monkeypatch.setattr(f"os.{call}", fail_at_first)
    assert read_everything(cache) == expected
    assert not failures


def test_a_stale_handle_is_opened_anew(one_shard, no_waits, monkeypatch):
    cache, _, _ = one_shard
    reader = ShardReader(cache)
    stale, works = int(reader.shard(0).handle), os.preadv

    def fail_if_stale(handle, *arguments):
        if int(handle) == stale:
            raise OSError(116, "Stale file handle")
        return works(handle, *arguments)

    kept = os.dup(stale)  # the number is not given out again
    opened = reader.shard(0)
    monkeypatch.setattr("os.preadv", fail_if_stale)
    reader.read(0, 1, {"latents": memoryview(bytearray(16 * 6 * 8 * 2))})
    assert int(opened.handle) == stale
    os.close(kept)


@pytest.mark.fault(8, "reads that keep failing")
def test_a_disk_that_keeps_failing_is_named(one_shard, no_waits, monkeypatch):
    cache, _, _ = one_shard
    reader = ShardReader(cache)
    reader.shard(0)

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.preadv", fail)
    with pytest.raises(InputError, match=r"48x64-000000\.tar: a-0-1 cannot be read \(Input/output error\): failed 8"):
        reader.read(0, 1, {"latents": memoryview(bytearray(16 * 6 * 8 * 2))})


def test_members_side_by_side_are_read_by_one_call(one_shard, monkeypatch):
    cache, _, _ = one_shard
    reader, calls, works = ShardReader(cache), [], os.preadv
    sizes = {"latents": 1536, "masked_latents": 1536, "mask": 384}
    out = {name: memoryview(bytearray(size)) for name, size in sizes.items()}
    monkeypatch.setattr("data.batches.shard_reader._MAX_GAP", 1024)  # these members are small
    monkeypatch.setattr("os.preadv", lambda *arguments: calls.append(None) or works(*arguments))
    reader.read(0, 2, out, variant=0)
    assert len(calls) == 1
    reader.read(0, 2, out, variant=1)
    assert len(calls) == 3, "the first variant lies between"


def test_short_reads_are_finished(one_shard, monkeypatch):
    """Network filesystems may answer with less than was asked for."""
    cache, _, _ = one_shard
    expected = read_everything(cache)
    preadv, pread = os.preadv, os.pread
    monkeypatch.setattr("os.preadv", lambda handle, parts, offset: preadv(handle, [parts[0][:1]], offset))
    monkeypatch.setattr("os.pread", lambda handle, size, offset: pread(handle, min(size, 1000), offset))
    assert read_everything(cache) == expected


def test_a_lost_index_is_rebuilt_on_the_way(one_shard):
    cache, path, _ = one_shard
    expected = read_everything(cache)
    index_of(path).unlink()
    assert read_everything(cache) == expected
    assert index_of(path).is_file()


def test_a_damaged_index_is_named(one_shard):
    cache, path, _ = one_shard
    whole = index_of(path).read_bytes()
    damaged = bytearray(whole)
    damaged[-20] ^= 1
    index_of(path).write_bytes(damaged)
    with pytest.raises(Exception, match=r"48x64-000000\.index: damaged index .*Delete it: it is rebuilt"):
        read_everything(cache)


def test_another_shards_index_is_named(make_cache):
    cache = make_cache([("a", "32x32", 2), ("a", "32x32", 2)])
    first, second = (index_of(cache.folder / str(path)) for path in cache.table.path)
    first.write_bytes(second.read_bytes())
    with pytest.raises(DamagedShard, match=r"32x32-000000\.index: belongs to another shard. Delete it"):
        read_everything(cache)


def test_a_lost_index_of_a_damaged_shard_is_not_rebuilt(one_shard):
    cache, path, index = one_shard
    index_of(path).unlink()
    data = bytearray(path.read_bytes())
    data[int(index.latents[2, 0]) - 500] ^= 4  # a tar header: tarfile would end there
    path.write_bytes(data)
    with pytest.raises(Exception, match=r"48x64-000000\.tar: damaged shard \(sha256"):
        read_everything(cache)


def test_tensors_of_another_size_are_named(one_shard):
    cache, _, _ = one_shard
    other = replace(cache, table=replace(cache.table, bucket=np.array(["64x48"])))
    with pytest.raises(DamagedShard, match=r"first latents member: holds .*\[16, 6, 8\].* ask for .*\[16, 8, 6\]"):
        read_everything(other)
    longer = replace(cache, manifest=replace(cache.manifest, text_length=9))
    with pytest.raises(DamagedShard, match=r"first text member: holds .* ask for .*\[9, 6\]"):
        read_everything(longer)


def test_few_shards_stay_open(make_cache, make_sample, monkeypatch):
    monkeypatch.setattr("data.batches.shard_reader._OPEN_SHARDS", 2)
    cache = make_cache([("a", "32x32", 2)] * 12)
    reader = ShardReader(cache)
    wrong = []

    def read_all(shift):
        out = np.empty(16 * 4 * 4 * 2, np.uint8)
        for turn in range(60):
            shard, row = (turn * 5 + shift) % 12, turn % 2
            reader.read(shard, row, {"latents": memoryview(out)})
            stored = make_sample(f"a-{shard}-{row}", Bucket(32, 32), text="").latents
            if out.tobytes() != stored.contiguous().view(torch.uint8).numpy().tobytes():
                wrong.append((shard, row))

    threads = [threading.Thread(target=read_all, args=(shift,)) for shift in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(open_tars(cache)) <= 2
    reader.close()
    assert open_tars(cache) == []


@pytest.mark.fault(14, "NaN and infinity in cached latents")
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["latents", "masked_latents"])
def test_latents_that_are_not_finite_are_a_damaged_sample(make_cache, monkeypatch, part, number):
    """With a checksum that agrees, as of a writer that did not look; ours does."""

    def make_bad_sample(key, *given, **options):
        sample = make_sample(key, *given, **options)
        if key == "a-0-1":
            (sample.latents if part == "latents" else sample.masked_latents[0]).view(-1)[-1] = number
        return sample

    monkeypatch.setattr(made_caches, "make_sample", make_bad_sample)
    monkeypatch.setattr(ShardWriter, "_refuse_non_finite", lambda *_, **__: None)
    cache = make_cache(ONE_SHARD)
    kind = {"latents": "latents", "masked_latents": "masked"}[part]
    with pytest.raises(DamagedSample, match=rf"a-0-1 \({kind}, .*: {part} are not finite numbers\. Delete the shard"):
        read_everything(cache)
    stream = open_stream(cache, size=5, policy=RowPolicy(max_bad_samples=1))
    batch = [copy_of(rows) for rows in next(stream)]
    assert [(row.row, row.replacement) for row in stream.replaced()] == [(1, 2)]
    assert all(torch.isfinite(rows.latents).all() and torch.isfinite(rows.masked_latents).all() for rows in batch)
    stream.close()


def test_the_largest_finite_latents_are_read(make_cache, monkeypatch):
    largest = torch.finfo(torch.bfloat16)

    def make_extreme_sample(key, *given, **options):
        sample = make_sample(key, *given, **options)
        sample.latents.view(-1)[:4] = torch.tensor([largest.max, largest.min, -0.0, largest.tiny])
        return sample

    monkeypatch.setattr(made_caches, "make_sample", make_extreme_sample)
    assert len(read_everything(make_cache(ONE_SHARD))) == 5 * 5
