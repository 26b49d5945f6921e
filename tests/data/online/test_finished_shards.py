"""An online run over a cache in the making: rows of finished shards are read, the others encoded."""

import shutil
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

import data.online.finished_shards
from configs.errors import InputError
from data.batches.row_filler import RowPolicy
from data.batches.training_set import CachedTrainingSet
from data.cache.open_cache import Cache, open_cache
from data.cache_layout import index_path
from data.online.batch_encoder import BatchEncoder
from data.preprocessing.run import preprocess
from data.samples.plan import TRAIN
from tests.data.batches.streams import copy_of
from tests.data.online.online_streams import QUIET, assert_same, open_online, open_stream, plan_of, take

EPOCH = 7  # batches of 7 of the 48 samples that train, and a few of the next epoch


@pytest.fixture(scope="module")
def config_of(demo_config, triples, tmp_path_factory):
    """Makes a config: `config_of(cache, "key=value", ...)`, of the demo's triples, a caption each. Texts
    take 64 KiB each, so 16 samples fill a shard."""
    pictures = tmp_path_factory.mktemp("own-captions") / "pictures"
    shutil.copytree(triples, pictures)
    for number, path in enumerate(sorted((pictures / "target").glob("*.txt"))):
        path.write_text(f"photograph number {number}")
    folders = [f"data.datasets.0.{role}={pictures / role}" for role in ("target", "source", "mask")]
    return lambda cache, *overrides: demo_config(cache, *folders, "data.captions.text_length=512", *overrides)


@pytest.fixture(scope="module")
def cache(config_of, tmp_path_factory) -> Cache:
    """What preprocessing makes of it. Read only."""
    config = config_of(tmp_path_factory.mktemp("preprocessed") / "cache")
    preprocess(config, QUIET)
    return open_cache(config, Path(config.model.base))


@pytest.fixture
def config(config_of, tmp_path):
    """The cache's, for an online run over another folder."""
    return config_of(tmp_path / "cache", "data.mode=online")


@pytest.fixture
def finished(config, cache):
    """The config over a copy of the finished cache."""
    shutil.copytree(cache.folder, config.data.cache)
    return config


@pytest.fixture
def encoded(monkeypatch) -> Counter:
    """How often each sample went through the encoders, by key."""
    counts: Counter = Counter()
    encode = BatchEncoder.encode

    def counted(encoder, samples, *arguments, **options):
        counts.update(sample.key for sample in samples)
        return encode(encoder, samples, *arguments, **options)

    monkeypatch.setattr(BatchEncoder, "encode", counted)
    return counts


def train(stream, num_batches):
    return [[copy_of(rows) for rows in next(stream)] for _ in range(num_batches)]


def assert_same_batches(batches, expected, **options) -> None:
    for one, other in zip(batches, expected, strict=True):
        for rows, same in zip(one, other, strict=True):
            assert_same(rows, same, **options)


def keys_of(stream, num_batches) -> set[str]:
    """Of the samples in its first batches."""
    return {key for index in range(num_batches) for key in stream.keys(stream.order.batch(index))}


def delete(cache: Path, shard: str) -> None:
    (cache / shard).unlink()
    index_path(cache / shard).unlink()


def test_a_run_reads_half_of_the_shards_and_encodes_the_other_half(finished, cache, encoded):
    """As from a preprocessing job that was stopped in the middle: no manifest."""
    planned = [shard for shard in plan_of(finished) if shard.split == TRAIN]
    (finished.data.cache / "manifest.json").unlink()
    missing = planned[::2]
    for shard in missing:
        delete(finished.data.cache, shard.path)
    with closing(open_stream(open_online(finished))) as stream:
        batches, keys = train(stream, EPOCH), keys_of(stream, EPOCH)
    assert_same_batches(batches, take(CachedTrainingSet(cache), EPOCH))
    to_encode = {sample.key for shard in missing for sample in shard.samples}
    assert keys & to_encode <= encoded.keys() <= to_encode
    assert keys & to_encode and keys - to_encode


