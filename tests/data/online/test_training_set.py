"""Online encoding beside the cache that preprocessing makes of the same pictures."""

import errno
import os
import shutil
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import data.online.batch_encoder as batch_encoder
import data.sources.picture_file as picture_files
from configs.errors import InputError, StorageFailed
from data.batches.order import Order
from data.batches.row_filler import ReplacedRow, RowPolicy
from data.batches.training_set import CachedTrainingSet
from data.cache.manifest import TRAIN
from data.cache.open_cache import open_cache
from data.cache.shard_writer import NotFinite
from data.encoders.encode import EncodedText, encode_captions, encode_pixels
from data.online.batch_encoder import CaptionTexts
from data.online.training_set import OnlineTrainingSet, encoder_device, plan_online
from data.preprocessing.run import preprocess
from data.preprocessing.worker import Worker
from data.storage.retry import ATTEMPTS
from tests.data.batches.streams import copy_of
from tests.data.online.online_streams import (
    CPU,
    QUIET,
    assert_same,
    near,
    open_online,
    open_stream,
    settings_of,
    take,
)


@pytest.fixture(scope="module")
def config(demo_config, tmp_path_factory):
    """That of the cache, with nothing in data.cache."""
    return demo_config(tmp_path_factory.mktemp("online") / "scan", "data.mode=online", "data.encode_batch_size=3")


@pytest.fixture(scope="module")
def online(config) -> OnlineTrainingSet:
    return open_online(config)


@pytest.fixture(scope="module")
def cached(cache) -> CachedTrainingSet:
    return CachedTrainingSet(cache)


# --- the same run as the cached one -----------------------------------------------------------------------------------


def test_the_plan_stands_for_the_caches_shards(online, cached):
    for name in ("path", "dataset", "bucket", "split", "samples", "plan"):
        assert getattr(online.table, name).tolist() == getattr(cached.table, name).tolist(), name
    assert len(online.table) > 4
    assert settings_of(online, 7) == settings_of(cached, 7), "a run may go on in the other mode"
    for name in ("settings", "encoders", "text_length", "text_width", "pooled_width", "mask_variants", "samples"):
        assert getattr(online.manifest, name) == getattr(cached.manifest, name), name


@pytest.mark.parametrize("rank, world_size, micro", [(0, 1, 2), (0, 1, 7), (1, 3, 1), (2, 3, 2)])
def test_a_stream_gives_what_the_caches_gives(online, cached, rank, world_size, micro):
    options = {"rank": rank, "world_size": world_size, "micro": micro}
    dropped = Counter()
    for one, other in zip(take(online, 9, **options), take(cached, 9, **options), strict=True):
        assert len(one) == len(other)
        for rows, expected in zip(one, other, strict=True):
            assert_same(rows, expected)
            dropped["mask"] += int((rows.mask == 255).flatten(1).all(dim=1).sum())
            dropped["padding"] += int((rows.weight == 0).sum())
    assert dropped["mask"], "no row lost its mask"
    assert (dropped["padding"] > 0) == (rank == 1), "7 rows are 2, 2 and 3"


def test_names_are_the_caches(online, cached):
    streams = [open_stream(samples) for samples in (online, cached)]
    for index in range(5):
        one, other = (stream.keys(stream.order.batch(index)) for stream in streams)
        assert one == other
    for stream in streams:
        stream.close()


@pytest.fixture(scope="module")
def few(demo_config, triples, tmp_path_factory):
    """Makes configs of 16 of the triples, one of them held out: `few(cache_folder, "key=value", ...)`."""
    folder = tmp_path_factory.mktemp("few")
    for role in ("target", "mask", "source"):
        (folder / role).mkdir()
        for path in sorted((triples / role).iterdir()):
            if int(path.stem.rsplit("-", 1)[-1]) % 6 == 0:
                shutil.copy(path, folder / role)
    folders = [f"data.datasets.0.{role}={folder / role}" for role in ("target", "mask", "source")]
    return lambda cache, *overrides: demo_config(cache, *folders, "data.holdout=1", *overrides)


