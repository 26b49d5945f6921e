import gc
import os
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from configs.errors import InputError
from data.geometry import Bucket
from data.manifest import EMPTY_TEXT, TRAIN, blank_name, parse_bucket
from data.micro_batch import MicroBatch, unpack_mask
from data.noise import draw_dropout, draw_noise, draw_uniform, draw_variant, draw_whole_hole
from data.order import Order, OrderSettings, hash_shards
from data.reader import BatchStream
from data.row_filler import ReplacedRow, RowPolicy
from data.shard_reader import DamagedSample, DamagedShard, ShardReader
from data.shards import index_path

SEED = 11
SHARDS = [
    ("photos", "48x64", 5),
    ("photos", "48x64", 3),
    ("photos", "32x32", 4),
    ("photos", "64x32", 3),
    ("photos", "48x64", 9, "holdout"),
    ("removal", "48x64", 7),
]


def open_stream(cache, *, size=7, rank=0, world_size=1, micro=2, streams=1, **options):
    table = cache.table
    samples = np.where(table.split == TRAIN, table.samples, 0)
    weights = dict.fromkeys(table.dataset.tolist(), 1.0)
    settings = OrderSettings.current(
        seed=SEED, global_batch_size=size, weights=weights, shards=hash_shards(table.path, samples), streams=streams
    )
    order = Order(table.dataset, table.bucket, samples, settings)
    return BatchStream(cache, order, rank=rank, world_size=world_size, micro_batch_size=micro, **options)


def copy_of(rows: MicroBatch) -> MicroBatch:
    return replace(rows, **{name: value.clone() for name, value in vars(rows).items() if isinstance(value, Tensor)})


def take(cache, num_batches, **options):
    """The first batches of a stream: a list of micro-batches each."""
    stream = open_stream(cache, **options)
    batches = [[copy_of(rows) for rows in next(stream)] for _ in range(num_batches)]
    stream.close()
    return batches


def rows_by_position(micro_batches):
    """Position -> bytes of all of a row's tensors, for the rows that count."""
    found = {}
    for rows in micro_batches:
        for place in torch.nonzero(rows.weight).flatten().tolist():
            position = int(rows.position[place])
            assert position not in found, "a row came twice"
            found[position] = tuple(
                bytes(value[place].contiguous().view(-1).view(torch.uint8).numpy())
                for value in vars(rows).values()
                if isinstance(value, Tensor)
            )
    return found


def open_tars():
    """The shards this process has open."""
    paths = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            paths.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        except FileNotFoundError:
            continue
    return [path for path in paths if path.endswith(".tar")]


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


def test_rows_that_fill_up_have_weight_0_and_finite_numbers(make_cache):
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


def test_idle_rows_hold_nothing_of_the_rows_before_them(make_cache):
    """Their memory was a row's; what they hold must not depend on what was read before."""
    cache = make_cache(SHARDS)
    for batch in take(cache, 8, size=4, rank=0, world_size=3, micro=1):
        for rows in batch:
            for place in torch.nonzero(rows.weight == 0).flatten().tolist():
                assert not rows.latents[place].any()
                assert not rows.t5[place].any()
                assert not rows.noise[place].any()


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
        bucket = parse_bucket(stream.current.pool[1])
        assert len(batch) == stream.num_micro_steps(bucket)
        assert max(batch) == stream.micro_batch_size(bucket)
        assert sum(batch) == 64
    stream.close()


def test_a_larger_bucket_that_is_all_held_out_does_not_count(make_cache):
    stream = open_stream(make_cache([("a", "32x32", 4), ("a", "128x128", 2, "holdout")]), micro=2)
    assert stream.micro_batch_size(Bucket(32, 32)) == 2
    stream.close()


def test_an_odd_sample_out_is_trained_on_too(make_cache):
    """Five samples in batches of two: every epoch ends inside a batch, and the next begins there."""
    batches = take(make_cache([("a", "32x32", 3), ("a", "32x32", 2)]), 10, size=2, micro=1)
    latents = [rows.latents.view(torch.uint8).numpy().tobytes() for batch in batches for rows in batch]
    for start in range(0, 20, 5):
        assert len(set(latents[start : start + 5])) == 5


FEW = [[("a", "32x32", 1)], [("a", "32x32", 2), ("a", "32x32", 40)], [("a", "32x32", 1)] * 3]


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