KINDS = {
    "as it comes": [],
    "variants, int8": [
        "data.datasets.0.source=null",
        "data.datasets.0.mask={random: {brush: 0.6, box: 0.4}, variants: 2}",
        "data.captions.text_dtype=int8",
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_over_a_finished_cache_nothing_is_encoded_and_rows_are_the_cached_runs(config_of, tmp_path, encoded, kind):
    """With dropped captions and masks, and whichever of the masks."""
    config = config_of(tmp_path / "cache", "data.mode=online", "data.captions.text_length=32", *KINDS[kind])
    preprocess(config, QUIET)
    batches = take(open_online(config), EPOCH)
    assert encoded == {}
    cached = CachedTrainingSet(open_cache(config, Path(config.model.base)))
    assert_same_batches(batches, take(cached, EPOCH), exactly=True)


def test_shards_that_a_job_finishes_beside_the_run_are_read(config, cache, encoded, monkeypatch):
    monkeypatch.setattr(data.online.finished_shards, "LOOK_SECONDS", 0.0)
    with closing(open_stream(open_online(config))) as stream:
        batches = train(stream, 1)
        assert encoded
        preprocess(config, QUIET)
        batches += train(stream, 3)  # these were begun before
        encoded.clear()
        batches += train(stream, EPOCH)
        assert encoded == {}
    assert_same_batches(batches, take(CachedTrainingSet(cache), 4 + EPOCH))


def test_shards_of_another_plan_are_not_read(config_of, config, cache, encoded):
    """Made of other captions, at the same paths."""
    preprocess(config_of(config.data.cache, "data.captions.trigger=a photograph"), QUIET)
    with closing(open_stream(open_online(config))) as stream:
        batches, keys = train(stream, EPOCH), keys_of(stream, EPOCH)
    assert_same_batches(batches, take(CachedTrainingSet(cache), EPOCH))
    assert keys <= encoded.keys()


def largest(config):
    return max((shard for shard in plan_of(config) if shard.split == TRAIN), key=lambda shard: shard.num_samples)


def test_a_damaged_shard_is_told_once_and_its_samples_encoded(finished, cache, encoded, caplog):
    shard = largest(finished)
    tar = bytearray((finished.data.cache / shard.path).read_bytes())
    tar[len(tar) // 2] ^= 1
    (finished.data.cache / shard.path).write_bytes(tar)
    with closing(open_stream(open_online(finished), policy=RowPolicy())) as stream:
        batches = train(stream, 2 * EPOCH)
        assert stream.replaced() == []
    assert encoded and encoded.keys() <= {sample.key for sample in shard.samples}
    assert sum("does not match its checksum" in record.message for record in caplog.records) == 1
    assert_same_batches(batches, take(CachedTrainingSet(cache), 2 * EPOCH, policy=RowPolicy()))


def test_a_shard_that_is_deleted_on_the_way_is_encoded(finished, encoded, no_waits, monkeypatch):
    """As by a `fluxfill preprocess` that has made another plan since."""
    monkeypatch.setattr("data.batches.shard_reader._OPEN_SHARDS", 0)  # none stays open
    with closing(open_stream(open_online(finished), policy=RowPolicy())) as stream:
        train(stream, EPOCH)
        assert encoded == {}
        delete(finished.data.cache, largest(finished).path)
        train(stream, 2 * EPOCH)
        assert stream.replaced() == []
    assert encoded


def test_a_shard_that_is_not_there_is_looked_for_now_and_then(config, monkeypatch):
    looks: Counter = Counter()
    read_finished = data.online.finished_shards.read_finished

    def counted(cache, plan):
        looks[plan.path] += 1
        return read_finished(cache, plan)

    monkeypatch.setattr(data.online.finished_shards, "read_finished", counted)
    monkeypatch.setattr(data.online.finished_shards, "LOOK_SECONDS", 3600.0)
    take(open_online(config), 2 * EPOCH, policy=RowPolicy())
    assert len(looks) > 3 and set(looks.values()) == {1}


def test_a_config_with_the_key_of_earlier_versions_is_told_what_took_its_place(demo_config, tmp_path):
    with pytest.raises(InputError, match=r"data\.write_through is true, but .* Remove it: .*`fluxfill preprocess`"):
        demo_config(tmp_path, "data.mode=online", "data.write_through=true")
