"""Shards that a run makes beside its training: the same that preprocessing makes, read as soon as they are there."""

import errno
import logging
import os
import shutil
import threading
import time
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

import data.online.batch_encoder
import data.online.caption_texts
import data.online.finished_shards
import data.preprocessing.encode_shards
from configs.errors import InputError
from configs.loading import load_config
from data.batches.row_filler import RowPolicy
from data.batches.training_set import CachedTrainingSet
from data.cache.manifest import read_shard_table
from data.cache.open_cache import Cache, open_cache
from data.cache.shard_writer import ShardWriter
from data.cache_layout import CREW, index_path
from data.encoders.load import Encoders
from data.encoders.model_folder import encoder_fingerprints
from data.preprocess import Job, preprocess
from data.preprocessing.share_plan import agree_on_plan
from data.preprocessing.worker import Worker
from data.preprocessing.worker_group import join
from data.samples.shard_plan import PlannedShard
from tests.data.batches.streams import copy_of
from tests.data.online.online_streams import QUIET, assert_same, open_online, open_stream, take
from tests.workers import preprocess_quietly, start_worker

EPOCH = 7  # batches of 7 of the 48 samples that train, and a few of the next epoch
PATIENCE = 60  # seconds


@pytest.fixture(scope="module")
def pictures(triples, tmp_path_factory) -> Path:
    """The demo's triples, each with a caption of its own. Read only."""
    folder = tmp_path_factory.mktemp("write-through") / "pictures"
    shutil.copytree(triples, folder)
    for number, path in enumerate(sorted((folder / "target").glob("*.txt"))):
        path.write_text(f"photograph number {number}")
    return folder


@pytest.fixture(scope="module")
def config_of(demo_config, pictures):
    """Makes a config: `config_of(cache, "key=value", ...)`. Texts take 64 KiB each, so 16 samples fill a shard."""
    folders = [f"data.datasets.0.{role}={pictures / role}" for role in ("target", "source", "mask")]
    return lambda cache, *overrides: demo_config(cache, *folders, "data.captions.text_length=512", *overrides)


@pytest.fixture(scope="module")
def cache(config_of, tmp_path_factory) -> Cache:
    """What preprocessing makes of it. Read only."""
    config = config_of(tmp_path_factory.mktemp("preprocessed") / "cache")
    preprocess(config, QUIET)
    opened = open_cache(config, Path(config.model.base))
    assert len(opened.table) >= 8
    return opened


@pytest.fixture
def config(config_of, tmp_path):
    """That of the cache, but to encode online and write."""
    return config_of(tmp_path / "cache", "data.mode=online", "data.write_through=true")


@pytest.fixture
def encoded(monkeypatch) -> Counter:
    """How many pictures and captions went through the encoders, for the training and for shards."""
    counts: Counter = Counter()

    def count(name, module, function, size):
        original = getattr(module, function)

        def counted(first, second, **options):
            counts[name] += size(second)
            return original(first, second, **options)

        monkeypatch.setattr(module, function, counted)

    count("trained on", data.online.batch_encoder, "encode_pixels", lambda batch: len(batch.target))
    count("captions", data.online.caption_texts, "encode_captions", len)
    count("for shards", data.preprocessing.encode_shards, "encode_pixels", lambda batch: len(batch.target))
    count("captions for shards", data.preprocessing.encode_shards, "encode_captions", len)
    return counts


def contents(cache: Path) -> dict[str, object]:
    """Every file of a cache as bytes; shards.npz as its columns, as a zip holds the time of day."""
    files = {
        path.relative_to(cache).as_posix(): path.read_bytes()
        for path in cache.rglob("*")
        if path.is_file() and path.name != "shards.npz"
    }
    return files | {"shards.npz": [column.tolist() for column in vars(read_shard_table(cache)).values()]}


def wait_until_written(*streams) -> None:
    """Until the background of each has nothing left to do."""
    for stream in streams:
        thread = stream._source._written._thread
        thread.join(PATIENCE)
        assert not thread.is_alive()


def train(stream, num_batches):
    return [[copy_of(rows) for rows in next(stream)] for _ in range(num_batches)]


def pass_what_was_begun(stream) -> None:
    """Come to the first batch of which nothing was begun ahead yet."""
    begun = max(ahead.planned.batch.index for ahead in stream._ahead)
    while stream.next_batch <= begun:
        list(next(stream))


