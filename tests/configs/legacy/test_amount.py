import pytest

from configs.legacy.amount import Amount, accumulated, every, of_epochs, thrown_away


def counted(micro_steps: int, batch_size: int, accumulation: int, *, zeroes_each_batch: bool) -> tuple[int, int, int]:
    """(updates, samples of one update, samples through the model), step by step as a loop goes through them."""
    updates, held, forward, used = 0, 0, 0, 0
    for step in range(1, micro_steps + 1):
        held = batch_size if zeroes_each_batch else held + batch_size
        forward += batch_size
        if step % accumulation == 0:
            updates, used, held = updates + 1, held, 0
    return updates, used, forward


@pytest.mark.parametrize("micro_steps, batch_size, accumulation", [(2000, 1, 2), (2000, 1, 4), (12, 3, 4), (7, 2, 1)])
def test_thrown_away_gradients_are_counted_as_the_loop_threw_them(micro_steps, batch_size, accumulation):
    did, meant = thrown_away(micro_steps, batch_size, accumulation)
    updates, used, forward = counted(micro_steps, batch_size, accumulation, zeroes_each_batch=True)
    assert (did.steps, did.global_batch_size) == (updates, used)
    updates, used, _ = counted(micro_steps, batch_size, accumulation, zeroes_each_batch=False)
    assert (meant.steps, meant.global_batch_size) == (updates, used)
    assert meant.samples == forward, "what was meant costs what the old run cost"
    assert did.samples * accumulation == forward


def test_accumulation_of_an_update_counter_keeps_its_steps():
    assert accumulated(2000, 2, 4) == Amount(2000, 8)
    assert accumulated(2000, 2, 4).samples == 16_000


def test_epochs_end_with_a_batch_of_what_is_left():
    assert of_epochs(20, 30, 8) == Amount(80, 8)
    assert of_epochs(1, 8, 8).steps == 1
    assert of_epochs(3, 9, 8).steps == 6
    assert of_epochs(3, 9, 0).steps == 27, "a batch size that is refused later divides nothing by zero"


def test_intervals_shrink_with_the_counter_but_not_to_nothing():
    assert [every(250, 1), every(250, 4), every(2, 4)] == [250, 62, 1]
    assert thrown_away(2, 1, 4)[0].steps == 1
