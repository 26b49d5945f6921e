"""What GPUs exchange, against the figures of the communication model for FLUX.1's 11.9 B parameters."""

from pathlib import Path

import pytest

from configs.communication import Exchange, Exchanges, exchanges, reduces_to_owners
from configs.flux_shape import FluxShape
from configs.loading import load_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
N = FluxShape().parameters


def exchanged(recipe: str, engine: str, nodes: int, *overrides: str) -> Exchanges:
    config = load_config(CONFIGS / f"{recipe}.yaml", overrides)
    return exchanges(config, FluxShape(), engine, nodes=nodes, gpus_per_node=8)


@pytest.mark.parametrize("nodes", [1, 2, 8])
def test_full_shards_move_weights_twice_and_fp32_gradients(nodes):
    found, n = exchanged("fill_full", "fsdp2", nodes), 8 * nodes
    one = found.each_micro_step
    assert one.node + one.network == pytest.approx((2 * 2 * N + 4 * N) * (n - 1) / n)
    assert (one.network == 0) is (nodes == 1)
    assert found.of_step(4) == one.times(4)  # gradients are scattered every time


def test_hsdp_sends_an_eighth_of_the_gradients_over_the_network():
    found = exchanged("fill_full", "hsdp", 8)
    assert found.each_micro_step.network == 0
    assert found.of_step(4).network == pytest.approx(2 * 4 * N / 8 * 7 / 8)
    assert found.each_micro_step.node == pytest.approx(8 * N * 7 / 8)


def test_zero_gathers_once_a_step_however_many_micro_steps():
    one, two = (exchanged("fill_full", engine, 1) for engine in ("zero1", "zero2"))
    assert one.of_step(4) == one.of_step(1)
    assert two.of_step(4).node == pytest.approx((4 * 4 * N + 2 * N) * 7 / 8)


def test_zero_sums_gradients_on_all_ranks_where_a_bucket_belongs_to_several():
    """At twice the bytes: 64 GPUs keep fewer elements each than a bucket has, and so does one of an adapter."""
    assert [reduces_to_owners(N, gpus) for gpus in (1, 8, 56, 64, 512)] == [True, True, True, False, False]
    for engine in ("zero1", "zero2"):
        far = exchanged("fill_full", engine, 8).of_step(1)
        assert far.node + far.network == pytest.approx((2 * 4 * N + 2 * N) * 63 / 64)
        adapter = exchanged("fill_lora", engine, 1, "method.rank=16").of_step(1)
        assert adapter.node == pytest.approx((2 * 4 + 2) * 65.4e6 * 7 / 8, rel=0.02)


def test_zero3_keeps_what_it_has_gathered_last_until_the_backward_pass():
    fsdp2, zero3 = (exchanged("fill_full", engine, 1).each_micro_step.node for engine in ("fsdp2", "zero3"))
    assert fsdp2 - zero3 == pytest.approx(2 * 1e9 * 7 / 8)
    small = exchanges(load_config(CONFIGS / "fill_full.yaml"), FluxShape(1, 2), "zero3", nodes=1, gpus_per_node=2)
    assert small.of_step(1).node == pytest.approx((2 + 4) * FluxShape(1, 2).parameters / 2)


@pytest.mark.parametrize("engine, nodes", [("fsdp2", 1), ("hsdp", 2)])
def test_the_frozen_bases_own_pass_gathers_the_weights_once_more(engine, nodes):
    usual, base = (
        exchanged("fill_lora", engine, nodes, f"flow.keep_target={keep}").each_micro_step.node
        for keep in ("picture", "base")
    )
    assert base == pytest.approx(3 / 2 * usual)


def test_ddp_moves_an_adapters_gradients_there_and_back():
    found = exchanged("fill_lora", "ddp", 2, "method.rank=16")
    moved = found.of_step(1)
    assert moved.node + moved.network == pytest.approx(2 * 4 * 65.4e6 * 15 / 16, rel=0.02)
    assert found.each_micro_step == Exchange()


def test_one_gpu_has_nobody_to_talk_to():
    config = load_config(CONFIGS / "fill_lora.yaml")
    assert exchanges(config, FluxShape(), "single", nodes=1, gpus_per_node=1) == Exchanges()
