"""Micro-batch and checkpointed blocks by the room that is there: against every other way to cut up the step."""

from itertools import pairwise
from pathlib import Path

import pytest

from configs.fit import Cluster, Work, fit_step, named_fit
from configs.flux_shape import FluxShape
from configs.gpu_profiles import load_gpu_profile
from configs.loading import load_config
from configs.memory import GIB

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
ROOMS = [0.5, 3, 8, 20, 37, 60, 300]  # GiB


def work(recipe: str = "fill_lora", engine: str = "ddp", *overrides: str, nodes: int = 1, tokens: int = 4608) -> Work:
    config = load_config(CONFIGS / f"{recipe}.yaml", ["train.global_batch_size=96", *overrides])
    return Work(config, FluxShape(), engine, Cluster(load_gpu_profile("h100-80gb"), nodes, 8), tokens)


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("nodes, tokens", [(1, 4608), (4, 1536)])
def test_nothing_that_fits_is_faster(room, nodes, tokens):
    """Of every micro-batch and number of blocks."""
    each = work("fill_full", "fsdp2", nodes=nodes, tokens=tokens)
    found = fit_step(each, room * GIB)
    others = [
        (each.time(micro, cost).total, micro, blocks)
        for micro in range(1, each.rows + 1)
        for blocks in range(each.base.blocks + 1)
        if (cost := each.cost(micro, blocks)).peak <= room * GIB
    ]
    assert found.fits == bool(others)
    if others:
        assert found.cost.peak <= room * GIB
        assert found.time.total == pytest.approx(min(others)[0])
    else:
        assert found.micro_batch_size == 1
        assert found.cost.peak == min(each.cost(1, blocks).peak for blocks in range(58))


def test_more_room_never_makes_a_step_slower_and_frees_blocks():
    fits = [fit_step(work(), room * GIB) for room in ROOMS]
    assert all(more.time.total <= less.time.total for less, more in pairwise(fits[1:]))
    assert fits[1].checkpointed >= 54 and fits[-1].checkpointed == 0
    assert 0 < fits[3].checkpointed < 57  # 20 GiB: as few as fit
    assert work().cost(1, fits[3].checkpointed - 1).peak > 20 * GIB


def test_a_run_whose_kept_part_is_held_against_the_base_takes_a_forward_pass_longer():
    usual, base = (work("fill_lora", "ddp", f"flow.keep_target={keep}") for keep in ("picture", "base"))
    one, more = usual.cost(1, 0), base.cost(1, 0)
    assert more.matmul_flops + more.attention_flops - one.matmul_flops - one.attention_flops == pytest.approx(
        74.4e12, rel=0.01
    )
    assert more.peak == one.peak  # it holds nothing that the backward pass would find
    assert base.time(1, more).work > 1.3 * usual.time(1, one).work


def test_a_slow_network_is_hidden_behind_larger_micro_batches():
    near, far = (fit_step(work("fill_full", "fsdp2", nodes=nodes), 60 * GIB) for nodes in (1, 4))
    assert near.checkpointed == 0 < far.checkpointed and near.micro_batch_size < far.micro_batch_size


def test_what_is_named_is_taken():
    assert fit_step(work(), 60 * GIB, micro=3).micro_batch_size == 3
    assert fit_step(work(), 300 * GIB, checkpointed=12).checkpointed == 12
    both = fit_step(work(), 1 * GIB, micro=4, checkpointed=5)
    assert (both.micro_batch_size, both.checkpointed, both.fits) == (4, 5, False)


def test_a_bound_on_the_micro_batch_holds_and_leaves_fewer_blocks_to_checkpoint():
    many = work("fill_full", "fsdp2", nodes=4, tokens=1536)
    free = fit_step(many, 30 * GIB)
    bound = fit_step(many, 30 * GIB, at_most=free.micro_batch_size - 1)
    assert bound.fits and bound.micro_batch_size < free.micro_batch_size
    assert bound.checkpointed <= free.checkpointed and bound.time.total >= free.time.total
    assert fit_step(many, 300 * GIB, at_most=1).micro_batch_size == 1


def test_the_last_micro_batch_is_filled_up_as_little_as_can_be():
    """12 samples a GPU: in two or three steps of 6 or 4, never in 5 + 5 + 2."""
    sizes = {fit_step(work(), room * GIB, checkpointed=57).micro_batch_size for room in range(3, 60)}
    assert sizes <= {1, 2, 3, 4, 6, 12} and len(sizes) > 2


@pytest.mark.parametrize(
    "written, blocks", [("auto", None), ("true", 57), ("false", 0), ("0", 0), ("1", 1), ("57", 57)]
)
def test_a_config_names_blocks_by_a_word_or_a_number(written, blocks):
    config = load_config(CONFIGS / "fill_lora.yaml", [f"train.activation_checkpointing={written}"])
    assert named_fit(config, FluxShape()) == (None, blocks)
