"""Seconds of a step: which rates they hang on."""

import pytest

from configs.communication import Exchange, Exchanges
from configs.errors import InputError
from configs.gpu_profiles import load_gpu_profile
from configs.step_costs import StepCost
from configs.step_time import KERNEL_SECONDS, step_time

H100 = load_gpu_profile("h100-80gb")
# A LoRA's step at 1024 px with all blocks checkpointed, as it was counted: 995 GB, 182 and 65 TFLOP.
NONE = Exchanges()
LORA = StepCost(0, 0, 182e12, 65e12, 995e9, 18_200)


def seconds(cost: StepCost = LORA, exchanged: Exchanges = NONE, **options: float):
    usual = {"micro_steps": 1, "gpus_per_node": 8, "update_bytes": 0}
    return step_time(H100, cost, exchanged, **usual | options)


def test_work_is_that_of_the_count_at_the_same_rates():
    assert seconds().total == pytest.approx(0.826, rel=0.02)


def test_a_small_step_waits_for_the_starts_of_its_kernels():
    assert seconds(StepCost(0, 0, 1, 1, 1, 18_200)).work == 18_200 * KERNEL_SECONDS


def test_gathers_hide_behind_work_until_they_take_longer():
    hidden = seconds(exchanged=Exchanges(Exchange(network=10e9)))
    assert hidden.exposed == 0 and hidden.total == seconds().total
    late = seconds(exchanged=Exchanges(Exchange(network=95e9)), micro_steps=2)
    assert late.total == pytest.approx(2 * 95e9 / (0.8 * 50e9))


def test_weights_are_waited_for_and_gradients_hide_behind_the_backward_pass():
    assert seconds(exchanged=Exchanges(gradients=Exchange(node=100e9))).exposed == 0
    assert seconds(exchanged=Exchanges(weights=Exchange(node=45e9))).exposed == pytest.approx(45 / 450 / 0.8)


def test_gathers_and_gradients_of_the_last_micro_step_share_its_work_and_the_links():
    """2 ms of work: 3 ms of gathers wait for 1 ms in the first micro-step; with 1.5 ms of gradients behind them, for
    2.5 ms in the last one."""
    cost = StepCost(0, 0, 0, 0, 0, 200)  # kernels of 10 us
    gathers, gradients = Exchange(node=3e-3 * 0.8 * 450e9), Exchange(node=1.5e-3 * 0.8 * 450e9)
    both = Exchanges(gathers, gradients=gradients)
    assert seconds(cost, both).exposed == pytest.approx(2.5e-3)
    assert seconds(cost, both, micro_steps=3).exposed == pytest.approx(2 * 1e-3 + 2.5e-3)
    assert seconds(cost, Exchanges(gradients=gradients)).exposed == pytest.approx(1.5e-3 - 2 / 3 * 2e-3)


def test_an_update_takes_the_bandwidth_of_where_it_is_made():
    assert seconds(update_bytes=333e9).update == pytest.approx(333 / (0.78 * 3350))
    assert seconds(update_bytes=333e9, host_update=True).update > 10


def test_a_card_without_rates_is_refused_by_name():
    card = H100.model_copy(update={"bf16_tflops": None})
    with pytest.raises(InputError, match=r"H100.*bf16_tflops.*data sheet"):
        step_time(card, LORA, Exchanges(), micro_steps=1, gpus_per_node=8, update_bytes=0)
