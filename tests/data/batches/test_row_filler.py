from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from configs.errors import InputError
from data.batches.micro_batch import unpack_mask
from data.batches.noise import draw_caption_dropout, draw_mask_dropout, draw_unmasked
from data.batches.row_filler import ReplacedRow, RowPolicy
from data.batches.shard_reader import DamagedShard
from data.cache_layout import EMPTY_TEXT, full_mask_name
from tests.data.batches.streams import SEED, SHARDS, damage, open_stream, take

# --- captions ---------------------------------------------------------------------------------------------------------


def test_a_dropped_caption_is_the_empty_one_where_the_position_says(make_cache, make_text):
    cache = make_cache(SHARDS)
    empty = make_text("the empty caption")
    plain = take(cache, 20)
    dropped = 0
    for index, batch in enumerate(take(cache, 20, policy=RowPolicy(caption_dropout=0.4))):
        for rows, with_caption in zip(batch, plain[index], strict=True):
            for place, position in enumerate(rows.position.tolist()):
                is_dropped = draw_caption_dropout(SEED, position, 0.4)
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


# --- masks ------------------------------------------------------------------------------------------------------------


def variants_by_epoch(cache, make_sample, policy, num_epochs):
    """Per sample, the mask variants that it was trained with, epoch after epoch. Three variants, batches of one."""
    stream = open_stream(cache, size=1, micro=1, policy=policy)
    found = {}
    for _ in range(num_epochs * int(cache.table.samples.sum())):
        rows = next(next(stream))
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
        blank = load_file(cache.folder / full_mask_name(str(after.bucket)))["masked_latents"]
        for place, position in enumerate(after.position.tolist()):
            is_dropped = draw_mask_dropout(SEED, position, 0.4)
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


def test_the_mask_is_ignored_by_chance_and_nothing_else_of_the_row_changes(make_cache):
    cache = make_cache(SHARDS)
    plain, chance = take(cache, 20), take(cache, 20, policy=RowPolicy(unmasked_probability=0.4))
    ignored = 0
    for before, after in zip((r for b in plain for r in b), (r for b in chance for r in b), strict=True):
        real = after.weight > 0
        drawn = [draw_unmasked(SEED, position, 0.4) for position in after.position[real].tolist()]
        assert after.unmasked[real].tolist() == drawn and not before.unmasked.any()
        assert not after.unmasked[~real].any()
        ignored += sum(drawn)
        for name in ("mask", "latents", "noise", "uniform"):
            assert torch.equal(getattr(after, name), getattr(before, name))
    assert 30 < ignored < 80  # of 140


@pytest.mark.parametrize("damage", ["missing", "bit", "another bucket's"])
def test_a_damaged_blank_is_named(make_cache, damage):
    cache = make_cache(SHARDS)
    path = cache.folder / full_mask_name("48x64")
    if damage == "missing":
        path.unlink()
    elif damage == "bit":
        data = bytearray(path.read_bytes())
        data[-9] ^= 1
        path.write_bytes(data)
    else:
        path.write_bytes((cache.folder / full_mask_name("32x32")).read_bytes())
    take(cache, 1)
    with pytest.raises(
        InputError, match=r"blank_48x64\.safetensors: cannot be read .* run `fluxfill preprocess CONFIG`"
    ):
        open_stream(cache, policy=RowPolicy(mask_dropout=0.1))


# --- damaged rows that are replaced -----------------------------------------------------------------------------------


def by_key(cache, num_batches, **options):
    """Position -> (key, bytes of the stored tensors, what was drawn) of the first batches; and the replaced rows."""
    found = {}
    with closing(open_stream(cache, **options)) as stream:
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
    with pytest.raises(DamagedShard, match=r"32x32-000000\.tar: a-0-\d .* No other sample of the shard is intact"):
        by_key(cache, 1, size=3, policy=RowPolicy(max_bad_samples=9))
