"""Micro-batch and checkpointed blocks change no loss: chosen by the room on a card, or named, under every engine."""

import os
from functools import partial

import pytest

from tests.trainer.engines.runs import ROUNDING, SINGLE, assert_same_run, slow


def train_with_room(fitting: list[tuple[int, int]], arguments: list[str]) -> tuple[int, int]:
    """The trainer, where on each rank a micro-batch with so many checkpointed blocks just fits: those that it trained
    with."""
    from configs.memory import GIB
    from trainer import fit, main

    chosen = []
    decide, apply = main.fit_to_memory, fit.checkpoint_blocks
    card = fit.DeviceMemory("NVIDIA H100 80GB HBM3", 80 * GIB, 79 * GIB, 0, 0)

    def watched(*given, **bounds):
        micro = decide(*given, **bounds)
        chosen.insert(0, micro)
        return micro

    def watched_blocks(transformer, count):
        chosen.append(count)
        apply(transformer, count)

    main.fit_to_memory, fit.checkpoint_blocks = watched, watched_blocks
    fit.device_memory = lambda device: card
    fit.room_for_activations = lambda work, memory: work.cost(*fitting[int(os.environ.get("RANK", "0"))]).peak
    main.train(arguments)
    return chosen[0], chosen[1]


@pytest.mark.parametrize(
    "engine, fitting, expected",
    [
        ("single", [(8, 2)], (8, 2)),
        ("ddp", [(4, 0), (4, 3)], (4, 3)),
        *slow(("single", [(1, 0)], (4, 5)), ("fsdp2", [(4, 1), (4, 3)], (4, 3)), ("zero2", [(4, 4), (4, 2)], (4, 4))),
    ],
)
def test_losses_do_not_hang_on_what_fits_a_card(launch, undisturbed, engine, fitting, expected):
    """Ranks with unlike room take what fits the least of them."""
    settings = ("train.micro_batch_size=auto", "train.activation_checkpointing=auto")
    name = f"fitting-{engine}-{expected[0]}-{expected[1]}"
    run = launch(engine, len(fitting), name, *settings, function=partial(train_with_room, fitting))
    assert run.returned == [expected] * len(fitting)
    assert_same_run(run.folder, undisturbed(*SINGLE).folder, within=1e-5, tensors_within=ROUNDING)


@pytest.mark.parametrize("blocks", [2, "true"])
@pytest.mark.parametrize(
    "engine, num_processes", [SINGLE, *slow(("ddp", 2), ("fsdp2", 2), ("zero2", 2), ("zero3", 2), ("fsdp2-offload", 2))]
)
def test_losses_and_weights_do_not_hang_on_how_many_blocks_are_checkpointed(
    launch, undisturbed, engine, num_processes, blocks
):
    name = f"checkpointed-{engine}-{num_processes}-{blocks}"
    run = launch(engine, num_processes, name, f"train.activation_checkpointing={blocks}").folder
    assert_same_run(run, undisturbed(*SINGLE).folder, within=1e-5, tensors_within=ROUNDING)