# --- captions ---------------------------------------------------------------------------------------------------------


def test_a_dropped_caption_is_the_empty_one_where_the_position_says(make_cache, make_text):
    cache = make_cache(SHARDS)
    empty = make_text("the empty caption")
    plain = take(cache, 20)
    dropped = 0
    for index, batch in enumerate(take(cache, 20, policy=RowPolicy(caption_dropout=0.4))):
        for rows, with_caption in zip(batch, plain[index], strict=True):
            for place, position in enumerate(rows.position.tolist()):
                is_dropped = draw_dropout(SEED, position, 0.4)
                dropped += is_dropped
                for name in ("t5", "pooled"):
                    expected = empty[name] if is_dropped else getattr(with_caption, name)[place]
                    assert torch.equal(getattr(rows, name)[place], expected)
                assert torch.equal(rows.latents[place], with_caption.latents[place])
                assert torch.equal(rows.noise[place], with_caption.noise[place])
    assert 30 < dropped < 80  # of 140


def test_without_dropout_the_empty_caption_is_not_needed(make_cache):
    cache = make_cache(SHARDS)
    (cache.folder / EMPTY_TEXT).unlink()
    assert len(take(cache, 1)) == 1
    with pytest.raises(Exception, match=rf"{EMPTY_TEXT}: cannot be read .* run `fluxfill preprocess CONFIG` again"):
        open_stream(cache, policy=RowPolicy(caption_dropout=0.1))


def test_an_empty_caption_with_a_flipped_bit_is_refused(make_cache):
    cache = make_cache(SHARDS)
    data = bytearray((cache.folder / EMPTY_TEXT).read_bytes())
    data[-5] ^= 1
    (cache.folder / EMPTY_TEXT).write_bytes(data)
    with pytest.raises(InputError, match=rf"{EMPTY_TEXT}: cannot be read \(its checksum differs\)"):
        open_stream(cache, policy=RowPolicy(caption_dropout=0.1))


def test_an_empty_caption_of_another_length_is_refused(make_cache):
    cache = make_cache(SHARDS)
    other = replace(cache, manifest=replace(cache.manifest, text_length=1))
    with pytest.raises(Exception, match=rf"{EMPTY_TEXT}: .*it holds .*\[8, 6\].*, not .*\[1, 6\]"):
        open_stream(other, policy=RowPolicy(caption_dropout=0.1))


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
                dropped = draw_dropout(SEED, position, 0.4)
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


def test_idle_rows_of_an_int8_cache_are_finite(make_cache):
    for batch in take(make_cache(SHARDS, text_dtype="int8"), 4, size=4, rank=0, world_size=3, micro=1):
        for rows in batch:
            moved = rows.to(torch.device("cpu"))
            assert torch.isfinite(moved.t5).all()
            assert not moved.t5[rows.weight == 0].any()


# --- masks ------------------------------------------------------------------------------------------------------------


def variants_by_epoch(cache, make_sample, policy, num_epochs):
    """Per sample, the mask variants that it was trained with, epoch after epoch. Three variants, batches of one."""
    stream = open_stream(cache, size=1, micro=1, policy=policy)
    found = {}
    for _ in range(num_epochs * int(cache.table.samples.sum())):
        (rows,) = list(next(stream))
        (key,) = stream.keys(stream.current)
        stored = make_sample(key, rows.bucket, text="", num_variants=3)
        bits = np.unpackbits(rows.mask[0].numpy(), axis=1).astype(bool)
        (variant,) = [number for number in range(3) if (stored.masks[number] == bits).all()]
        assert torch.equal(rows.masked_latents[0], stored.masked_latents[variant])
        found.setdefault(key, []).append(variant)
    stream.close()
    return found


def test_masks_are_chosen_as_the_policy_says(make_cache, make_sample):
    cache = make_cache([("a", "32x32", 5), ("a", "32x32", 4)], num_variants=3)
    first = variants_by_epoch(cache, make_sample, RowPolicy(mask_choice="first"), 2)
    assert set(map(tuple, first.values())) == {(0, 0)}
    cycle = variants_by_epoch(cache, make_sample, RowPolicy(mask_choice="cycle"), 6)
    for variants in cycle.values():
        assert set(variants[:3]) == {0, 1, 2}
        assert variants[3:] == variants[:3]
    assert {variants[0] for variants in cycle.values()} == {0, 1, 2}, "all at the same variant"
    random = variants_by_epoch(cache, make_sample, RowPolicy(mask_choice="random"), 9)
    counts = np.bincount([variant for variants in random.values() for variant in variants], minlength=3)
    assert counts.min() > 15  # of 81
    assert len(set(map(tuple, random.values()))) == 9


