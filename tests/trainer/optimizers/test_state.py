"""Which state reshards; and 8-bit moments as numbers."""

import pytest
import torch

from trainer.optimizers.state import (
    BLOCK,
    dequantize,
    eight_bit_moments,
    elementwise_state,
    quantize,
    unreshardable_state,
)


@pytest.fixture
def state():
    """bitsandbytes' own state of one tensor after five steps, and the tensor."""
    from bitsandbytes.optim import AdamW8bit

    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(40, 256))
    optimizer = AdamW8bit([weight], lr=1e-2)
    for _ in range(5):
        weight.grad = torch.randn_like(weight)
        optimizer.step()
    return optimizer.state[weight]


def test_moments_are_those_of_bitsandbytes_own_code_book(state):
    assert [name for name, _ in eight_bit_moments(state)] == ["state1", "state2"]
    for moment, codes in eight_bit_moments(state):
        number = moment[-1]
        own = state[f"qmap{number}"][codes.long()].view(-1, BLOCK) * state[f"absmax{number}"][:, None]
        assert torch.equal(dequantize(codes, state[f"absmax{number}"], moment), own.view_as(codes))


def test_numbers_quantized_anew_along_the_same_blocks_stay_as_they_are(state):
    """But for the code book's end: it has 1 and no -1, so a block whose largest number is negative shrinks a little."""
    for moment, codes in eight_bit_moments(state):
        scales = state[f"absmax{moment[-1]}"]
        numbers = dequantize(codes, scales, moment)
        again, new_scales = quantize(numbers, moment)
        torch.testing.assert_close(new_scales, scales, rtol=0.01, atol=0)
        kept = new_scales == scales
        assert kept.any()
        assert torch.equal(again.view(-1, BLOCK)[kept], codes.view(-1, BLOCK)[kept])


def test_along_other_blocks_a_number_moves_by_a_code_at_most(state):
    (moment, codes), *_ = eight_bit_moments(state)
    numbers = dequantize(codes, state["absmax1"], moment).view(-1)[100:]
    again, scales = quantize(numbers.contiguous(), moment)
    moved = (dequantize(again, scales, moment) - numbers).abs()
    # The code book's widest gap is a tenth of a decade: 1/70 of the block's largest number.
    assert (moved <= scales.repeat_interleave(BLOCK)[: len(numbers)] / 70).all()
    assert moved.max() > 0


# --- what reshards ----------------------------------------------------------------------------------------------------


def step(make, weight: torch.nn.Parameter) -> dict:
    """The state of an optimizer, made by `make([weight])`, after a step."""
    optimizer = make([weight])
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    return optimizer.state[weight]


def test_adamws_moments_reshard_and_nothing_of_it_does_not():
    weight = torch.nn.Parameter(torch.randn(40, 256))
    state = step(torch.optim.AdamW, weight)
    assert [key for key, _ in elementwise_state(state, weight)] == ["exp_avg", "exp_avg_sq"]
    assert unreshardable_state([("w", weight, state)]) == {}


def test_a_scalars_step_count_is_no_moment():
    weight = torch.nn.Parameter(torch.tensor(1.0))
    assert dict(elementwise_state(step(torch.optim.AdamW, weight), weight)) == {}


def test_8_bit_codes_and_scales_do_not_reshard_and_the_code_book_is_not_saved(state):
    weight = torch.empty(40, 256)
    assert dict(elementwise_state(state, weight)) == {}
    kept = unreshardable_state([("w", weight, state)])
    assert kept.keys() == {"w//state1", "w//absmax1", "w//state2", "w//absmax2"}
    assert kept["w//state1"] is state["state1"]


def test_adafactors_rows_and_columns_do_not_reshard():
    from transformers.optimization import Adafactor

    weight = torch.nn.Parameter(torch.randn(4, 6))
    state = step(lambda weights: Adafactor(weights, lr=0.1, scale_parameter=False, relative_step=False), weight)
    assert unreshardable_state([("w", weight, state)]).keys() >= {"w//exp_avg_sq_row", "w//exp_avg_sq_col"}
