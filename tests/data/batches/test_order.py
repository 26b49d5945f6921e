import hashlib
from collections import Counter, defaultdict

import numpy as np
import pytest

from configs.errors import InputError
from data.batches.order import (
    BLOCK_SHARDS,
    ORDER_VERSION,
    Order,
    OrderSettings,
    hash_shards,
    num_micro_steps,
    rank_rows,
)

WORLD_SIZES = [1, 2, 3, 4, 6, 8, 12, 24]


def make_order(shards, *, weights=None, seed=0, size=8, block_shards=BLOCK_SHARDS, streams=1):
    """shards: (dataset, bucket, samples) of each."""
    datasets, buckets, samples = (np.array(column) for column in zip(*shards, strict=True))
    weights = weights or dict.fromkeys(datasets.tolist(), 1.0)
    settings = OrderSettings.current(
        seed=seed, global_batch_size=size, weights=weights, shards="", streams=streams, block_shards=block_shards
    )
    return Order(datasets, buckets, samples, settings)


def mixed_shards(num_shards=40):
    """Two datasets of three and two buckets, shards of 1 to 12 samples, some of another split."""
    rng = np.random.default_rng(5)
    kinds = [("a", "64x64"), ("a", "48x80"), ("a", "80x48"), ("b", "64x64"), ("b", "32x128")]
    samples = rng.integers(0, 13, num_shards)
    return [(*kinds[rng.integers(len(kinds))], int(count)) for count in samples]


def rows_of(batch):
    return list(zip(batch.shards.tolist(), batch.rows.tolist(), strict=True))


def sequences(order, num_batches):
    """Pool -> its rows, in the order in which the run comes to them."""
    found = defaultdict(list)
    for index in range(num_batches):
        batch = order.batch(index)
        found[batch.pool] += rows_of(batch)
    return found