def test_a_dropped_mask_is_a_hole_as_large_as_the_picture(make_cache):
    cache = make_cache(SHARDS)
    plain, whole = take(cache, 20), take(cache, 20, policy=RowPolicy(mask_dropout=0.4, caption_dropout=0.2))
    dropped = 0
    for before, after in zip((r for b in plain for r in b), (r for b in whole for r in b), strict=True):
        blank = load_file(cache.folder / blank_name(str(after.bucket)))["masked_latents"]
        for place, position in enumerate(after.position.tolist()):
            is_dropped = draw_whole_hole(SEED, position, 0.4)
            dropped += is_dropped
            if is_dropped:
                assert unpack_mask(after.mask)[place].min() == 1
                assert torch.equal(after.masked_latents[place], blank)
            else:
                assert torch.equal(after.mask[place], before.mask[place])
                assert torch.equal(after.masked_latents[place], before.masked_latents[place])
            assert torch.equal(after.latents[place], before.latents[place])
            assert torch.equal(after.noise[place], before.noise[place])
    assert 30 < dropped < 80  # of 140


@pytest.mark.parametrize("damage", ["missing", "bit", "another bucket's"])
def test_a_damaged_blank_is_named(make_cache, damage):
    cache = make_cache(SHARDS)
    path = cache.folder / blank_name("48x64")
    if damage == "missing":
        path.unlink()
    elif damage == "bit":
        data = bytearray(path.read_bytes())
        data[-9] ^= 1
        path.write_bytes(data)
    else:
        path.write_bytes((cache.folder / blank_name("32x32")).read_bytes())
    take(cache, 1)
    with pytest.raises(
        InputError, match=r"blank_48x64\.safetensors: cannot be read .* run `fluxfill preprocess CONFIG`"
    ):
        open_stream(cache, policy=RowPolicy(mask_dropout=0.1))


# --- memory, threads and files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 3])
def test_memory_is_used_again_only_after_the_next_was_asked_for(make_cache, depth):
    stream = open_stream(make_cache(SHARDS), micro=1, depth=depth, threads=4)
    places = set()
    for _ in range(6):
        for rows in next(stream):
            before = copy_of(rows)
            for ahead in stream._ahead:  # everything that is read ahead has been read
                for future in ahead.work:
                    future.result()
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


def test_a_closed_stream_leaves_no_thread_and_no_file(make_cache):
    cache = make_cache(SHARDS)
    before = threading.active_count()
    stream = open_stream(cache, threads=3)
    next(next(stream))
    assert threading.active_count() > before
    assert open_tars()
    stream.close()
    stream.close()
    assert threading.active_count() == before
    assert open_tars() == []
    with pytest.raises(RuntimeError):
        next(next(stream))


def test_a_forgotten_stream_leaves_no_file(make_cache):
    cache = make_cache(SHARDS)
    stream = open_stream(cache)
    next(next(stream))
    assert open_tars()
    del stream
    deadline = time.monotonic() + 10
    while open_tars() and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert open_tars() == []