def elsewhere(config, folder):
    """The same config with nothing in its cache: finished shards would be read."""
    return config.model_copy(update={"data": config.data.model_copy(update={"cache": folder / "empty"})})


def test_tensors_are_bit_equal_where_the_encoders_get_the_same_batches(few, tmp_path):
    config = few(tmp_path / "cache", "data.encode_batch_size=1", "data.captions.text_dtype=int8")
    preprocess(config, QUIET)
    cached = CachedTrainingSet(open_cache(config, Path(config.model.base)))
    for one, other in zip(take(open_online(elsewhere(config, tmp_path)), 4), take(cached, 4), strict=True):
        for rows, expected in zip(one, other, strict=True):
            assert rows.t5.dtype == torch.int8
            assert_same(rows, expected, exactly=True)


def test_variants_and_mirror_images_are_those_of_the_cache(few, tmp_path):
    masks = ["data.datasets.0.source=null", "data.datasets.0.flip=true"]
    masks += ["data.datasets.0.mask={random: {brush: 0.6, box: 0.4}, variants: 3}"]
    config = few(tmp_path / "cache", *masks)
    preprocess(config, QUIET)
    cached = CachedTrainingSet(open_cache(config, Path(config.model.base)))
    online = open_online(elsewhere(config, tmp_path))
    for choice in ("random", "cycle"):
        policy = RowPolicy(mask_choice=choice)
        for one, other in zip(take(online, 6, policy=policy), take(cached, 6, policy=policy), strict=True):
            for rows, expected in zip(one, other, strict=True):
                assert_same(rows, expected)


def test_watched_samples_are_those_of_the_cache(online, cached):
    for split, count in (("holdout", 10), ("train", 48)):
        one, other = (
            online.validation_samples(split=split, count=count),
            cached.validation_samples(split=split, count=count),
        )
        assert len(one) == len(other) == count
        for found, expected in zip(one, other, strict=True):
            assert (found.item, found.bucket) == (expected.item, expected.bucket)
            for part in ("target", "image", "mask"):
                np.testing.assert_array_equal(getattr(found.pixels, part), getattr(expected.pixels, part))
                assert getattr(found.pixels, part).flags.writeable, "torch would warn"
            assert found.tensors.keys() == expected.tensors.keys()
            assert torch.equal(found.tensors["mask"], expected.tensors["mask"])
            for name in ("latents", "masked_latents", "t5", "pooled"):
                assert near(found.tensors[name], expected.tensors[name]), name


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [1, 2])
def test_a_resumed_stream_is_bit_equal_to_an_undisturbed_one(online, micro):
    """Though it meets its captions in another order, and nothing was kept of them."""
    whole = take(online, 8, micro=micro)
    later = take(open_online(online._config), 3, micro=micro, start=5)
    for one, other in zip(whole[5:], later, strict=True):
        for rows, expected in zip(one, other, strict=True):
            assert_same(rows, expected, exactly=True)


def test_batches_that_are_not_read_to_their_end_are_passed_over(online):
    whole = take(online, 6, micro=1)
    stream = open_stream(online, micro=1)
    for index in range(5):
        rows = next(stream)
        if index % 2:
            assert_same(next(rows), whole[index][0], exactly=True)
    last = [copy_of(rows) for rows in next(stream)]
    for rows, expected in zip(last, whole[5], strict=True):
        assert_same(rows, expected, exactly=True)
    stream.close()


# --- what goes through the encoders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("micro, encoded", [(1, [3, 3, 1]), (2, [2, 2, 2, 1]), (7, [3, 3, 1])])
def test_pictures_are_encoded_in_batches_of_one_global_batch(online, monkeypatch, micro, encoded):
    """encode_batch_size is 3, a global batch has 7 rows: whole micro-batches together, a larger one in parts."""
    sizes = []

    def counted(vae, batch):
        sizes.append(len(batch.target))
        return encode_pixels(vae, batch)

    monkeypatch.setattr(batch_encoder, "encode_pixels", counted)
    take(online, 4, micro=micro, policy=RowPolicy())
    assert sizes[: 4 * len(encoded)] == 4 * encoded


