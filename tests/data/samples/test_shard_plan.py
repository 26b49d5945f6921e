import re
from dataclasses import replace

import pytest

from configs.mask_recipe import OWN_MASKS, MaskRecipe
from data.cache.manifest import FORMAT_VERSION
from data.samples.geometry import Bucket, plan_crop
from data.samples.plan import PlannedSample, text_name
from data.samples.shard_plan import plan_shards, sample_bytes
from data.sources.picture_file import PictureFile
from data.sources.triples import Triple

ENCODING = {"encoders": {"vae": "abc"}, "text_length": 64}
TEXT_BYTES = 8192

SQUARE, WIDE = Bucket(64, 64), Bucket(48, 80)


def planned(
    name, *, caption="a cat", dataset="cats", bucket=SQUARE, split="train", content="0", recipe=OWN_MASKS, flip=False
):
    picture = PictureFile(name)
    triple = Triple(dataset, name, picture, picture, None, caption, content, content)
    size = (bucket.width, bucket.height)
    return PlannedSample(triple, size, bucket, plan_crop(*size, bucket), split, recipe, flip)


def plan(samples, *, size_limit=100_000, encoding=ENCODING):
    return plan_shards(
        samples, size_limit=size_limit, text_bytes=TEXT_BYTES, encoding=encoding, format_version=FORMAT_VERSION
    )


def many_samples(count=400):
    """Two datasets, two buckets, two splits; captions that 1, 3 or a third of the samples share."""
    samples = []
    for number in range(count):
        caption = ("the same", f"caption {number // 9}", f"caption {number}")[number % 3]
        samples.append(
            planned(
                f"picture-{number}",
                caption=caption,
                dataset="cats" if number % 5 else "dogs",
                bucket=SQUARE if number % 2 else WIDE,
                split="holdout" if number % 7 == 0 else "train",
            )
        )
    return samples


def changed(before, after):
    """Paths of the shards that a second run would write or delete."""
    old, new = ({shard.path: shard.plan for shard in plans} for plans in (before, after))
    return {path for path in old.keys() | new.keys() if old.get(path) != new.get(path)}


def test_every_sample_is_in_one_shard_of_its_kind():
    samples = many_samples()
    plans = plan(samples)
    assert len(plans) > 20
    dealt = [sample for shard in plans for sample in shard.samples]
    assert sorted(s.triple.name for s in dealt) == sorted(s.triple.name for s in samples)
    for shard in plans:
        for sample in shard.samples:
            assert (sample.triple.dataset, sample.bucket, sample.split) == (shard.dataset, shard.bucket, shard.split)
    assert len({shard.path for shard in plans}) == len(plans)


def test_the_plan_does_not_hang_on_the_order_of_the_samples():
    samples = many_samples()
    assert plan(samples) == plan(samples[::-1]) == plan(sorted(samples, key=lambda s: s.triple.key))


@pytest.mark.parametrize("size_limit", [60_000, 300_000, 2_000_000])
def test_no_shard_is_larger_than_the_limit(size_limit):
    for shard in plan(many_samples(), size_limit=size_limit):
        texts = {sample.text for sample in shard.samples}
        size = len(shard.samples) * sample_bytes(shard.bucket, num_variants=1) + len(texts) * TEXT_BYTES
        assert size <= size_limit


@pytest.mark.parametrize("variants", [1, 4, 16])
def test_shards_of_many_variants_hold_fewer_samples(variants):
    recipe = MaskRecipe(shares=(("box", 1.0),), variants=variants)
    plans = plan([planned(f"picture-{number}", recipe=recipe) for number in range(200)], size_limit=1_000_000)
    for shard in plans:
        assert len(shard.samples) * sample_bytes(shard.bucket, num_variants=variants) + TEXT_BYTES <= 1_000_000
    assert len(plans) >= 200 * sample_bytes(SQUARE, num_variants=variants) / 1_000_000


def test_a_sample_above_the_limit_gets_a_shard_of_its_own():
    plans = plan([planned(f"picture-{number}") for number in range(5)], size_limit=1)
    assert [len(shard.samples) for shard in plans] == [1] * 5


def test_equal_captions_share_a_shard():
    samples = [planned(f"picture-{number}", caption=f"caption {number // 4}") for number in range(200)]
    plans = plan(samples)
    assert len(plans) > 5
    shards_of = {}
    for shard in plans:
        for sample in shard.samples:
            shards_of.setdefault(sample.text, set()).add(shard.path)
    assert all(len(paths) == 1 for paths in shards_of.values())


def test_one_caption_for_everything_fills_many_shards():
    plans = plan([planned(f"picture-{number}") for number in range(500)])
    assert max(len(shard.samples) for shard in plans) < 50


