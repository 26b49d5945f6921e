"""The table of a micro-step's costs: against the counts made of FLUX.1's blocks, and what it hangs on."""

from itertools import pairwise

import pytest

from configs.flux_shape import FluxShape
from configs.schema import DoraConfig, FullConfig, LokrConfig, LoraConfig
from configs.step_costs import StepCost, attention_flops, base_pass, step_cost

GIB = 2**30
FLUX = FluxShape()
LORA, FULL = LoraConfig(type="lora"), FullConfig(type="full")


def cost(method=LORA, precision="bf16", checkpointed=FLUX.blocks, tokens=4608, rows=1, shape=FLUX) -> StepCost:
    return step_cost(method, precision, shape, checkpointed=checkpointed, tokens=tokens, rows=rows)


@pytest.mark.parametrize(
    "method, checkpointed, gib",
    [(LORA, 57, 2.15), (LORA, 0, 26.4), (FULL, 0, 30.4)],  # under autocast they were 2.81, 36 and 44
)
def test_activations_are_those_that_were_counted(method, checkpointed, gib):
    """Of 1024 px and 512 tokens of text, one sample, as the code is."""
    assert cost(method, checkpointed=checkpointed).peak / GIB == pytest.approx(gib, rel=0.05)


def test_a_loras_step_moves_and_multiplies_what_was_counted():
    found = cost()
    assert found.matmul_flops == pytest.approx(182e12, rel=0.02)
    assert found.traffic == pytest.approx(472e9, rel=0.05)
    assert found.kernels == pytest.approx(14_300, rel=0.05)


@pytest.mark.parametrize(
    "method, checkpointed, tokens, tflop",
    [
        (FULL, 0, 4608, 223.2),
        (FULL, 57, 4608, 297.6),
        (FULL, 0, 1536, 64.5),
        (LORA, 0, 4608, 163.6),
        (LORA, 57, 1536, 66.1),
        (LORA, 57, 768, 31.4),
    ],
)
def test_arithmetic_is_that_of_the_formula(method, checkpointed, tokens, tflop):
    found = cost(method, checkpointed=checkpointed, tokens=tokens)
    # A LoRA's own products come to about 2 % at rank 32.
    assert (found.matmul_flops + found.attention_flops) / 1e12 == pytest.approx(tflop, rel=0.03)


def test_more_of_anything_costs_more():
    wider = LORA.model_copy(update={"rank": 128})
    for more in ({"tokens": 5000}, {"rows": 2}, {"method": DoraConfig(type="dora")}, {"method": wider}):
        assert cost(**more).peak > cost().peak and cost(**more).traffic > cost().traffic
    attention = LoraConfig(type="lora", targets="attention")
    assert cost(attention, checkpointed=0).kept < cost(checkpointed=0).kept
    assert cost(precision="fp32").peak > cost().peak
    assert cost(precision="nf4") == cost(precision="int8") == cost(precision="fp8")
    assert cost(precision="int8").traffic > 1.15 * cost().traffic
    assert cost(LokrConfig(type="lokr")).kernels > cost().kernels


def test_attention_grows_with_the_square_of_a_samples_tokens_alone():
    assert attention_flops(FLUX, 3072, checkpointed=0) == 4 * attention_flops(FLUX, 1536, checkpointed=0)
    assert cost(tokens=1536, rows=3).attention_flops == pytest.approx(cost().attention_flops / 3)


def test_a_model_of_fewer_or_narrower_blocks_costs_less():
    assert cost(shape=FluxShape(8, 38)).kept < cost().kept
    assert cost(shape=FluxShape(width=1536)).kept == pytest.approx(cost().kept / 2)


@pytest.mark.parametrize("method", [LORA, FULL, DoraConfig(type="dora"), LokrConfig(type="lokr")])
def test_every_checkpointed_block_keeps_less_and_computes_more(method):
    costs = [cost(method, checkpointed=blocks) for blocks in range(FLUX.blocks + 1)]
    for fewer, more in pairwise(costs):
        assert more.kept < fewer.kept
        assert more.peak < fewer.peak or more is costs[-1]  # the last block of all is alone in the backward pass
        for name in ("matmul_flops", "attention_flops", "traffic", "kernels"):
            assert getattr(more, name) > getattr(fewer, name)
    assert costs[-1].peak < costs[0].peak / 10


@pytest.mark.parametrize("precision, traffic", [("bf16", 138e9), ("int8", 173e9), ("fp32", 172e9)])
def test_the_frozen_bases_own_pass_is_a_third_of_full_training(precision, traffic):
    found = base_pass(precision, FLUX, tokens=4608)
    assert found.matmul_flops + found.attention_flops == pytest.approx(74.4e12, rel=0.01)
    assert found.traffic == pytest.approx(traffic, rel=0.02)
    assert base_pass(precision, FLUX, tokens=4608, rows=2).attention_flops == 2 * found.attention_flops


def test_of_two_passes_one_after_the_other_the_fuller_one_says_what_memory_they_take():
    one, other = StepCost(1, 5, 10, 20, 30, 40), StepCost(2, 3, 1, 2, 3, 4)
    assert one.after(other) == StepCost(2, 5, 11, 22, 33, 44)