def test_the_next_batch_is_encoded_while_one_is_in_use(online, monkeypatch):
    done = threading.Semaphore(0)

    def counted(vae, batch):
        encoded = encode_pixels(vae, batch)
        for _ in range(len(batch.target)):
            done.release()
        return encoded

    monkeypatch.setattr(batch_encoder, "encode_pixels", counted)
    stream = open_stream(online, size=3, micro=1, policy=RowPolicy())
    next(next(stream))
    for _ in range(6):  # its own three rows, and the three of the next one, though nobody has asked for them
        assert done.acquire(timeout=60)
    stream.close()


def test_a_caption_is_encoded_once_while_there_is_room(online, monkeypatch):
    seen = Counter()

    def counted(encoders, captions, *, text_length):
        seen.update(captions)
        return encode_captions(encoders, captions, text_length=text_length)

    monkeypatch.setattr(batch_encoder, "encode_captions", counted)
    texts = CaptionTexts(online._encoders.text, online._config.data.captions)
    one = texts.get("a cat").wait()
    for caption in ("a dog", "a cat", "a cow", "a cat"):
        texts.get(caption)
    assert seen == {"a cat": 1, "a dog": 1, "a cow": 1}
    monkeypatch.setattr(batch_encoder, "CAPTION_CACHE_BYTES", 2 * sum(tensor.nbytes for tensor in one.values()))
    texts.get("a hen")  # room for two: goes with what was not asked for longest
    texts.get("a cat")
    texts.get("a dog")
    assert seen == {"a cat": 1, "a dog": 2, "a cow": 1, "a hen": 1}
    assert len(texts._kept) <= 3


def test_dropped_captions_are_not_encoded(online, monkeypatch):
    captions = []

    def counted(encoders, given, *, text_length):
        captions.extend(given)
        return encode_captions(encoders, given, text_length=text_length)

    monkeypatch.setattr(batch_encoder, "encode_captions", counted)
    take(open_online(online._config), 2, policy=RowPolicy(caption_dropout=1.0))
    assert captions == []


def test_an_encoder_that_fails_is_told_with_the_sample(online, monkeypatch):
    def broken(vae, batch):
        encoded = encode_pixels(vae, batch)
        encoded.masked_latents[0, -1, 3, 0, 0] = float("nan")
        return encoded

    monkeypatch.setattr(batch_encoder, "encode_pixels", broken)
    with pytest.raises(NotFinite, match=r"the latents of .*\.png hold NaN or infinity\. Look at the model's files"):
        take(online, 1)

    def broken_text(encoders, captions, *, text_length) -> EncodedText:
        text = encode_captions(encoders, captions, text_length=text_length)
        text.t5[0, 2, 1] = float("inf")
        return text

    monkeypatch.setattr(batch_encoder, "encode_captions", broken_text)
    texts = CaptionTexts(online._encoders.text, online._config.data.captions)
    with pytest.raises(NotFinite, match=r"the text of 'a cat' holds NaN or infinity"):
        texts.get("a cat").wait()


