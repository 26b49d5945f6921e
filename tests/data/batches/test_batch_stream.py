import gc

import numpy as np
import pytest
import torch
from torch import Tensor

from configs.errors import InputError
from data.batches.cached_rows import CachedRows
from data.batches.noise import draw_caption_dropout, draw_noise, draw_uniform, draw_variant
from data.batches.row_filler import RowPolicy
from data.samples.geometry import Bucket
from tests.data.batches.streams import SEED, SHARDS, copy_of, damage, open_stream, open_tars, rows_by_position, take

# --- what a stream gives ----------------------------------------------------------------------------------------------


def test_a_row_holds_what_was_stored_and_its_positions_draws(make_cache, make_sample, make_text):
    cache = make_cache(SHARDS, num_variants=3)
    stream = open_stream(cache)
    seen = set()
    for index in range(12):
        for rows in next(stream):
            keys = stream.keys(stream.current)
            for place, position in enumerate(rows.position.tolist()):
                key = keys[position - 7 * index]
                dataset, _, row = key.split("-")
                text = f"text-{int(row) % 2:016x}"
                stored = make_sample(key, rows.bucket, text=text, num_variants=3)
                variant = draw_variant(SEED, position, 3)
                assert (dataset, str(rows.bucket)) == stream.current.pool
                assert torch.equal(rows.latents[place], stored.latents)
                assert torch.equal(rows.masked_latents[place], stored.masked_latents[variant])
                bits = np.unpackbits(rows.mask[place].numpy(), axis=1).astype(bool)
                np.testing.assert_array_equal(bits, stored.masks[variant])
                for name, tensor in make_text(text).items():
                    assert torch.equal(getattr(rows, name)[place], tensor)
                noise = np.empty((16, *rows.bucket.latent_size), np.float32)
                draw_noise(SEED, position, noise)
                np.testing.assert_array_equal(rows.noise[place].numpy(), noise)
                assert rows.uniform[place].item() == draw_uniform(SEED, position)
                assert rows.weight[place].item() == 1
                seen.add((key, variant))
    stream.close()
    assert {variant for _, variant in seen} == {0, 1, 2}
    assert not any(key.startswith("photos-4-") for key, _ in seen), "a held-out sample was trained on"


@pytest.mark.parametrize("size", [1, 6, 7])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_very_rows_of_one_process(make_cache, size, world_size):
    cache = make_cache(SHARDS)
    alone = take(cache, 10, size=size)
    shares = [take(cache, 10, size=size, rank=rank, world_size=world_size) for rank in range(world_size)]
    for index in range(10):
        expected = rows_by_position(alone[index])
        assert sorted(expected) == list(range(index * size, (index + 1) * size))
        together = {}
        for share in shares:
            mine = rows_by_position(share[index])
            assert not together.keys() & mine.keys()
            together |= mine
        assert together == expected
        assert len({len(share[index]) for share in shares}) == 1, "ranks would wait for each other"
        assert len({tuple(len(rows.weight) for rows in share[index]) for share in shares}) == 1


def test_padding_rows_have_weight_0_and_finite_numbers(make_cache):
    cache = make_cache(SHARDS)
    shares = [take(cache, 6, size=7, rank=rank, world_size=3, micro=1) for rank in range(3)]
    for index in range(6):
        weights = [torch.cat([rows.weight for rows in share[index]]) for share in shares]
        assert [len(weight) for weight in weights] == [3, 3, 3]
        assert [int(weight.sum()) for weight in weights] == [2, 2, 3]
        for share in shares:
            for rows in share[index]:
                for name, value in vars(rows).items():
                    if isinstance(value, Tensor):
                        assert torch.isfinite(value.float()).all(), name
                assert ((rows.uniform > 0) & (rows.uniform < 1)).all()


def test_padding_rows_hold_nothing_of_the_rows_before_them(make_cache):
    """Their memory was a row's; what they hold must not depend on what was read before."""
    cache = make_cache(SHARDS)
    for batch in take(cache, 8, size=4, rank=0, world_size=3, micro=1):
        for rows in batch:
            for place in torch.nonzero(rows.weight == 0).flatten().tolist():
                assert not rows.latents[place].any()
                assert not rows.t5[place].any()
                assert not rows.noise[place].any()


