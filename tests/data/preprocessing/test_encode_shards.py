"""That the stages of encoding overlap, told by one waiting for another: without overlap it would wait in vain; and that
one which fails stops those behind it."""

import threading

import pytest
from rich.console import Console

import data.preprocessing.encode_shards
import data.preprocessing.write_shards
import data.samples.decode
from configs.errors import StorageFailed
from data.cache.manifest import read_shard_table
from data.encoders.load import Encoders
from data.preprocessing.run import preprocess
from tests.data.made_caches import stored_shards
from tests.patience import PATIENCE

QUIET = Console(quiet=True)


def test_the_next_pictures_are_decoded_while_a_batch_is_encoded(in_fours, shards_of_fours, monkeypatch):
    """Across the shards' borders too."""
    changed = threading.Condition()
    loaded, encoded, in_vain = [], [], []
    load_pixels, encode_pixels = data.samples.decode.load_pixels, data.preprocessing.encode_shards.encode_pixels

    def load(sample, settings):
        pixels = load_pixels(sample, settings)
        with changed:
            loaded.append(sample.key)
            changed.notify_all()
        return pixels

    def encode(vae, batch):
        with changed:
            encoded.append(len(batch.target))
            in_time = changed.wait_for(lambda: len(loaded) >= min(sum(encoded) + 4, 96), PATIENCE)
        if not in_time:
            in_vain.append(len(encoded))
        return encode_pixels(vae, batch)

    monkeypatch.setattr("data.samples.decode.load_pixels", load)
    monkeypatch.setattr("data.preprocessing.encode_shards.encode_pixels", encode)
    preprocess(in_fours, QUIET)
    assert in_vain == []
    assert sum(encoded) == 96
    assert stored_shards(in_fours.data.cache) == shards_of_fours
    assert len(shards_of_fours) > 3


def test_text_on_its_own_device_is_encoded_ahead_and_is_the_same(in_fours, shards_of_fours, monkeypatch):
    monkeypatch.setattr(Encoders, "text_has_its_own_device", True)
    threads, encode_captions = set(), data.preprocessing.encode_shards.encode_captions

    def encode(*arguments, **options):
        threads.add(threading.current_thread().name)
        return encode_captions(*arguments, **options)

    monkeypatch.setattr("data.preprocessing.encode_shards.encode_captions", encode)
    preprocess(in_fours, QUIET)
    assert threads == {"ahead"}
    assert stored_shards(in_fours.data.cache) == shards_of_fours
    assert read_shard_table(in_fours.data.cache).samples.sum() == 96


def test_storage_that_fails_ends_the_job_and_fails_no_shard(in_fours, shards_of_fours, monkeypatch):
    """Which would be made of its pictures as soon as the storage is back."""
    loaded, load_pixels = [], data.samples.decode.load_pixels

    def load(sample, settings):
        loaded.append(sample)
        if len(loaded) > 20:
            raise StorageFailed(f"{sample.triple.target}: the server is away")
        return load_pixels(sample, settings)

    with monkeypatch.context() as patch:
        patch.setattr("data.samples.decode.load_pixels", load)
        with pytest.raises(StorageFailed, match="the server is away"):
            preprocess(in_fours, QUIET)
    assert len(loaded) < 96
    assert not list(in_fours.data.cache.rglob("*.part"))
    preprocess(in_fours, QUIET)
    assert stored_shards(in_fours.data.cache) == shards_of_fours