def test_few_shards_stay_open(make_cache, make_sample, monkeypatch):
    monkeypatch.setattr("data.shard_reader._OPEN_SHARDS", 2)
    cache = make_cache([("a", "32x32", 2)] * 12)
    reader = ShardReader(cache)
    wrong = []

    def read_all(shift):
        out = np.empty(16 * 4 * 4 * 2, np.uint8)
        for turn in range(60):
            shard, row = (turn * 5 + shift) % 12, turn % 2
            reader.read(shard, row, {"latents": memoryview(out)})
            stored = make_sample(f"a-{shard}-{row}", Bucket(32, 32), text="").latents
            if out.tobytes() != stored.contiguous().view(torch.uint8).numpy().tobytes():
                wrong.append((shard, row))

    threads = [threading.Thread(target=read_all, args=(shift,)) for shift in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(open_tars()) <= 2
    reader.close()
    assert open_tars() == []


# --- damage -----------------------------------------------------------------------------------------------------------


ONE_SHARD = [("a", "48x64", 5)]


@pytest.fixture
def one_shard(make_cache):
    """(cache, path, index) of a single shard of five samples, two texts and two variants."""
    cache = make_cache(ONE_SHARD, num_variants=2)
    path = cache.folder / str(cache.table.path[0])
    return cache, path, ShardReader(cache).shard(0).index


def read_everything(cache):
    """Every member of the first shard, as bytes. Raises what the reader raises."""
    reader, manifest = ShardReader(cache), cache.manifest
    bucket = parse_bucket(str(cache.table.bucket[0]))
    h, w = bucket.latent_size
    sizes = {
        "latents": 16 * h * w * 2,
        "masked_latents": 16 * h * w * 2,
        "mask": bucket.height * bucket.width // 8,
        "t5": manifest.text_length * manifest.text_width * 2,
        "pooled": manifest.pooled_width * 2,
    }
    out = {name: memoryview(bytearray(size)) for name, size in sizes.items()}
    found = []
    for row in range(int(cache.table.samples[0])):
        for variant in range(reader.num_variants(0)):
            reader.read(0, row, out, variant=variant)
            found += [bytes(value) for value in out.values()]
    return found


def test_a_flipped_bit_in_a_shard_is_named_or_changes_nothing(one_shard):
    """Tar headers are not read: WebDataset's reader takes a bad one for the end, this one loses nothing by it."""
    cache, path, index = one_shard
    whole, expected = path.read_bytes(), read_everything(cache)
    data = np.zeros(len(whole), bool)
    for offset, size in [*index.latents.tolist(), *index.masked.reshape(-1, 2).tolist(), *index.texts.tolist()]:
        data[offset : offset + size] = True
    for place in range(3, len(whole), 61):
        damaged = bytearray(whole)
        damaged[place] ^= 32
        path.write_bytes(damaged)
        if data[place]:
            with pytest.raises(DamagedShard, match=r"48x64-000000\.tar: (first|the text of a-0-\d|a-0-\d).*Delete the"):
                read_everything(cache)
        else:
            assert read_everything(cache) == expected


@pytest.mark.parametrize("where", ["data", "header", "member boundary", "sample boundary", "empty", "last byte"])
def test_a_cut_shard_is_named(one_shard, where):
    cache, path, index = one_shard
    member = int(index.latents[2, 0])
    size = {
        "data": member + 300,
        "header": member - 200,
        "member boundary": int(index.masked[2, 0, 0]) - 512,
        "sample boundary": member - 512,
        "empty": 0,
        "last byte": int(cache.table.bytes[0]) - 1,
    }[where]
    os.truncate(path, size)
    with pytest.raises(
        DamagedShard, match=rf"48x64-000000\.tar: {size} bytes, the manifest says {cache.table.bytes[0]}"
    ):
        read_everything(cache)


@pytest.mark.parametrize("what", ["tar header", "tensor", "safetensors header", "from a tensor to the next sample"])
def test_zeros_over_a_part_of_a_shard_are_named_or_change_nothing(one_shard, what):
    """A sector that was lost. WebDataset ends a shard early at a tar header of zeros, without a word."""
    cache, path, index = one_shard
    expected, member = read_everything(cache), int(index.latents[2, 0])
    start, end = {
        "tar header": (member - 512, member),
        "tensor": (member + 200, member + 712),
        "safetensors header": (member, member + 60),
        "from a tensor to the next sample": (member + 300, int(index.latents[3, 0])),
    }[what]
    data = bytearray(path.read_bytes())
    data[start:end] = bytes(end - start)
    path.write_bytes(data)
    if what == "tar header":
        assert read_everything(cache) == expected
    else:
        with pytest.raises(DamagedSample, match=r"48x64-000000\.tar: a-0-2 \(latents, .* does not match its checksum"):
            read_everything(cache)


def test_the_first_members_damage_is_that_members_alone(one_shard):
    """Its header tells the reader how the shard's members look; the next ones tell it too."""
    cache, path, index = one_shard
    data = bytearray(path.read_bytes())
    for place in (index.latents[0, 0], index.masked[0, 0, 0], index.texts[0, 0]):
        data[int(place) + 3] ^= 255
    path.write_bytes(data)
    reader, out = ShardReader(cache), {"latents": memoryview(bytearray(16 * 6 * 8 * 2))}
    reader.read(0, 1, out)
    with pytest.raises(DamagedSample, match="a-0-0"):
        reader.read(0, 0, out)


def test_a_shard_that_is_cut_while_it_is_read_is_named(one_shard):
    cache, path, index = one_shard
    reader = ShardReader(cache)
    out = np.empty(16 * 6 * 8 * 2, np.uint8)
    reader.read(0, 0, {"latents": memoryview(out)})
    os.truncate(path, int(index.latents[3, 0]) + 100)
    reader.read(0, 2, {"latents": memoryview(out)})
    for row in (3, 4):
        with pytest.raises(DamagedShard, match=rf"a-0-{row} \(latents, \d+ bytes at \d+\): the file ends there"):
            reader.read(0, row, {"latents": memoryview(out)})


def test_a_page_in_the_place_of_a_shard_is_named(one_shard):
    cache, path, _ = one_shard
    page = b"<!DOCTYPE html><title>404</title>"
    path.write_bytes(page)
    with pytest.raises(DamagedShard, match=rf"{len(page)} bytes, the manifest says"):
        read_everything(cache)
    path.write_bytes(page + b" " * (int(cache.table.bytes[0]) - len(page)))
    with pytest.raises(DamagedShard, match=r"first latents member: no safetensors header"):
        read_everything(cache)


def test_a_missing_shard_is_waited_for_and_then_named(one_shard, no_waits, caplog):
    cache, path, _ = one_shard
    path.rename(path.with_suffix(".gone"))
    with pytest.raises(InputError, match=r"48x64-000000\.tar: cannot be opened \(No such file.*failed 8 time\(s\)"):
        read_everything(cache)
    assert sum("attempt" in record.message for record in caplog.records) == 7


@pytest.mark.parametrize("call", ["open", "preadv"])
def test_a_storage_that_fails_for_a_while_costs_time_alone(one_shard, no_waits, monkeypatch, call):
    cache, path, _ = one_shard
    expected = read_everything(cache)
    works, failures = getattr(os, call), [OSError(5, "Input/output error"), OSError(116, "Stale file handle")] * 3

    def fail_at_first(target, *arguments):
        if failures and (call == "preadv" or target == path):
            raise failures.pop()
        return works(target, *arguments)

    monkeypatch.setattr(f"os.{call}", fail_at_first)
    assert read_everything(cache) == expected
    assert not failures


def test_a_stale_handle_is_opened_anew(one_shard, no_waits, monkeypatch):
    cache, _, _ = one_shard
    reader = ShardReader(cache)
    stale, works = int(reader.shard(0).handle), os.preadv

    def fail_if_stale(handle, *arguments):
        if int(handle) == stale:
            raise OSError(116, "Stale file handle")
        return works(handle, *arguments)

    kept = os.dup(stale)  # the number is not given out again
    opened = reader.shard(0)
    monkeypatch.setattr("os.preadv", fail_if_stale)
    reader.read(0, 1, {"latents": memoryview(bytearray(16 * 6 * 8 * 2))})
    assert int(opened.handle) == stale
    os.close(kept)


def test_a_disk_that_keeps_failing_is_named(one_shard, no_waits, monkeypatch):
    cache, _, _ = one_shard
    reader = ShardReader(cache)
    reader.shard(0)

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.preadv", fail)
    with pytest.raises(InputError, match=r"48x64-000000\.tar: a-0-1 cannot be read \(Input/output error\): failed 8"):
        reader.read(0, 1, {"latents": memoryview(bytearray(16 * 6 * 8 * 2))})


def test_members_side_by_side_are_read_by_one_call(one_shard, monkeypatch):
    cache, _, _ = one_shard
    reader, calls, works = ShardReader(cache), [], os.preadv
    sizes = {"latents": 1536, "masked_latents": 1536, "mask": 384}
    out = {name: memoryview(bytearray(size)) for name, size in sizes.items()}
    monkeypatch.setattr("data.shard_reader._MAX_GAP", 1024)  # these members are small
    monkeypatch.setattr("os.preadv", lambda *arguments: calls.append(None) or works(*arguments))
    reader.read(0, 2, out, variant=0)
    assert len(calls) == 1
    reader.read(0, 2, out, variant=1)
    assert len(calls) == 3, "the first variant lies between"


def test_short_reads_are_finished(one_shard, monkeypatch):
    """Network filesystems may answer with less than was asked for."""
    cache, _, _ = one_shard
    expected = read_everything(cache)
    preadv, pread = os.preadv, os.pread
    monkeypatch.setattr("os.preadv", lambda handle, parts, offset: preadv(handle, [parts[0][:1]], offset))
    monkeypatch.setattr("os.pread", lambda handle, size, offset: pread(handle, min(size, 1000), offset))
    assert read_everything(cache) == expected


def test_a_lost_index_is_rebuilt_on_the_way(one_shard):
    cache, path, _ = one_shard
    expected = read_everything(cache)
    index_path(path).unlink()
    assert read_everything(cache) == expected
    assert index_path(path).is_file()


def test_a_damaged_index_is_named(one_shard):
    cache, path, _ = one_shard
    whole = index_path(path).read_bytes()
    damaged = bytearray(whole)
    damaged[-20] ^= 1
    index_path(path).write_bytes(damaged)
    with pytest.raises(Exception, match=r"48x64-000000\.index: damaged index .*Delete it: it is rebuilt"):
        read_everything(cache)


def test_another_shards_index_is_named(make_cache):
    cache = make_cache([("a", "32x32", 2), ("a", "32x32", 2)])
    first, second = (index_path(cache.folder / str(path)) for path in cache.table.path)
    first.write_bytes(second.read_bytes())
    with pytest.raises(DamagedShard, match=r"32x32-000000\.index: belongs to another shard. Delete it"):
        read_everything(cache)


def test_a_lost_index_of_a_damaged_shard_is_not_rebuilt(one_shard):
    cache, path, index = one_shard
    index_path(path).unlink()
    data = bytearray(path.read_bytes())
    data[int(index.latents[2, 0]) - 500] ^= 4  # a tar header: tarfile would end there
    path.write_bytes(data)
    with pytest.raises(Exception, match=r"48x64-000000\.tar: damaged shard \(sha256"):
        read_everything(cache)


def test_tensors_of_another_size_are_named(one_shard):
    cache, _, _ = one_shard
    other = replace(cache, table=replace(cache.table, bucket=np.array(["64x48"])))
    with pytest.raises(DamagedShard, match=r"first latents member: holds .*\[16, 6, 8\].* ask for .*\[16, 8, 6\]"):
        read_everything(other)
    longer = replace(cache, manifest=replace(cache.manifest, text_length=9))
    with pytest.raises(DamagedShard, match=r"first text member: holds .* ask for .*\[9, 6\]"):
        read_everything(longer)


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
    assert open_tars() == []


# --- damaged rows that are replaced -----------------------------------------------------------------------------------


def damage(cache, *rows, part="latents", shard=0):
    """Flip a bit in a member of some rows of a shard."""
    path = cache.folder / str(cache.table.path[shard])
    index = ShardReader(cache).shard(shard).index
    data = bytearray(path.read_bytes())
    for row in rows:
        place = {
            "latents": index.latents[row],
            "masked": index.masked[row, -1],
            "text": index.texts[index.text_row[row]],
        }
        data[int(place[part].sum()) - 20] ^= 1
    path.write_bytes(data)


def by_key(cache, num_batches, **options):
    """Key of each row -> its tensors' bytes, without position and what is drawn, of the first batches."""
    stream = open_stream(cache, **options)
    found = {}
    for _ in range(num_batches):
        for rows in next(stream):
            keys = stream.keys(stream.current)
            for place in torch.nonzero(rows.weight).flatten().tolist():
                position = int(rows.position[place])
                stored = (rows.latents, rows.masked_latents, rows.mask, rows.t5, rows.pooled)
                found[position] = (
                    keys[position - stream.current.position],
                    tuple(bytes(value[place].contiguous().view(-1).view(torch.uint8).numpy()) for value in stored),
                    (rows.noise[place].sum().item(), rows.uniform[place].item()),
                )
    stream.close()
    return found, stream.replaced()


@pytest.mark.parametrize("part", ["latents", "masked", "text"])
def test_a_damaged_row_is_replaced_by_the_next_whole_one(make_cache, caplog, part):
    cache = make_cache([("a", "32x32", 6)])
    whole, nothing = by_key(cache, 6, size=3, micro=2)
    assert nothing == []
    stored_of = {key: stored for key, stored, _ in whole.values()}
    damage(cache, *((1, 2) if part != "text" else (1,)), part=part)  # two texts, in turn: rows 1, 3 and 5 share one
    replacement = {"a-0-1": "a-0-3", "a-0-2": "a-0-3"}
    if part == "text":
        replacement = {"a-0-1": "a-0-2", "a-0-3": "a-0-4", "a-0-5": "a-0-0"}
    policy = RowPolicy(max_bad_samples=3)
    found, replaced = by_key(cache, 6, size=3, micro=2, policy=policy)
    for position, (key, stored, drawn) in found.items():
        assert (key, drawn) == (whole[position][0], whole[position][2]), "a position keeps its sample and its noise"
        assert stored == stored_of[replacement.get(key, key)]
    number = {f"a-0-{row}": row for row in range(6)}
    assert replaced == [
        ReplacedRow(position, "shards/a/32x32-000000.tar", number[key], number[replacement[key]])
        for position, (key, _, _) in sorted(found.items())
        if key in replacement
    ]
    assert len(replaced) == 3 * len(replacement), "three epochs"
    messages = [record.message for record in caplog.records]
    assert len(messages) == len(replacement), "each is told once"
    assert all("does not match its checksum" in text and "stands in for it" in text for text in messages)


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_and_every_resume_replaces_alike(make_cache, world_size):
    cache = make_cache([("a", "32x32", 6), ("a", "32x32", 5)])
    damage(cache, 0, 4, shard=0)
    damage(cache, 3, part="masked", shard=1)
    policy = RowPolicy(max_bad_samples=3)
    alone, replaced = by_key(cache, 12, size=5, policy=policy)
    assert len(replaced) >= 12
    together, by_ranks = {}, set()
    for rank in range(world_size):
        share, mine = by_key(cache, 12, size=5, policy=policy, rank=rank, world_size=world_size)
        together |= {position: row for position, row in share.items() if position not in together}
        by_ranks |= set(mine)
    assert sorted(by_ranks) == replaced
    assert {position: together[position] for position in alone} == alone
    resumed, all_replaced = by_key(
        cache, 5, size=5, policy=policy, start=7, replaced=[row for row in replaced if row.position < 35]
    )
    assert resumed == {position: row for position, row in alone.items() if position >= 35}
    assert all_replaced == replaced


def test_rows_that_are_read_ahead_are_not_yet_replaced(make_cache):
    cache = make_cache([("a", "32x32", 6)])
    damage(cache, 1)
    stream = open_stream(cache, size=1, micro=1, depth=6, policy=RowPolicy(max_bad_samples=1))
    at = next(index for index in range(6) if stream.order.batch(index).rows.tolist() == [1])
    for index in range(6):
        list(next(stream))
        assert len(stream.replaced()) == (index >= at)
    stream.close()


def test_more_damage_than_allowed_stops_and_says_where(make_cache):
    cache = make_cache([("a", "32x32", 6)])
    damage(cache, 0, 2, 5)
    by_key(cache, 6, size=3, policy=RowPolicy(max_bad_samples=3))
    with pytest.raises(
        InputError, match=r"3 damaged sample\(s\), guard\.max_bad_samples is 2: .*tar row 0, .* row 5\. Run"
    ):
        by_key(cache, 6, size=3, policy=RowPolicy(max_bad_samples=2))


def test_a_shard_without_a_whole_row_is_named(make_cache):
    cache = make_cache([("a", "32x32", 3)])
    damage(cache, 0, 1, 2)
    with pytest.raises(DamagedShard, match=r"32x32-000000\.tar: a-0-\d .* No other sample of the shard is whole"):
        by_key(cache, 1, size=3, policy=RowPolicy(max_bad_samples=9))


def test_a_packed_mask_is_unpacked(make_sample):
    masks = [make_sample(f"m{number}", Bucket(48, 64), text="").masks[0] for number in range(3)]
    packed = torch.from_numpy(np.packbits(np.stack(masks), axis=-1))
    unpacked = unpack_mask(packed)
    assert (unpacked.shape, unpacked.dtype) == ((3, 1, 48, 64), torch.float32)
    np.testing.assert_array_equal(unpacked[:, 0].bool().numpy(), np.stack(masks))
    assert unpacked.unique().tolist() == [0, 1]