@pytest.mark.fault(20, "other threads, depth and micro-batches")
@pytest.mark.parametrize(
    "options", [{"micro": 1}, {"micro": 3}, {"micro": 50}, {"threads": 1}, {"threads": 4, "depth": 1}]
)
def test_micro_batches_threads_and_depth_do_not_matter(make_cache, options):
    cache = make_cache(SHARDS)
    expected = [rows_by_position(batch) for batch in take(cache, 12)]
    assert [rows_by_position(batch) for batch in take(cache, 12, **options)] == expected


def test_a_resumed_stream_is_the_undisturbed_one(make_cache):
    cache = make_cache(SHARDS)
    undisturbed = [rows_by_position(batch) for batch in take(cache, 15, policy=RowPolicy(caption_dropout=0.3))]
    for start in (1, 6, 14):
        resumed = take(cache, 15 - start, start=start, policy=RowPolicy(caption_dropout=0.3))
        assert [rows_by_position(batch) for batch in resumed] == undisturbed[start:]


@pytest.mark.parametrize("excluded", [(0, 1), (2, 3, 9), (4,)])
def test_batches_that_are_passed_over_change_no_other(make_cache, excluded):
    """The others keep their rows and their noise, whoever else is left out."""
    cache = make_cache(SHARDS)
    undisturbed = [rows_by_position(batch) for batch in take(cache, 12)]
    kept = [rows for index, rows in enumerate(undisturbed) if index not in excluded]
    assert [rows_by_position(batch) for batch in take(cache, len(kept), excluded=excluded)] == kept


def test_a_restarted_stream_is_one_that_was_opened_there(make_cache):
    """In the middle of a batch, backwards, past others; and the old source is closed."""
    cache = make_cache(SHARDS)
    undisturbed = [rows_by_position(batch) for batch in take(cache, 12)]
    stream = open_stream(cache)
    for _ in range(7):
        for _ in next(stream):
            break  # not to its end
    stream.restart(CachedRows(cache, stream.order), 2, (3, 4))
    found = [rows_by_position([copy_of(rows) for rows in next(stream)]) for _ in range(5)]
    assert found == [undisturbed[index] for index in (2, 5, 6, 7, 8)]
    stream.close()
    assert not open_tars(cache)


def test_a_rank_knows_its_own_samples_and_what_stands_in_for_damaged_ones(make_cache):
    cache = make_cache([("photos", "32x32", 4)])
    damage(cache, 1)
    for rank in range(2):
        stream = open_stream(cache, size=4, rank=rank, world_size=2, policy=RowPolicy(max_bad_samples=1))
        list(next(stream))
        names = stream.keys(stream.current)[2 * rank : 2 * rank + 2]
        expected = [name.replace("-1", "-2") if name.endswith("-1") else name for name in names]
        assert [key for _, _, key in stream.own_samples()] == expected
        assert all(shard == 0 and key.endswith(f"-{row}") for shard, row, key in stream.own_samples())
        stream.close()


def test_the_last_micro_batch_is_marked(make_cache):
    for batch in take(make_cache(SHARDS), 12, micro=2):
        assert [rows.is_last for rows in batch] == [False] * (len(batch) - 1) + [True]


def test_smaller_buckets_get_more_rows_a_forward(make_cache):
    stream = open_stream(make_cache(SHARDS), size=64, micro=2)
    largest, square = Bucket(48, 64), Bucket(32, 32)
    assert stream.micro_batch_size(largest) == 2
    assert stream.micro_batch_size(square) == 6
    assert stream.micro_batch_size(square) * square.tokens <= 2 * largest.tokens
    assert (stream.num_micro_steps(largest), stream.num_micro_steps(square)) == (32, 11)
    for _ in range(8):
        batch = [len(rows.weight) for rows in next(stream)]
        bucket = Bucket.parse(stream.current.pool[1])
        assert len(batch) == stream.num_micro_steps(bucket)
        assert max(batch) == stream.micro_batch_size(bucket)
        assert sum(batch) == 64
    stream.close()


