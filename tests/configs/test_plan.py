"""Plans of FLUX.1-Fill: states by the arithmetic of bytes a parameter, and what is chosen where."""

from pathlib import Path

import pytest

from configs.combinations import ENGINES
from configs.errors import InputError
from configs.fit import Cluster
from configs.flux_shape import FluxShape
from configs.gpu_profiles import gpu_names, load_gpu_profile
from configs.loading import load_config
from configs.memory import GIB
from configs.plan import Plan, Planned, plan_run

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
STATES = ("trained weights", "gradients", "state")


def plan(recipe: str, *overrides: str, gpu: str = "h100-80gb", nodes: int = 1, gpus: int = 8) -> Planned:
    config = load_config(CONFIGS / f"{recipe}.yaml", overrides)
    return plan_run(config, FluxShape(), Cluster(load_gpu_profile(gpu), nodes, gpus), tokens=4608)


def of(planned: Planned, engine: str) -> Plan:
    return next(plan for plan in planned.plans if plan.engine == engine)


@pytest.mark.parametrize("gpus, gib", [(8, 22.2), (16, 11.1), (32, 5.5), (64, 2.8)])
@pytest.mark.parametrize(
    "bytes_a_parameter, overrides",
    [
        (16, ["train.optimizer=adamw"]),
        (10 + 2 * 4 / 256, []),  # adamw8bit's moments, and a scale for 256 of them
        (8, ["train.optimizer=adamw", "train.weights=bf16_stochastic"]),
    ],
)
def test_sharded_states_are_so_many_bytes_a_parameter(gpus, gib, bytes_a_parameter, overrides):
    planned = plan("fill_full", "train.ema_decay=null", *overrides, nodes=gpus // 8)
    states = sum(part.gib for part in of(planned, "fsdp2").memory if part.what.endswith(STATES))
    assert states == pytest.approx(bytes_a_parameter * FluxShape().parameters / gpus / GIB, rel=0.01)
    assert states == pytest.approx(gib * bytes_a_parameter / 16, rel=0.02)  # as published, in two digits


@pytest.mark.parametrize(
    "engine, gib", [("zero1", (61.0, 52.7, 46.4)), ("zero2", (41.6, 31.9, 24.6)), ("zero3", (22.2, 11.1, 2.77))]
)
def test_partitioned_states_are_those_of_zero(engine, gib):
    for nodes, expected in zip((1, 2, 8), gib, strict=True):
        planned = plan("fill_full", "train.ema_decay=null", "train.optimizer=adamw", nodes=nodes)
        states = sum(part.gib for part in of(planned, engine).memory if part.what.endswith(STATES))
        assert states == pytest.approx(expected, rel=0.01)


def test_eight_bit_moments_take_two_bytes_and_their_scales():
    planned = plan("fill_full", "train.ema_decay=null")
    (moments,) = [part.gib for part in of(planned, "fsdp2").memory if part.what == "adamw8bit's state"]
    assert moments == pytest.approx(2 * FluxShape().parameters / 8 / GIB, rel=0.03)
    assert moments > 2 * FluxShape().parameters / 8 / GIB


def test_hsdp_shares_states_within_a_node():
    planned = plan("fill_full", nodes=4)
    weights = {name: of(planned, name).memory[0].gib for name in ("hsdp", "fsdp2")}
    assert weights["hsdp"] == pytest.approx(4 * weights["fsdp2"])


@pytest.mark.parametrize("recipe", ["fill_lora", "fill_full"])
def test_every_engine_is_planned_or_said_why_not(recipe):
    for nodes, gpus in ((1, 1), (1, 8), (2, 1), (4, 8)):
        planned = plan(recipe, nodes=nodes, gpus=gpus)
        told = {loser.engine for loser in planned.rejections} | ({planned.best.engine} if planned.best else set())
        assert told == set(ENGINES) and all(loser.reason for loser in planned.rejections)


@pytest.mark.parametrize("gpu", gpu_names())
def test_what_is_chosen_fits_and_is_the_fastest_that_does(gpu):
    for recipe in ("fill_lora", "fill_full"):
        planned = plan(recipe, gpu=gpu, nodes=2)
        if planned.best is not None:
            assert planned.best.bytes <= planned.cluster.usable_bytes
            fastest = min(plan.time.total for plan in planned.plans if plan.fits)
            assert planned.best.time.total <= 1.03 * fastest
        assert (planned.best is None) is not any(plan.fits for plan in planned.plans)


def test_a_lora_on_80_gb_needs_no_checkpointing_and_on_40_gb_of_some_blocks():
    assert plan("fill_lora").best.checkpointed == 0
    alone = plan("fill_lora", gpu="a100-40gb", gpus=1).best
    assert alone.engine == "single" and 0 < alone.checkpointed < alone.blocks == 57
    shared = plan("fill_lora", gpu="a100-40gb").best  # whose base lies in eighths
    assert shared.checkpointed < alone.checkpointed and shared.time.total < alone.time.total / 8


def test_the_named_blocks_are_those_of_the_model():
    with pytest.raises(InputError, match=r"activation_checkpointing is 58, and the model has 57 blocks \(19 double"):
        plan("fill_lora", "train.activation_checkpointing=58")


def test_a_full_fine_tune_fits_no_single_card_but_with_its_states_in_the_host():
    planned = plan("fill_full", gpus=1)
    assert planned.best.engine.endswith("-offload")
    single = of(planned, "single")
    [reason] = [loser.reason for loser in planned.rejections if loser.engine == "single"]
    assert not single.fits and "at least" in reason


def test_nothing_fits_a_card_of_a_gibibyte():
    card = load_gpu_profile("24GB").model_copy(update={"memory_gib": 1.0})
    config = load_config(CONFIGS / "fill_full.yaml")
    planned = plan_run(config, FluxShape(), Cluster(card, 1, 8), tokens=4608)
    assert planned.best is None and planned.smallest.bytes == min(plan.bytes for plan in planned.plans)


def test_what_a_config_names_is_planned_as_it_stands():
    written = plan("fill_full", "train.micro_batch_size=3", "train.activation_checkpointing=true").as_written
    assert (written.engine, written.micro_batch_size, written.checkpointed) == ("fsdp2", 3, 57)
    assert not plan("fill_full", "parallel.engine=ddp").as_written.fits


@pytest.mark.parametrize("gpus, engine", [(1, "single"), (8, "ddp")])
def test_of_auto_the_engine_that_is_started_is_what_is_written(gpus, engine):
    """And no other, which would fit or be faster: nothing would start it."""
    planned = plan("fill_lora", gpu="40gb", gpus=gpus)
    named = plan("fill_lora", f"parallel.engine={engine}", gpu="40gb", gpus=gpus)
    assert planned.engine == planned.as_written.engine == engine
    assert planned.as_written == named.as_written == of(planned, engine)
    with_micro = plan("fill_lora", "train.micro_batch_size=1", gpu="40gb", gpus=gpus)
    assert with_micro.as_written.engine == engine and with_micro.as_written.micro_batch_size == 1


def test_of_engines_that_are_as_fast_the_simpler_one_is_chosen():
    planned = plan("fill_lora", "train.global_batch_size=64", nodes=4)
    assert planned.best.engine == "ddp" and of(planned, "zero2").time.total < 1.03 * planned.best.time.total


def test_a_slow_network_makes_whole_shards_lose_to_shards_in_a_node():
    planned = plan("fill_full", nodes=16)
    assert of(planned, "hsdp").time.total < of(planned, "fsdp2").time.total
    assert planned.best.engine == "hsdp"