@pytest.mark.parametrize("change", ["add", "remove", "picture", "caption"])
def test_a_changed_picture_touches_few_shards(change):
    samples = many_samples()
    before = plan(samples)
    assert len(before) > 20
    for number in range(0, 400, 40):
        sample = samples[number]
        if change == "add":
            after = [*samples, planned(f"new-{number}", caption=f"caption {number}")]
        elif change == "remove":
            after = [*samples[:number], *samples[number + 1 :]]
        else:
            field = {"picture": {"content": "other"}, "caption": {"caption": f"another {number}"}}[change]
            other = replace(sample, triple=replace(sample.triple, **field))
            after = [*samples[:number], other, *samples[number + 1 :]]
        touched = changed(before, plan(after))
        # A shard that overflows is replaced by its two halves.
        assert 1 <= len(touched) <= (4 if change in ("add", "caption") else 3)


CROWDS = {
    "one caption for all": lambda number: "the same",
    "every second": lambda number: "the same" if number % 2 else f"caption {number}",
    "three crowds": lambda number: f"crowd {number % 3}",
    "crowds that come one after the other": lambda number: f"crowd {number // 60}",
    "some of every size": lambda number: f"caption {int(20 * (number * 0.618034 % 1) ** 3)}",
    "one each": lambda number: f"caption {number}",
}


@pytest.mark.parametrize("size_limit", [40_000, 100_000, 250_000])
@pytest.mark.parametrize("kind", CROWDS)
def test_a_dataset_that_grows_picture_by_picture_rewrites_what_was_in_one_shard(kind, size_limit):
    """And one that shrinks: at no size of a caption's crowd are its samples dealt anew."""
    samples = [planned(f"picture-{number}", caption=CROWDS[kind](number)) for number in range(300)]
    smaller = plan(samples[:1], size_limit=size_limit)
    written = 0
    for count in range(2, len(samples) + 1):
        larger = plan(samples[:count], size_limit=size_limit)
        for before, after in ((smaller, larger), (larger, smaller)):
            there = {shard.path: shard.plan for shard in before}
            anew = [shard for shard in after if there.get(shard.path) != shard.plan]
            moved = {sample.key for shard in anew for sample in shard.samples} - {samples[count - 1].key}
            homes = [shard.path for shard in before if moved & {sample.key for sample in shard.samples}]
            if after is larger:
                assert len(homes) <= 1, f"picture {count} of {kind} rewrote {homes}"
                assert len(anew) <= 8
                written += len(anew)
            else:
                assert len(anew) <= 1, f"without picture {count} of {kind} {[shard.path for shard in anew]}"
        smaller = larger
    assert len(smaller) >= 9
    assert written <= 2 * len(samples)


def test_another_recipe_makes_every_shard_of_the_dataset_anew():
    def recipe_for_dogs(recipe):
        return [replace(s, recipe=recipe) if s.triple.dataset == "dogs" else s for s in many_samples()]

    before = plan(recipe_for_dogs(MaskRecipe(dilate=(0, 4), variants=1)))
    for other in (MaskRecipe(dilate=(0, 5)), MaskRecipe(shares=(("box", 1.0),)), MaskRecipe()):
        touched = changed(before, plan(recipe_for_dogs(other)))
        assert touched == {shard.path for shard in before if shard.dataset == "dogs"}


def test_a_mirror_image_is_a_sample_of_its_own():
    both = [planned("cat"), planned("cat", flip=True)]
    assert [sample.key for sample in both] == [both[0].triple.key, f"{both[0].triple.key}-flip"]
    (shard,) = plan(both)
    assert len(shard.samples) == 2
    assert {plan([sample])[0].plan for sample in both} | {shard.plan} != {shard.plan}
    assert len({plan([sample])[0].plan for sample in both}) == 2


def test_nothing_changes_when_nothing_changed():
    assert changed(plan(many_samples()), plan(many_samples())) == set()


@pytest.mark.parametrize("encoding", [{"encoders": {"vae": "abd"}, "text_length": 64}, ENCODING | {"text_length": 65}])
def test_other_encoders_make_every_shard_another(encoding):
    before, after = plan(many_samples()), plan(many_samples(), encoding=encoding)
    assert [shard.path for shard in before] == [shard.path for shard in after]
    assert changed(before, after) == {shard.path for shard in before}


def test_another_crop_makes_another_shard():
    sample = planned("picture")
    moved = replace(sample, crop=replace(sample.crop, left=1))
    assert plan([sample])[0].plan != plan([moved])[0].plan


def test_paths_say_what_is_inside():
    for shard in plan(many_samples()):
        split = "" if shard.split == "train" else "holdout-"
        assert re.fullmatch(
            rf"shards/{shard.dataset}/{split}{shard.bucket}(-[0-9a-f]{{16}})?-\d{{6,}}\.tar", shard.path
        )
        assert len(shard.path) < 80


def test_a_texts_name_is_a_name_in_a_tar():
    assert re.fullmatch(r"text-[0-9a-f]{16}", text_name("eine Katze, 猫"))
    assert text_name("a") != text_name("b") != text_name("")