def test_a_larger_bucket_that_is_all_held_out_does_not_count(make_cache):
    stream = open_stream(make_cache([("a", "32x32", 4), ("a", "128x128", 2, "holdout")]), micro=2)
    assert stream.micro_batch_size(Bucket(32, 32)) == 2
    stream.close()


@pytest.mark.fault(28, "odd numbers of samples")
def test_an_odd_sample_out_is_trained_on_too(make_cache):
    """Five samples in batches of two: every epoch ends inside a batch, and the next begins there."""
    batches = take(make_cache([("a", "32x32", 3), ("a", "32x32", 2)]), 10, size=2, micro=1)
    latents = [rows.latents.view(torch.uint8).numpy().tobytes() for batch in batches for rows in batch]
    for start in range(0, 20, 5):
        assert len(set(latents[start : start + 5])) == 5


FEW = [[("a", "32x32", 1)], [("a", "32x32", 2), ("a", "32x32", 40)], [("a", "32x32", 1)] * 3]


@pytest.mark.fault(28, "more ranks than shards, samples or rows")
@pytest.mark.parametrize("shards", FEW, ids=["one sample", "unequal shards", "shards of one sample"])
@pytest.mark.parametrize("size", [1, 4])
def test_more_ranks_than_shards_samples_or_rows_stay_in_step(make_cache, shards, size):
    cache = make_cache(shards)
    shares = [take(cache, 6, size=size, rank=rank, world_size=7, micro=2) for rank in range(7)]
    alone = [rows_by_position(batch) for batch in take(cache, 6, size=size)]
    for index in range(6):
        assert len({tuple(len(rows.weight) for rows in share[index]) for share in shares}) == 1
        found = [rows_by_position(share[index]) for share in shares]
        assert sum(map(len, found)) == size
        assert {position: row for part in found for position, row in part.items()} == alone[index]


@pytest.mark.parametrize("world_size", [1, 2, 4, 6])
def test_streams_are_read_as_the_order_says(make_cache, world_size):
    """Two canonical streams: the same rows in the same places for any number of ranks, half of each batch from each."""
    cache = make_cache([("a", "32x32", count) for count in (3, 1, 4, 2, 5, 1, 3, 2, 4)])
    alone = [rows_by_position(batch) for batch in take(cache, 8, size=6, streams=2)]
    shares = [take(cache, 8, size=6, streams=2, rank=rank, world_size=world_size) for rank in range(world_size)]
    for index in range(8):
        together = {position: row for share in shares for position, row in rows_by_position(share[index]).items()}
        assert together == alone[index]
    order = open_stream(cache, size=6, streams=2).order
    shards_of = [
        {shard for index in range(8) for shard in order.batch(index, half).shards.tolist()}
        for half in (range(3), range(3, 6))
    ]
    assert len(shards_of[0] & shards_of[1]) <= 1


# --- texts in 8 bits --------------------------------------------------------------------------------------------------


def test_texts_of_an_int8_cache_are_bf16_once_their_rows_are_moved(make_cache, make_text):
    cache = make_cache(SHARDS, text_dtype="int8")
    empty = make_text("the empty caption", "int8")
    texts = [make_text(f"text-{number:016x}", "int8") for number in range(2)]
    stream = open_stream(cache, policy=RowPolicy(caption_dropout=0.4))
    num_dropped = 0
    for index in range(12):
        for rows in next(stream):
            moved = rows.to(torch.device("cpu"))
            assert rows.t5.dtype == torch.int8 and moved.t5.dtype == torch.bfloat16 and moved.t5_scale is None
            keys = stream.keys(stream.current)
            for place, position in enumerate(rows.position.tolist()):
                dropped = draw_caption_dropout(SEED, position, 0.4)
                num_dropped += dropped
                stored = empty if dropped else texts[int(keys[position - 7 * index].split("-")[2]) % 2]
                expected = (stored["t5"].float() * stored["t5_scale"][:, None]).bfloat16()
                assert torch.equal(moved.t5[place], expected)
                assert torch.equal(moved.pooled[place], stored["pooled"])
    stream.close()
    assert num_dropped > 10


