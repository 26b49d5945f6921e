import errno
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import data.online.batch_encoder as batch_encoder
import data.sources.picture_file as picture_files
from configs.errors import InputError, StorageFailed
from data.batches.order import Order
from data.batches.row_filler import ReplacedRow, RowPolicy
from data.encoders.encode import encode_captions, encode_pixels
from data.samples.plan import TRAIN
from data.storage.retry import ATTEMPTS
from tests.data.batches.streams import copy_of
from tests.data.online.online_streams import (
    assert_same,
    near,
    open_online,
    open_stream,
    settings_of,
    take,
)
from tests.patience import PATIENCE


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
        assert done.acquire(timeout=PATIENCE)
    stream.close()


def test_dropped_captions_are_not_encoded(online, monkeypatch):
    captions = []

    def counted(encoders, given, *, text_length):
        captions.extend(given)
        return encode_captions(encoders, given, text_length=text_length)

    monkeypatch.setattr(batch_encoder, "encode_captions", counted)
    take(open_online(online._config), 2, policy=RowPolicy(caption_dropout=1.0))
    assert captions == []


def test_an_error_stays_in_its_place_and_a_stream_closes_behind_it(online, monkeypatch):
    before = set(threading.enumerate())
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
    stream.close()
    left = {thread.name for thread in set(threading.enumerate()) - before}
    assert left <= {"tqdm_monitor"}, "that of bars, once a process"


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


def test_a_stream_closes_while_storage_is_waited_for(online, read_failing, monkeypatch):
    monkeypatch.setattr("data.storage.retry.FIRST_WAIT_SECONDS", 100.0)
    monkeypatch.setattr("data.storage.retry.LONGEST_WAIT_SECONDS", 100.0)
    failed = read_failing(10**6)
    stream = open_stream(online)
    stream._begin_ahead()
    while not failed:
        time.sleep(0.01)
    stream.close()
    assert max(failed.count(path) for path in failed) < 3, "the wait behind a first try has ended, and no other began"