# --- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text_has_its_own_device", [False, True])
def test_an_epoch_leaves_the_very_cache_that_preprocessing_makes(config, cache, monkeypatch, text_has_its_own_device):
    monkeypatch.setattr(Encoders, "text_has_its_own_device", text_has_its_own_device)
    with closing(open_stream(open_online(config))) as stream:
        train(stream, EPOCH)
        wait_until_written(stream)
    assert contents(config.data.cache) == contents(cache.folder)
    open_cache(config, Path(config.model.base))
    before = {path: path.stat().st_ino for path in config.data.cache.rglob("*") if path.is_file()}
    preprocess(config, QUIET)
    assert {path: path.stat().st_ino for path in config.data.cache.rglob("*") if path.is_file()} == before


KINDS = {
    "as it comes": [],
    "int8": ["data.captions.text_dtype=int8"],
    "variants": [
        "data.datasets.0.source=null",
        "data.datasets.0.flip=true",
        "data.datasets.0.mask={random: {brush: 0.6, box: 0.4}, variants: 3}",
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_later_epoch_encodes_nothing_and_reads_the_cached_runs_rows(config_of, tmp_path, encoded, kind):
    """With dropped captions and masks, whichever of the masks, and in a restart from the first row on."""
    options = ["data.captions.text_length=32", *KINDS[kind]]
    config = config_of(tmp_path / "cache", "data.mode=online", "data.write_through=true", *options)
    with closing(open_stream(open_online(config))) as stream:
        train(stream, 1)
        wait_until_written(stream)
        pass_what_was_begun(stream)
        start = stream.next_batch
        assert encoded["trained on"] and encoded["captions"]
        encoded.clear()
        later = train(stream, EPOCH)
    again = take(open_online(config), EPOCH, start=start)
    assert encoded == {}
    cached = CachedTrainingSet(open_cache(config, Path(config.model.base)))
    expected = take(cached, EPOCH, start=start)
    for batches in (later, again):
        for one, other in zip(batches, expected, strict=True):
            for rows, same in zip(one, other, strict=True):
                assert_same(rows, same, exactly=True)


def test_a_first_epoch_has_the_cached_runs_rows_whether_they_are_read_or_encoded(config, cache, encoded, monkeypatch):
    monkeypatch.setattr(data.online.finished_shards, "_LOOK_SECONDS", 0.0)
    with closing(open_stream(open_online(config))) as stream:
        mixed = []
        for index in range(2 * EPOCH):
            mixed += train(stream, 1)
            deadline = time.monotonic() + PATIENCE
            while encoded["for shards"] < min(7 * index, 96) and time.monotonic() < deadline:
                time.sleep(0.01)
    assert 7 < encoded["trained on"] < 2 * EPOCH * 7, "some were encoded, some were read"
    for one, other in zip(mixed, take(CachedTrainingSet(cache), 2 * EPOCH), strict=True):
        for rows, same in zip(one, other, strict=True):
            assert_same(rows, same)


# --- many of them -----------------------------------------------------------------------------------------------------


def test_ranks_and_preprocess_workers_share_the_shards(config, cache, monkeypatch):
    described, describe = [], data.preprocessing.encode_shards._describe_sample
    monkeypatch.setattr(
        "data.preprocessing.encode_shards._describe_sample", lambda s: described.append(s.key) or describe(s)
    )
    ranks = [open_online(config, Worker(rank, 3, decode_threads=2)) for rank in range(2)]
    streams = [open_stream(samples, rank=rank, world_size=2) for rank, samples in enumerate(ranks)]
    worker = threading.Thread(target=preprocess, args=(config, QUIET, Worker(2, 3)))
    worker.start()
    for _ in range(EPOCH):
        for stream in streams:
            list(next(stream))
    wait_until_written(*streams)
    worker.join(PATIENCE)
    for stream in streams:
        stream.close()
    assert len(described) == len(set(described)) == 96
    assert contents(config.data.cache) == contents(cache.folder)


def test_another_plan_is_left_alone(config, caplog):
    """Of a preprocess worker that began before a caption was changed, say."""
    samples = open_online(config)
    job = Job(config, Path(config.model.base), encoder_fingerprints(Path(config.model.base)))
    other = [replace(plan, plan=f"{number:032x}") for number, plan in enumerate(samples._plans)]
    with join(config.data.cache / CREW, job.settings) as crew:
        agree_on_plan(crew, lambda: other, help_planning=list, waiting=lambda _: None)
        with closing(open_stream(samples)) as stream:
            train(stream, 2)
            wait_until_written(stream)
    assert "another job is at work there by another plan" in caplog.text
    assert not list(config.data.cache.rglob("*.tar"))


# --- the training comes first -----------------------------------------------------------------------------------------


def test_the_training_waits_for_one_batch_of_the_background_at_most(config, monkeypatch):
    events: list[str] = []
    encode_pixels = data.preprocessing.encode_shards.encode_pixels

    def slow(vae, batch):
        events.append("background")
        time.sleep(0.1)
        return encode_pixels(vae, batch)

    samples = open_online(config)
    turns = samples._encoder.turns
    need, have = turns.need, turns.have
    monkeypatch.setattr(turns, "need", lambda: (need(), events.append("need")))
    monkeypatch.setattr(turns, "have", lambda: (events.append("have"), have()))
    monkeypatch.setattr(data.preprocessing.encode_shards, "encode_pixels", slow)
    with closing(open_stream(samples, size=3, micro=1)) as stream:
        for _ in range(12):
            list(next(stream))
            time.sleep(0.15)  # a step of the training, in which the encoders have nothing to do
        assert events.count("background") >= 3
        waiting, came_in_between = 0, 0
        for event in events:
            waiting += {"need": 1, "have": -1, "background": 0}[event]
            came_in_between = came_in_between + (event == "background") if waiting else 0
            assert came_in_between <= 1


def test_the_background_works_while_the_training_asks_for_nothing(config, encoded):
    with closing(open_stream(open_online(config))) as stream:
        train(stream, 1)
        so_far = encoded["trained on"]
        wait_until_written(stream)
        assert encoded["for shards"] == 96
        assert encoded["trained on"] < so_far + 3 * 7, "no further than it reads ahead"


# --- an end in the middle ---------------------------------------------------------------------------------------------


def test_closed_in_the_middle_it_gives_back_what_is_not_finished(config, cache, monkeypatch):
    begun, goes_on = threading.Event(), threading.Event()
    add_sample = ShardWriter.add_sample

    def held_up(writer, sample):
        begun.set()
        goes_on.wait(PATIENCE)
        add_sample(writer, sample)

    monkeypatch.setattr(ShardWriter, "add_sample", held_up)
    stream = open_stream(open_online(config))
    train(stream, 1)
    assert begun.wait(PATIENCE)
    assert list(config.data.cache.rglob("*.part")) and (config.data.cache / CREW).is_dir()
    threading.Timer(0.3, goes_on.set).start()
    start = time.monotonic()
    stream.close()
    assert time.monotonic() - start < 10
    assert not list(config.data.cache.rglob("*.part"))
    assert not (config.data.cache / CREW).exists()
    assert not list(config.data.cache.glob("manifest.json"))
    monkeypatch.undo()
    preprocess(config, QUIET)
    assert contents(config.data.cache) == contents(cache.folder)


def train_and_write(config, _worker) -> None:
    """In a process of its own, killed on the way or not."""
    with closing(open_stream(open_online(config))) as stream:
        train(stream, 2)
        wait_until_written(stream)


@pytest.mark.parametrize("then", ["the same again", "preprocess"])
@pytest.mark.parametrize("kill_at", [30, 60, 90])
def test_killed_in_the_middle_both_go_on_from_it(config, cache, kill_at, then):
    open_online(config)  # the pictures are known: what changes from here on are shards and claims
    assert start_worker(config, kill_at=kill_at, run=train_and_write).join()[0] == -9
    run = train_and_write if then == "the same again" else preprocess_quietly
    assert start_worker(config, run=run).join()[:2] == (0, "")
    assert contents(config.data.cache) == contents(cache.folder)


def train_and_fail(config, _worker) -> None:
    """As a run does that ends by an error: nobody closes its stream."""
    logging.getLogger("fluxfill").addHandler(logging.FileHandler(config.data.cache.parent / "log"))
    stream = open_stream(open_online(config))
    train(stream, 1)
    raise InputError("the training ends here")


def test_a_process_that_ends_without_closing_is_not_held_up(config, cache, tmp_path):
    start = time.monotonic()
    assert start_worker(config, run=train_and_fail).join()[:2] == (2, "the training ends here")
    assert time.monotonic() - start < PATIENCE
    assert (tmp_path / "log").read_text() == "", "the run itself says why it ended"
    assert not list(config.data.cache.rglob("*.part"))
    preprocess(config, QUIET)
    assert contents(config.data.cache) == contents(cache.folder)


# --- what fails -------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(config_of, pictures, tmp_path) -> tuple:
    """(samples, the shard of two pictures that were destroyed after the plan was made, the two)."""
    for role in ("target", "source", "mask"):
        shutil.copytree(pictures / role, tmp_path / role)
    folders = [f"data.datasets.0.{role}={tmp_path / role}" for role in ("target", "source", "mask")]
    config = config_of(tmp_path / "cache", "data.mode=online", "data.write_through=true", *folders)
    samples = open_online(config)
    shard = max((plan for plan in samples._plans if plan.split == "train"), key=lambda plan: len(plan.samples))
    bad = [Path(str(sample.triple.target)) for sample in shard.samples[1:3]]
    bad[0].write_bytes(bad[0].read_bytes()[:200])
    bad[1].unlink()
    return samples, shard, bad


def finished(samples) -> set[str]:
    cache = samples._config.data.cache
    return {plan.path for plan in samples._plans if index_path(cache / plan.path).is_file()}


def test_a_picture_that_cannot_be_decoded_stops_its_shard_alone(damaged, caplog):
    samples, shard, bad = damaged
    with closing(open_stream(samples, policy=RowPolicy(max_bad_samples=2))) as stream:
        train(stream, EPOCH)
        wait_until_written(stream)
        train(stream, EPOCH)
        assert {row.row for row in stream.replaced()} == {1, 2}
    assert finished(samples) == {plan.path for plan in samples._plans} - {shard.path}
    assert not (samples._config.data.cache / "manifest.json").exists()
    (said,) = [record.message for record in caplog.records if "data.write_through" in record.message]
    assert all(str(path) in said for path in bad)
    assert "Run `fluxfill preprocess CONFIG` for the rest" in said
    with pytest.raises(InputError, match=r"\.png"):
        preprocess(samples._config, QUIET)


def test_a_full_disk_stops_the_writing_and_not_the_training(config, cache, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ShardWriter, "add_sample", full)
    with closing(open_stream(open_online(config))) as stream:
        batches = train(stream, 1)
        wait_until_written(stream)
        batches += train(stream, EPOCH)
    warned = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 1 and "No space left on device" in warned[0].message
    assert not list(config.data.cache.rglob("*.part")) and not list(config.data.cache.rglob("*.tar"))
    for one, other in zip(batches, take(CachedTrainingSet(cache), EPOCH + 1), strict=True):
        for rows, same in zip(one, other, strict=True):
            assert_same(rows, same)


@pytest.fixture
def written(config, cache):
    """The config over a copy of the finished cache."""
    shutil.copytree(cache.folder, config.data.cache)
    return config


def largest(samples) -> PlannedShard:
    return max((plan for plan in samples._plans if plan.split == "train"), key=lambda plan: len(plan.samples))


def test_a_damaged_shard_is_told_and_its_samples_encoded(written, cache, encoded, caplog):
    samples = open_online(written)
    shard = largest(samples)
    tar = bytearray((written.data.cache / shard.path).read_bytes())
    tar[len(tar) // 2] ^= 1
    (written.data.cache / shard.path).write_bytes(tar)
    with closing(open_stream(samples, policy=RowPolicy())) as stream:
        batches = train(stream, EPOCH)
        assert stream.replaced() == []
    assert 0 < encoded["trained on"] <= 2 * len(shard.samples)
    assert sum("does not match its checksum" in record.message for record in caplog.records) == 1
    for one, other in zip(batches, take(CachedTrainingSet(cache), EPOCH, policy=RowPolicy()), strict=True):
        for rows, same in zip(one, other, strict=True):
            assert_same(rows, same)


def test_a_shard_that_is_deleted_on_the_way_is_encoded(written, encoded, no_waits, monkeypatch):
    """As by a `fluxfill preprocess` that has planned anew since."""
    monkeypatch.setattr("data.batches.shard_reader._OPEN_SHARDS", 0)  # none stays open
    samples = open_online(written)
    with closing(open_stream(samples, policy=RowPolicy())) as stream:
        train(stream, EPOCH)
        assert encoded["trained on"] == 0
        wait_until_written(stream)
        (written.data.cache / largest(samples).path).unlink()
        train(stream, 2 * EPOCH)
        assert stream.replaced() == []
    assert encoded["trained on"] > 0


def test_a_shard_that_is_not_there_is_looked_for_now_and_then(config, monkeypatch):
    looks: Counter = Counter()
    read_finished = data.online.finished_shards.read_finished
    monkeypatch.setattr(
        data.online.finished_shards,
        "read_finished",
        lambda c, plan: looks.update([plan.path]) or read_finished(c, plan),
    )
    monkeypatch.setattr("data.online.write_through.WriteThrough.begin", lambda *_: None)
    take(open_online(config), 2 * EPOCH, policy=RowPolicy())
    assert len(looks) > 3 and set(looks.values()) == {1}


# --- the key ----------------------------------------------------------------------------------------------------------


def test_without_online_it_is_refused(demo_config, tmp_path):
    with pytest.raises(InputError, match=r"data\.write_through is true, .*with mode cached nothing is encoded"):
        demo_config(tmp_path, "data.write_through=true")


def test_no_recipe_writes_unless_it_is_told_to():
    assert not load_config(Path("configs/fill_lora.yaml"), ["data.mode=online"]).data.write_through
