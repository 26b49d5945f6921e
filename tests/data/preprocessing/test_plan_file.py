import gc
import tracemalloc

import pytest

from configs.errors import InputError
from data.preprocessing.plan_file import read_plan, write_plan
from data.samples.plan import PlannedSample
from tests.data.samples.test_shard_plan import many_samples, plan


@pytest.fixture
def shared(tmp_path):
    """(plans, the same read from a file)."""
    plans = plan(many_samples(), size_limit=100_000)
    write_plan(tmp_path / "plan", plans)
    return plans, read_plan(tmp_path / "plan")


def test_every_shard_comes_back_as_it_was(shared):
    plans, file = shared
    assert len(plans) > 20
    assert [file.load(head) for head in file.specs] == plans
    assert list(file.shards()) == plans
    assert all(isinstance(sample, PlannedSample) for shard in file.shards() for sample in shard.samples)


def test_heads_tell_all_but_the_samples(shared):
    plans, file = shared
    for head, shard in zip(file.specs, plans, strict=True):
        for name in ("path", "dataset", "bucket", "split", "plan", "num_bytes"):
            assert getattr(head, name) == getattr(shard, name)
        assert head.num_samples == shard.num_samples == len(shard.samples)


def test_samples_stay_in_the_file(tmp_path):
    """With them, every worker of a machine would hold 5 KiB for each, for millions of them."""
    samples = many_samples(3000)
    write_plan(tmp_path / "plan", plan(samples, size_limit=1_000_000))
    gc.collect()
    tracemalloc.start()
    file = read_plan(tmp_path / "plan")
    gc.collect()
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(head.num_samples for head in file.specs) == 3000
    assert kept < 100 * 3000


@pytest.mark.parametrize("kept", [0, 7, 400, -1], ids=["nothing", "half a footer", "a start", "all but a byte"])
def test_a_plan_that_was_cut_off_is_named(shared, kept):
    path = shared[1].path
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match=rf"{path}: the plan .* is damaged \(.*\)\. Look at the disk"):
        read_plan(path)


def test_a_bit_that_fell_over_is_named_wherever_it_lies(shared):
    _, file = shared
    whole = file.path.read_bytes()
    last = file.specs[-1]
    for position in (sum(file.places[last.path]) // 2, len(whole) - 40, len(whole) - 12, len(whole) - 1):
        file.path.write_bytes(whole[:position] + bytes([whole[position] ^ 64]) + whole[position + 1 :])
        with pytest.raises(InputError, match=r"the plan .* is damaged"):
            list(read_plan(file.path).shards())


def test_a_plan_of_nothing_is_one(tmp_path):
    write_plan(tmp_path / "plan", [])
    assert read_plan(tmp_path / "plan").specs == ()
    with pytest.raises(FileNotFoundError):
        read_plan(tmp_path / "another")