@pytest.mark.fault(20, "any number of processes over the same batches")
@pytest.mark.parametrize("size", [1, 7, 8, 24, 31])
def test_every_world_size_trains_on_the_same_global_batches(size):
    order = make_order(mixed_shards(), size=size)
    for index in (0, 1, 2, 57, 1000):
        batch = rows_of(order.batch(index))
        for world_size in WORLD_SIZES:
            shares = [rank_rows(size, rank=rank, world_size=world_size) for rank in range(world_size)]
            assert [batch[row] for share in shares for row in share] == batch
            lengths = {len(share) for share in shares}
            assert lengths <= {size // world_size, -(-size // world_size)}


@pytest.mark.parametrize("streams", [1, 2, 3, 4, 8])
def test_a_rank_finds_its_rows_of_the_global_batch_alone(streams):
    shards = mixed_shards(150)
    order = make_order(shards, size=24, streams=streams)
    for index in (0, 1, 9, 57, 1000):
        whole = order.batch(index)
        for world_size in (*WORLD_SIZES, 31):
            fresh = make_order(shards, size=24, streams=streams)
            parts = [
                fresh.batch(index, part)
                for part in (rank_rows(24, rank=rank, world_size=world_size) for rank in range(world_size))
            ]
            assert [pair for part in parts for pair in rows_of(part)] == rows_of(whole)
            assert [epoch for part in parts for epoch in part.stream_epochs.tolist()] == whole.stream_epochs.tolist()
            for part in parts:
                assert (part.pool, part.epoch, part.position) == (whole.pool, whole.epoch, whole.position)
                assert len(part.part) == len(part.shards)


@pytest.mark.parametrize("size", [1, 7, 24])
@pytest.mark.parametrize("micro", [1, 2, 5, 100])
def test_all_ranks_take_as_many_micro_steps_as_the_fullest_needs(size, micro):
    for world_size in WORLD_SIZES:
        steps = num_micro_steps(size, world_size=world_size, micro_batch_size=micro)
        longest = max(len(rank_rows(size, rank=rank, world_size=world_size)) for rank in range(world_size))
        assert (steps - 1) * micro < longest <= steps * micro


@pytest.mark.parametrize(
    "shards",
    [
        pytest.param(mixed_shards(), id="mixed"),
        pytest.param([("a", "64x64", 1)], id="one sample"),
        pytest.param([("a", "64x64", 5)], id="one shard, fewer samples than a batch"),
        pytest.param([("a", "64x64", 1), ("a", "48x80", 1), ("b", "64x64", 1)], id="pools of one sample"),
        pytest.param([("a", "64x64", 7), ("a", "48x80", 301)], id="odd numbers, a small bucket"),
        pytest.param([("a", "64x64", 1)] * 50, id="shards of one sample"),
        pytest.param([("a", "64x64", 16)] * BLOCK_SHARDS, id="one whole block"),
        pytest.param([("a", "64x64", 16)] * (2 * BLOCK_SHARDS + 1), id="blocks and a rest"),
    ],
)
def test_every_sample_comes_once_in_each_epoch_of_its_pool(shards):
    order = make_order(shards)
    samples = {
        pool: {(n, row) for n, (*name, count) in enumerate(shards) if tuple(name) == pool for row in range(count)}
        for pool in {(dataset, bucket) for dataset, bucket, count in shards if count}
    }
    num_batches = 30 * max(len(rows) for rows in samples.values()) // 8 + 60
    found = sequences(order, num_batches)
    assert set(found) == set(samples)
    for pool, rows in found.items():
        size = len(samples[pool])
        assert len(rows) >= 2 * size, "too few batches to tell"
        for start in range(0, len(rows) - size + 1, size):
            assert set(rows[start : start + size]) == samples[pool]


# --- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [2, 3, 4])
@pytest.mark.parametrize("num_shards", [16, 17, 45])
def test_every_sample_comes_once_in_each_epoch_of_its_stream(streams, num_shards):
    """Shards of 1 to 12 samples: streams are equal within a row all the same, so no sample comes more often."""
    rng = np.random.default_rng(num_shards)
    samples = rng.integers(1, 13, num_shards).tolist()
    order = make_order([("a", "64x64", count) for count in samples], size=12, streams=streams)
    total, share = sum(samples), 12 // streams
    batches = [rows_of(order.batch(index)) for index in range(4 * total // 12 + 1)]
    met = set()
    for stream in range(streams):
        rows = [row for batch in batches for row in batch[stream * share : (stream + 1) * share]]
        length = total * (stream + 1) // streams - total * stream // streams
        first = set(rows[:length])
        assert len(first) == length
        assert not first & met, "two streams share a sample"
        met |= first
        for start in range(length, len(rows) - length + 1, length):
            assert set(rows[start : start + length]) == first
        orders = {tuple(rows[start : start + length]) for start in range(0, len(rows) - length + 1, length)}
        assert len(orders) == len(rows) // length, "the same order in two epochs"
    assert met == {(shard, row) for shard, count in enumerate(samples) for row in range(count)}


def test_a_node_reads_its_own_streams_shards_alone():
    """24 ranks on 4 nodes, a stream each: a node needs a quarter of the shards, and those at the two borders."""
    order = make_order([("a", "64x64", 20)] * 101, size=48, streams=4)
    shards_of = [set() for _ in range(4)]
    for index in range(101 * 20 // 48 + 1):
        for rank in range(24):
            part = order.batch(index, rank_rows(48, rank=rank, world_size=24))
            shards_of[rank // 6] |= set(part.shards.tolist())
    assert all(len(shards) <= 101 / 4 + 2 for shards in shards_of)
    assert set().union(*shards_of) == set(range(101))
    assert sum(map(len, shards_of)) <= 101 + 3


def test_small_buckets_are_not_dealt():
    """Three shards of one bucket among four streams: each would be a node's whole share of it."""
    order = make_order([("a", "64x64", 20)] * 40 + [("a", "48x80", 20)] * 15, size=16, streams=4)
    small = [order.batch(index) for index in range(400) if order.batch(index).pool[1] == "48x80"]
    rows = [row for batch in small for row in rows_of(batch)]
    assert len(rows) >= 600
    for start in range(0, len(rows) - 300 + 1, 300):
        assert len(set(rows[start : start + 300])) == 300, "one sequence, not four"


def test_streams_keep_the_weights_and_the_interleaving():
    shards = [("a", "64x64", 30)] * 40 + [("b", "64x64", 30)] * 10
    orders = [make_order(shards, weights={"a": 1, "b": 3}, streams=streams) for streams in (1, 2, 4)]
    pools = [[order.batch(index, range(1)).pool for index in range(500)] for order in orders]
    assert pools[0] == pools[1] == pools[2]
    assert abs(Counter(name for name, _ in pools[0])["b"] - 375) <= 3


def test_streams_that_cannot_share_a_batch_are_refused():
    with pytest.raises(InputError, match=r"data\.streams is 6, but must divide .*, 16\. Nearest below: 4\."):
        make_order([("a", "64x64", 1)], size=16, streams=6)


def test_the_hash_of_the_shards_is_that_of_names_and_counts_that_train():
    paths, samples = np.array(["a", "b", "c"]), np.array([3, 0, 4])
    plans = np.array(["p", "q", "r"])
    digest = hash_shards(paths, samples, plans)
    assert hash_shards(np.array(["a", "held out", "c"]), samples, plans) == digest
    assert hash_shards(paths, samples, np.array(["p", "held out", "r"])) == digest
    assert hash_shards(np.array(["a", "b", "d"]), samples, plans) != digest
    assert hash_shards(paths, np.array([4, 0, 3]), plans) != digest
    assert hash_shards(np.array(["c", "b", "a"]), samples, plans) != digest
    assert hash_shards(paths, samples, np.array(["p", "q", "other"])) != digest


def test_another_order_in_each_epoch_and_for_each_seed():
    shards = [(name, "64x64", 20) for name in "abcdefgh"] * 4
    epochs = defaultdict(set)
    for seed in (0, 1, 2**53, 2**53 + 1):
        for pool, rows in sequences(make_order(shards, seed=seed), 260).items():
            epochs[pool] |= {tuple(rows[start : start + 80]) for start in (0, 80, 160)}
    for orders in epochs.values():
        assert len(orders) == 12
        assert len({frozenset(order) for order in orders}) == 1


def test_other_pools_have_other_orders():
    found = sequences(make_order([("a", "64x64", 500), ("b", "64x64", 500), ("a", "48x80", 500)]), 150)
    rows = {pool: tuple(row for _, row in sequence[:100]) for pool, sequence in found.items()}
    assert len(set(rows.values())) == 3


def test_a_batch_touches_few_shards():
    """A reader keeps them at hand: a shuffle over all shards would fetch each of them for every few samples."""
    order = make_order([("a", "64x64", 50)] * 1000, size=32)
    for index in range(0, 2000, 7):
        touched = len(set(order.batch(index).shards.tolist()))
        assert touched <= 2 * BLOCK_SHARDS
    window = {shard for index in range(10) for shard in order.batch(index).shards.tolist()}
    assert len(window) <= 2 * BLOCK_SHARDS


def test_a_batch_mixes_its_block():
    batch = make_order([("a", "64x64", 200)] * BLOCK_SHARDS, size=64).batch(0)
    assert len(set(batch.shards.tolist())) == BLOCK_SHARDS
    assert max(Counter(batch.shards.tolist()).values()) < 24


@pytest.mark.parametrize("weights", [{"a": 3, "b": 1}, {"a": 0.1, "b": 0.2}, {"a": 1e-3, "b": 1.0, "unused": 5}])
def test_datasets_come_by_their_weights_and_buckets_by_their_rows(weights):
    shards = [("a", "64x64", 60), ("a", "48x80", 20), ("b", "64x64", 500), ("b", "80x48", 250)]
    order = make_order(shards, weights=weights)
    num_batches = 4_000
    counts = Counter(order.batch(index).pool for index in range(num_batches))
    total = weights["a"] + weights["b"]
    for dataset, bucket, samples in shards:
        rows = sum(count for name, _, count in shards if name == dataset)
        expected = num_batches * weights[dataset] / total * samples / rows
        # Never off by more than a batch in an epoch's course, and the run ends somewhere in an epoch.
        assert abs(counts[dataset, bucket] - expected) <= 1 + 104 * weights[dataset] / total * samples / rows


def test_equal_weights_per_row_are_the_plain_epoch():
    shards = [("a", "64x64", 320), ("a", "48x80", 80)]
    order = make_order(shards)
    for epoch in range(5):
        counts = Counter(order.batch(index).pool for index in range(50 * epoch, 50 * epoch + 50))
        assert counts == {("a", "64x64"): 40, ("a", "48x80"): 10}
        assert {order.batch(index).epoch for index in range(50 * epoch, 50 * epoch + 50)} == {epoch}


def test_buckets_are_spread_over_the_epoch():
    order = make_order([("a", "64x64", 800), ("a", "48x80", 80)])
    places = [index for index in range(110) if order.batch(index).pool[1] == "48x80"]
    assert len(places) == 10
    assert np.diff(places).max() <= 25


@pytest.mark.parametrize(
    "shards",
    [mixed_shards(), [("a", "64x64", 1)], [(name, "64x64", 1) for name in "abcdefghijklmnopqrstuvwxyz"]],
    ids=["mixed", "one sample", "more pools than batches in an epoch"],
)
def test_any_batch_is_found_without_walking_to_it(shards):
    walked = make_order(shards)
    batches = [walked.batch(index) for index in range(300)]
    for index in [299, 0, 150, 151, 150, 7, 298]:
        found = make_order(shards).batch(index)
        assert (found.index, found.pool, found.epoch, found.position) == (
            index,
            batches[index].pool,
            batches[index].epoch,
            8 * index,
        )
        assert rows_of(found) == rows_of(batches[index])
    epochs = [batch.epoch for batch in batches]
    assert epochs == sorted(epochs)


def test_a_batch_ten_million_steps_on_is_there():
    order = make_order(mixed_shards())
    batch = order.batch(10_000_000)
    assert batch.position == 80_000_000
    assert order.epoch_of(batch.index)[0] == batch.epoch > 100_000
    assert len(rows_of(batch)) == 8


def test_the_order_is_that_of_every_run_before():
    """A change here, in numpy or in the code, is a new ORDER_VERSION: runs that are resumed would change theirs."""
    order = make_order(mixed_shards(), weights={"a": 2.0, "b": 0.7}, seed=42)
    digest = hashlib.sha256()
    for index in range(100):
        batch = order.batch(index)
        digest.update(f"{batch.index} {batch.pool} {batch.epoch} {batch.position} {rows_of(batch)}\n".encode())
    assert ORDER_VERSION == 1
    assert digest.hexdigest() == "b969111186f88ce981b26cc600d96e054a8123432f5e89b1492a1bfe021a03de"


def test_a_million_shards_are_ordered():
    datasets = np.where(np.arange(1_000_000) % 3 == 0, "a", "b")
    buckets = np.array(["1024x1024", "768x1360", "1360x768", "512x512"])[np.arange(1_000_000) % 4]
    samples = np.full(1_000_000, 50)
    settings = OrderSettings.current(seed=1, global_batch_size=256, weights={"a": 1.0, "b": 2.0}, shards="")
    order = Order(datasets, buckets, samples, settings)
    assert order.num_samples == 50_000_000
    batch = order.batch(123_456_789)
    assert (datasets[batch.shards] == batch.pool[0]).all()
    assert (buckets[batch.shards] == batch.pool[1]).all()


def test_buckets_are_those_that_train():
    order = make_order([("a", "64x64", 5), ("a", "1024x1024", 0), ("b", "48x80", 1)])
    assert sorted(order.buckets) == ["48x80", "64x64"]
    assert order.num_samples == 6


@pytest.mark.fault(28, "nothing to train on")
def test_nothing_to_train_on_is_refused():
    with pytest.raises(InputError, match=r"no training sample. Add pictures or lower data.holdout"):
        make_order([("a", "64x64", 0)])


def test_a_dataset_without_a_weight_is_named():
    with pytest.raises(InputError, match=r"datasets without a weight in the config: b, c\."):
        make_order([("a", "64x64", 1), ("b", "64x64", 1), ("c", "64x64", 1)], weights={"a": 1.0})


def test_an_order_of_another_version_is_refused():
    settings = OrderSettings(ORDER_VERSION + 1, 0, 8, 1, BLOCK_SHARDS, {"a": 1.0}, "")
    with pytest.raises(InputError, match=r"order is of version 2, this fluxfill has 1. Go on with the version that"):
        Order(np.array(["a"]), np.array(["64x64"]), np.array([1]), settings)