def test_memory_that_runs_out_says_what_to_set(online, monkeypatch):
    def full(vae, batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(batch_encoder, "encode_pixels", full)
    with pytest.raises(InputError, match=r"no memory left to encode 2 pictures at once .*Lower data.encode_batch_size"):
        take(online, 1)


def test_an_error_stays_in_its_place_and_a_stream_closes_behind_it(online, monkeypatch):
    before = threading.active_count()
    calls = []

    def second_fails(vae, batch):
        calls.append(len(batch.target))
        if len(calls) == 2:
            raise RuntimeError("the second batch")
        return encode_pixels(vae, batch)

    monkeypatch.setattr(batch_encoder, "encode_pixels", second_fails)
    stream = open_stream(online, size=3, micro=3, policy=RowPolicy())
    assert len(list(next(stream))) == 1
    for _ in range(3):
        with pytest.raises(RuntimeError, match="the second batch"):
            list(next(stream))
    start = time.monotonic()
    stream.close()
    assert time.monotonic() - start < 30
    assert threading.active_count() <= before


# --- pictures that cannot be decoded ----------------------------------------------------------------------------------


@pytest.fixture
def damaged(demo_config, triples, tmp_path):
    """(samples, the files of two that train, destroyed after the plan was made)."""
    for role in ("target", "source", "mask"):
        shutil.copytree(triples / role, tmp_path / role)
    folders = [f"data.datasets.0.{role}={tmp_path / role}" for role in ("target", "source", "mask")]
    config = demo_config(tmp_path / "scan", "data.mode=online", "data.encode_batch_size=2", *folders)
    samples = open_online(config)
    shard = max((plan for plan in samples._plans if plan.split == TRAIN), key=lambda plan: len(plan.samples))
    assert len(shard.samples) > 3
    bad = [Path(str(sample.triple.target)) for sample in shard.samples[1:3]]
    bad[0].write_bytes(bad[0].read_bytes()[:200])
    bad[1].unlink()
    return samples, shard, bad


def test_a_picture_that_cannot_be_decoded_is_replaced_by_the_next_of_its_shard(damaged, cached, caplog):
    samples, shard, bad = damaged
    batches = 60 // 7
    stream = open_stream(samples, policy=RowPolicy(max_bad_samples=2))
    found = {}
    for _ in range(batches):
        for rows in next(stream):
            for place, position in enumerate(rows.position.tolist()):
                found[position] = rows.latents[place].clone()
    replaced = stream.replaced()
    stream.close()
    number = samples.table.path.tolist().index(shard.path)
    order = Order(
        samples.table.dataset,
        samples.table.bucket,
        np.where(samples.table.split == TRAIN, samples.table.samples, 0),
        settings_of(samples, 7),
    )
    expected = []
    good = samples._encoder.encode([shard.samples[3]], [load(samples, shard.samples[3])], with_text=[False]).wait()
    for index in range(batches):
        batch = order.batch(index)
        for place, (at, row) in enumerate(zip(batch.shards.tolist(), batch.rows.tolist(), strict=True)):
            if at == number and row in (1, 2):
                expected.append(ReplacedRow(batch.position + place, shard.path, row, 3))
                assert near(found[batch.position + place], good[0]["latents"])
    assert replaced == sorted(expected) and {row.row for row in replaced} == {1, 2}
    messages = [record.message for record in caplog.records]
    assert len(messages) == 2, "each is told once"
    assert all(any(str(path) in text for text in messages) for path in bad)


def load(samples, planned):
    from data.samples.decode import load_pixels

    return load_pixels(planned, samples._config.data)[0]


def test_more_of_them_than_allowed_stop_the_run_and_are_named(damaged):
    samples, shard, bad = damaged
    with pytest.raises(InputError, match=r"2 damaged sample\(s\), guard\.max_bad_samples is 1") as caught:
        take(samples, 12, policy=RowPolicy(max_bad_samples=1))
    assert any(str(path) in str(caught.value) for path in bad)
    assert f"{shard.path} row 1, {shard.path} row 2" in str(caught.value)


# --- storage that fails -----------------------------------------------------------------------------------------------


@pytest.fixture
def read_failing(monkeypatch):
    """Makes pictures fail to be read: `read_failing(times)` -> paths of the reads that failed, as many for each."""
    read = picture_files._read_local

    def start(times, code=errno.EIO):
        failed = []

        def fail(path, offset, size):
            if failed.count(path) < times:
                failed.append(path)
                raise OSError(code, os.strerror(code))
            return read(path, offset, size)

        monkeypatch.setattr(picture_files, "_read_local", fail)
        return failed

    return start


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_storage_that_fails_stops_the_stream_and_damages_nothing(online, read_failing, no_waits, code):
    failed = read_failing(10**6, code)
    stream = open_stream(online, policy=RowPolicy(max_bad_samples=10**6))
    wanted = rf"\.png: cannot be read \({os.strerror(code)}\): failed 8 time\(s\), .* Look at the storage"
    with pytest.raises(StorageFailed, match=wanted):
        next(next(stream))
    stream.close()
    assert stream.replaced() == []
    assert len(failed) < 4 * ATTEMPTS, "of the two threads' rows; the rest need not try"


def test_storage_that_comes_back_is_waited_for(online, read_failing, no_waits):
    expected = take(online, 2)
    failed = read_failing(3)
    for one, other in zip(take(online, 2), expected, strict=True):
        for rows, same in zip(one, other, strict=True):
            assert_same(rows, same, exactly=True)
    assert failed


def test_a_stream_closes_while_storage_is_waited_for(online, read_failing):
    failed = read_failing(10**6)
    stream = open_stream(online)
    stream._begin_ahead()
    while not failed:
        time.sleep(0.01)
    start = time.monotonic()
    stream.close()
    assert time.monotonic() - start < 30, "it would try for a minute and a half"


# --- devices ----------------------------------------------------------------------------------------------------------


def test_encoder_devices_are_dealt_to_a_machines_ranks(demo_config, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 6)
    given = ["data.mode=online", "data.encoder_devices=[cuda:4, cuda:5]"]
    config = demo_config(tmp_path, *given)
    own = torch.device("cuda:0")
    devices = [encoder_device(config, local_rank=rank, own=own) for rank in range(4)]
    assert [str(device) for device in devices] == ["cuda:4", "cuda:5", "cuda:4", "cuda:5"]
    alone = demo_config(tmp_path, "data.mode=online")
    assert encoder_device(alone, local_rank=3, own=torch.device("cuda:3")) == torch.device("cuda:3")
    one = demo_config(tmp_path, "data.mode=online", "data.encoder_devices=cuda:1")
    assert str(encoder_device(one, local_rank=0, own=own)) == "cuda:1"


def test_a_device_that_is_not_there_is_refused(demo_config, tmp_path, monkeypatch):
    config = demo_config(tmp_path, "data.mode=online", "data.encoder_devices=[cuda:1]")
    for count, there in ((0, "none"), (1, r"1 \(cuda:0\)")):
        monkeypatch.setattr("torch.cuda.device_count", lambda count=count: count)
        with pytest.raises(InputError, match=rf"data.encoder_devices names cuda:1, .* there are here: {there}\. Name"):
            encoder_device(config, local_rank=0, own=CPU)


def test_encoders_go_to_the_device_unless_they_have_one_of_their_own(demo_config, tmp_path, monkeypatch):
    placed = []
    monkeypatch.setattr(
        "data.online.training_set.load_encoders", lambda model, encoders, device_index: placed.append(encoders)
    )
    config = demo_config(tmp_path / "scan", "data.mode=online", "data.encoders.t5=cpu")
    model = Path(config.model.base)
    samples = OnlineTrainingSet(
        config, model, plan_online(config, model, QUIET), device=torch.device("cuda:1"), worker=Worker()
    )
    assert placed == [], "nothing is loaded before it is needed"
    assert samples._encoders is None
    assert (placed[0].vae, placed[0].clip, placed[0].t5) == ("cuda:1", "cuda:1", "cpu")


def test_devices_without_online_are_refused(demo_config, tmp_path):
    with pytest.raises(InputError, match=r"data.encoder_devices is .*with mode cached nothing is encoded"):
        demo_config(tmp_path, "data.encoder_devices=[cuda:1]")
    for wrong in ("[]", "[auto]", "[gpu1]"):
        with pytest.raises(InputError, match=r"data\.encoder_devices"):
            demo_config(tmp_path, "data.mode=online", f"data.encoder_devices={wrong}")