def test_an_int8_cache_differs_from_its_bf16_twin_in_the_texts_alone(make_cache, tmp_path):
    bf16 = take(make_cache(SHARDS), 6)
    (tmp_path / "made-up-cache").rename(tmp_path / "twin")
    for ours, twin in zip(take(make_cache(SHARDS, text_dtype="int8"), 6), bf16, strict=True):
        for rows, others in zip(ours, twin, strict=True):
            moved = rows.to(torch.device("cpu"))
            for name, value in vars(others).items():
                if isinstance(value, Tensor) and name != "t5":
                    assert torch.equal(getattr(moved, name), value), name
            largest = others.t5.float().abs().amax(dim=-1, keepdim=True)
            assert ((moved.t5.float() - others.t5.float()).abs() <= largest / 127 + 1e-6).all()
            assert not torch.equal(moved.t5, others.t5)


def test_padding_rows_of_an_int8_cache_are_finite(make_cache):
    for batch in take(make_cache(SHARDS, text_dtype="int8"), 4, size=4, rank=0, world_size=3, micro=1):
        for rows in batch:
            moved = rows.to(torch.device("cpu"))
            assert torch.isfinite(moved.t5).all()
            assert not moved.t5[rows.weight == 0].any()


# --- memory, threads and files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 3])
def test_memory_is_used_again_only_after_the_next_was_asked_for(make_cache, depth):
    stream = open_stream(make_cache(SHARDS), micro=1, depth=depth, threads=4)
    places = set()
    for _ in range(6):
        for rows in next(stream):
            before = copy_of(rows)
            for ahead in stream._ahead:  # everything that is read ahead has been read
                ahead.ready.result()
            for name, value in vars(rows).items():
                if isinstance(value, Tensor):
                    assert torch.equal(value, getattr(before, name)), f"{name} changed in its user's hands"
            places.add(rows.latents.data_ptr())
    stream.close()
    assert len(places) == depth + 1, "memory for every micro-batch anew"


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_a_batch_that_is_left_early_disturbs_no_other(make_cache, taken):
    cache = make_cache(SHARDS)
    expected = [rows_by_position(batch) for batch in take(cache, 12)]
    stream = open_stream(cache)
    kept, places = [], set()
    for index in range(12):
        micro_batches = next(stream)
        if index % 2:
            for _ in range(taken):
                places.add(next(micro_batches).latents.data_ptr())
            kept.append(micro_batches)  # not closed: its user merely looks away
            continue
        copies = []
        for rows in micro_batches:
            places.add(rows.latents.data_ptr())
            copies.append(copy_of(rows))
        assert rows_by_position(copies) == expected[index]
    assert len(places) <= 4
    stream.close()


def test_the_iterator_of_an_earlier_batch_has_ended(make_cache):
    stream = open_stream(make_cache(SHARDS), micro=1)
    early = next(stream)
    next(early)
    late = next(stream)
    assert list(early) == []
    rows = next(late)
    before = copy_of(rows)
    assert list(early) == []
    assert torch.equal(rows.latents, before.latents)
    assert len(list(late)) == 6
    stream.close()


@pytest.mark.fault(30, "an error in the thread that reads ahead")
def test_a_stream_does_not_pass_over_what_it_cannot_read(make_cache):
    cache = make_cache([("a", "32x32", 4)])
    damage(cache, 1)
    expected = open_stream(cache, size=1, micro=1)
    bad = next(number for number in range(4) if expected.order.batch(number).rows.tolist() == [1])
    expected.close()
    stream = open_stream(cache, size=1, micro=1)
    for _ in range(bad):
        assert len(list(next(stream))) == 1
    for _ in range(3):
        with pytest.raises(
            InputError, match=r"1 damaged sample.*max_bad_samples is 0: shards/a/32x32-000000\.tar row 1"
        ):
            list(next(stream))
    stream.close()
    gc.collect()  # the error's frames hold the shard
    assert open_tars(cache) == []
