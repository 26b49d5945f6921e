import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from configs.errors import InputError, StorageFailed
from configs.loading import dump_config, load_config
from data.batches.training_set import CachedTrainingSet
from data.cache.node_cache import NodeCache
from data.cache.open_cache import open_cache
from data.cache.validation_items import read_validation_items
from data.storage.disk_full import DiskFull
from trainer.checkpoints.run_state import RunState
from trainer.training_data import choose_order, open_samples, open_stream, restart_stream


@pytest.fixture(scope="module")
def cache(config, tiny_model):
    """The config's cache."""
    return open_cache(config, tiny_model)


@pytest.mark.parametrize("room, block_shards", [(100, 8), (14, 4), (7, 2), (3.5, 1)])
def test_blocks_are_as_large_as_the_nodes_copies_may_be(config, cache, tmp_path, room, block_shards):
    """One pool of many shards: the block in use and the next one are held, in six tenths of the room."""
    train = cache.table.split == "train"
    table = replace(cache.table, **{name: column[train][:1].repeat(20) for name, column in vars(cache.table).items()})
    copies = NodeCache("https://host/cache", tmp_path, int(room * table.bytes[0]), table)
    remote = replace(cache, table=table, copies=copies)
    assert choose_order(config, CachedTrainingSet(remote)).block_shards == block_shards
    assert choose_order(config, CachedTrainingSet(replace(remote, copies=None))).block_shards == 8


@pytest.mark.parametrize("streams, num_nodes, block_shards", [(1, 4, 8), (4, 4, 8), (4, 2, 4), (4, 1, 2), (5, 4, 4)])
def test_a_node_has_room_for_the_streams_that_it_reads(config, cache, tmp_path, streams, num_nodes, block_shards):
    train = cache.table.split == "train"
    table = replace(cache.table, **{name: column[train][:1].repeat(80) for name, column in vars(cache.table).items()})
    copies = NodeCache("https://host/cache", tmp_path, int(16.5 / 0.6 * table.bytes[0]), table)
    samples = CachedTrainingSet(replace(cache, table=table, copies=copies))
    config = config.model_copy(
        update={
            "data": config.data.model_copy(update={"streams": streams}),
            "train": config.train.model_copy(update={"global_batch_size": 20}),
        }
    )
    assert choose_order(config, samples, num_nodes=num_nodes).block_shards == block_shards


def test_a_run_that_goes_on_with_less_room_is_told(config, cache, engine, tmp_path, caplog):
    roomy = NodeCache("https://host/cache", tmp_path, 1 << 40, cache.table)
    order = choose_order(config, CachedTrainingSet(replace(cache, copies=roomy)))
    state = RunState(step=0, batch=0, skips=0, restarts=1, order=order)
    tight = NodeCache("https://host/cache", tmp_path, 1000, cache.table)
    for copies in (roomy, tight):
        open_stream(config, engine, CachedTrainingSet(replace(cache, copies=copies)), state, 16).close()
        assert ("fetched more than once" in caplog.text) == (copies is tight)


@pytest.mark.parametrize(
    "held, why", [(3, "all 3 that it has are held out. Lower"), (0, "left out by data.min_side or")]
)
def test_a_run_without_one_of_its_datasets_is_told_once(config, cache, engine, caplog, held, why):
    order = choose_order(config, CachedTrainingSet(cache))
    counts = {**cache.manifest.samples, "rare": {"train": 0, "holdout": held}}
    samples = CachedTrainingSet(replace(cache, manifest=replace(cache.manifest, samples=counts)))
    for weights in (order.weights, {**order.weights, "rare": 9.0}):
        state = RunState(step=0, batch=0, skips=0, restarts=0, order=replace(order, weights=weights))
        open_stream(config, engine, samples, state, 16).close()
        told = "dataset rare is not trained on, and the others share its weight: "
        assert (told in caplog.text) == ("rare" in weights)
    assert why in caplog.text


@pytest.mark.parametrize(
    "error", [InputError("no pictures"), StorageFailed("failed 8 time(s)"), DiskFull(Path("scan"), 28)]
)
def test_what_planning_fails_with_is_raised_as_what_it_is(config, engine, tiny_model, monkeypatch, error):
    """On all ranks; a supervisor tells storage that fails from bad input."""

    def fail(*_):
        raise error

    monkeypatch.setattr("trainer.training_data.plan_online", fail)
    online = config.model_copy(update={"data": config.data.model_copy(update={"mode": "online"})})
    with pytest.raises(InputError, match=re.escape(str(error))) as raised:
        open_samples(online, tiny_model, engine, Console(quiet=True))
    assert isinstance(raised.value, StorageFailed) == isinstance(error, StorageFailed)


def test_copies_without_room_for_the_least_are_refused(config, cache, tmp_path):
    copies = NodeCache("https://host/cache", tmp_path, 1000, cache.table)
    with pytest.raises(
        InputError, match=r"data\.local_cache_gib is .*e-07, but shards of .* GiB in \d+ buckets need at least"
    ):
        choose_order(config, CachedTrainingSet(replace(cache, copies=copies)))


def test_a_run_reads_a_cache_by_its_url(config, cache, engine, tiny_model, tmp_path, serve):
    """Manifest, validation pictures and shards come from the server; the rows are those of the folder."""

    def get(handler):
        data = (cache.folder / handler.path.lstrip("/")).read_bytes()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    remote = load_config(path, [f"data.cache={serve(get)}", f"data.local_cache={tmp_path / 'node'}"])
    opened = open_cache(remote, tiny_model)
    assert len(read_validation_items(opened.folder, split="holdout", count=4)) == 4
    found = []
    for each, its_cache in ((config, cache), (remote, opened)):
        samples = CachedTrainingSet(its_cache)
        state = RunState(step=0, batch=0, skips=0, restarts=0, order=choose_order(each, samples))
        stream = open_stream(each, engine, samples, state, 16)
        found.append([rows.latents.sum().item() + rows.mask.sum().item() for _ in range(6) for rows in next(stream)])
        stream.close()
    assert found[0] == found[1]
    assert opened.folder.is_relative_to(tmp_path / "node")


def test_a_stream_that_goes_back_lets_go_of_its_source_before_it_has_another(config, samples, engine, monkeypatch):
    state = RunState(step=0, batch=0, skips=0, restarts=0, order=choose_order(config, samples))
    happened, open_rows = [], samples.open_rows

    def opened(*given):
        happened.append("opened")
        source = open_rows(*given)
        close = source.close
        monkeypatch.setattr(source, "close", lambda: (happened.append("closed"), close()))
        return source

    monkeypatch.setattr(samples, "open_rows", opened)
    with open_stream(config, engine, samples, state, 16) as stream:
        before = [rows.position.tolist() for rows in next(stream)]
        restart_stream(config, samples, stream, state)
        assert happened[:3] == ["opened", "closed", "opened"]
        assert [rows.position.tolist() for rows in next(stream)] == before
