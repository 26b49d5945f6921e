"""An online run over a cache in the making: rows of finished shards are read, the others encoded."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
import torch

import data.online.finished_shards
from configs.errors import InputError
from configs.loading import dump_config
from data.batches.micro_batch import row_fields
from data.batches.row_filler import RowPolicy
from data.batches.training_set import CachedTrainingSet
from data.cache.manifest import FORMAT_VERSION
from data.cache.members import bytes_of
from data.cache.open_cache import Cache, open_cache
from data.online.batch_encoder import BatchEncoder
from data.online.finished_shards import FinishedShards
from data.preprocessing.run import preprocess
from data.samples.geometry import Bucket
from data.samples.plan import TRAIN
from data.samples.shard_plan import ShardSpec
from tests.data.batches.streams import copy_of
from tests.data.made_caches import index_of, write_cache
from tests.data.online.online_streams import QUIET, assert_same, open_online, open_stream, plan_of, take
from tests.data.sources.made_scans import picture_bytes
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[3]
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
    index_of(cache / shard).unlink()


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


_ONLINE_RUN = """
import sys
from pathlib import Path
from rich.console import Console
from configs.loading import load_config
from data.online.training_set import plan_online
config = load_config(sys.argv[1], ["data.mode=online"])
plan = plan_online(config, Path(config.model.base), Console(quiet=True))
print("planned", flush=True)
input()
for shard in plan:
    for sample in shard.samples:
        sample.triple.target.read(1 << 20)
print("read", flush=True)
input()
"""


def test_a_job_beside_the_run_leaves_it_the_pictures_inside_tables(config_of, tmp_path):
    """Which exist in no other form that single ones are read from."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    own, cache = [picture_bytes(number, (64, 64)) for number in range(20)], tmp_path / "cache"
    parquet.write_table(pa.table({"target": own, "caption": ["a plain"] * 20}), tmp_path / "list.parquet")
    inside = [f"table={tmp_path / 'list.parquet'}", "target=null", "source=null", "mask={random: {box: 1.0}}"]
    config = config_of(cache, *(f"data.datasets.0.{setting}" for setting in inside), "data.holdout=4")
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    line = [sys.executable, "-c", _ONLINE_RUN, str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as run:
        try:
            assert run.stdout.readline() == "planned\n"
            preprocess(config, QUIET)
            assert (cache / "manifest.json").exists()
            for said in ("read\n", ""):
                run.stdin.write("\n")
                run.stdin.flush()
                assert run.stdout.readline() == said
            run.stdin.close()
            assert run.wait(timeout=PATIENCE) == 0
        finally:
            run.kill()
    assert list((cache / "copies").glob("*.pictures"))
    preprocess(config, QUIET)
    assert not (cache / "copies").exists()


@pytest.mark.parametrize("what", ["its index is damaged", "its index is gone and the tar another of the same size"])
def test_a_shard_that_is_another_by_the_time_it_is_opened_again_is_encoded(tmp_path, what, caplog):
    """As from a job beside the run that makes it again, after the run has closed it to open others."""
    bucket = Bucket.parse("64x64")
    cache = write_cache(tmp_path, [("photos", str(bucket), 4)])
    path, plan = str(cache.table.path[0]), str(cache.table.plan[0])
    spec = ShardSpec(path, "photos", bucket, TRAIN, plan, num_samples=4, num_bytes=0, format_version=FORMAT_VERSION)
    fields = [field for field in row_fields(bucket, cache.manifest) if field.is_stored]
    out = {field.name: bytes_of(torch.empty(field.shape, dtype=field.dtype)) for field in fields}
    with closing(FinishedShards(tmp_path, [spec], cache.manifest, cache.table)) as finished:
        assert finished.read(0, 0, out, variant=0)
        finished._reader._open.clear()
        changed = index_of(tmp_path / path) if what == "its index is damaged" else tmp_path / path
        data = bytearray(changed.read_bytes())
        data[len(data) // 2] ^= 1
        changed.write_bytes(data)
        if changed == tmp_path / path:
            index_of(changed).unlink()
        assert not finished.read(0, 0, out, variant=0)
        assert not finished.read(0, 1, out, variant=0)
    assert sum("This run goes on and encodes its samples" in record.message for record in caplog.records) == 1


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
