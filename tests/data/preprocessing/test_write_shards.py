"""That shards are written behind the device, and not at all once something failed."""

import errno
import os
import threading

import pytest
from rich.console import Console

import data.preprocessing.encode_shards
import data.preprocessing.write_shards
import data.samples.decode
from data.cache.shard_writer import ShardWriter
from data.preprocessing.run import preprocess
from tests.data.made_caches import stored_shards
from tests.patience import PATIENCE

QUIET = Console(quiet=True)


def test_a_shard_is_written_while_the_next_is_encoded(in_fours, shards_of_fours, monkeypatch):
    changed = threading.Condition()
    encoded, in_vain = [], []
    encode_pixels, finish = data.preprocessing.encode_shards.encode_pixels, ShardWriter.finish

    def encode(vae, batch):
        with changed:
            encoded.append(len(batch.target))
            changed.notify_all()
        return encode_pixels(vae, batch)

    def finish_late(writer, **options):
        with changed:
            so_far = len(encoded)
            if not changed.wait_for(lambda: len(encoded) > so_far or sum(encoded) == 96, PATIENCE):
                in_vain.append(so_far)
        return finish(writer, **options)

    monkeypatch.setattr("data.preprocessing.encode_shards.encode_pixels", encode)
    monkeypatch.setattr(ShardWriter, "finish", finish_late)
    preprocess(in_fours, QUIET)
    assert in_vain == []
    assert stored_shards(in_fours.data.cache) == shards_of_fours


@pytest.mark.parametrize("fails", ["add_text", "add_sample"])
def test_what_is_queued_behind_a_failed_write_finishes_no_shard(in_fours, shards_of_fours, monkeypatch, fails):
    """The write fails when all that follows it is in the queue, the shard's end too."""
    all_queued = threading.Event()
    queue_finish, write, writers = data.preprocessing.write_shards.ShardWriting.finish, getattr(ShardWriter, fails), []

    def queue_and_tell(writing, plan):
        queue_finish(writing, plan)
        all_queued.set()

    def fail_once(writer, *arguments, **options):
        writers.append(writer)
        if len(writers) == 1:
            assert all_queued.wait(PATIENCE)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return write(writer, *arguments, **options)

    monkeypatch.setattr(data.preprocessing.write_shards.ShardWriting, "finish", queue_and_tell)
    monkeypatch.setattr(ShardWriter, fails, fail_once)
    with pytest.raises(OSError, match="Input/output error"):
        preprocess(in_fours, QUIET)
    assert len(writers) == 1, "the thread went on"
    assert not writers[0].path.exists()
    assert not list(in_fours.data.cache.rglob("*.part"))

    preprocess(in_fours, QUIET)
    assert stored_shards(in_fours.data.cache) == shards_of_fours


def test_a_shard_of_fewer_samples_than_were_planned_is_not_published(in_fours, shards_of_fours, monkeypatch):
    """Whatever it was that lost one."""
    write_samples = data.preprocessing.write_shards._write_samples
    monkeypatch.setattr(
        "data.preprocessing.write_shards._write_samples",
        lambda shard, samples, *tensors: write_samples(shard, samples[1:], *tensors),
    )
    with pytest.raises(RuntimeError, match=r"shards/.*\.tar: \d+ of its \d+ samples were written"):
        preprocess(in_fours, QUIET)
    assert stored_shards(in_fours.data.cache) == {}
    monkeypatch.undo()
    preprocess(in_fours, QUIET)
    assert stored_shards(in_fours.data.cache) == shards_of_fours
