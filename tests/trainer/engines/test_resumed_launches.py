"""A run that goes on is the run that was never stopped: by the same launch bit for bit, by another to rounding."""

import json
from itertools import chain

import pytest

from tests.trainer.engines.runs import HALF, ROUNDING, SINGLE, STEPS, assert_same_run, go_on_from, slow


@pytest.mark.fault(21, "the same engine, as the case to hold the others against")
@pytest.mark.parametrize(
    "engine, num_processes",
    [
        *(SINGLE, ("ddp", 2), ("zero2", 2)),
        *slow(("fsdp2", 2), ("hsdp", 4), ("zero1", 2), ("zero3", 2), ("fsdp2-offload", 2), ("zero3-offload", 2)),
    ],
)
def test_resume_by_the_same_launch_is_bit_equal(undisturbed, resumed, engine, num_processes):
    """fsdp2 is held to it in test_fsdp.py, after a forward pass."""
    halves = resumed((engine, num_processes), (engine, num_processes)).folder
    assert_same_run(halves, undisturbed(engine, num_processes).folder, within=0.0)
    undone = (halves / "metrics.1.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in undone] == list(range(HALF + 1, STEPS + 1))


@pytest.mark.fault(20, "single, ddp, fsdp2, hsdp, zero1, zero2, zero3 on 1 to 4 processes, one after another")
@pytest.mark.parametrize(
    "before, after",
    [
        *((("ddp", 2), SINGLE), (("fsdp2", 2), ("ddp", 3)), (("zero2", 2), ("fsdp2", 2)), (SINGLE, ("zero2", 2))),
        *slow(
            (("fsdp2", 2), ("fsdp2", 1)),
            (("fsdp2", 1), ("fsdp2", 2)),
            (("fsdp2", 2), ("fsdp2", 4)),
            (SINGLE, ("ddp", 2)),
            (("ddp", 2), ("ddp", 4)),
            (("zero1", 2), ("zero1", 3)),
            (("zero2", 2), ("zero2", 1)),
            (("zero3", 2), ("zero3", 3)),
            (("zero3", 2), ("hsdp", 4)),
            (("hsdp", 4), ("zero3", 2)),
        ),
    ],
)
def test_resume_by_another_engine_or_number_of_processes_goes_on_with_the_same_run(undisturbed, resumed, before, after):
    assert_same_run(resumed(before, after).folder, undisturbed(*SINGLE).folder, within=1e-5, tensors_within=ROUNDING)


@pytest.mark.fault(21, "ddp, fsdp2, zero2 and ddp of three in one run")
@pytest.mark.slow
def test_a_chain_of_engines_lands_on_the_undisturbed_weights(launch, undisturbed):
    before = None
    for step, engine in zip(range(STEPS), [("ddp", 2), ("fsdp2", 2), ("zero2", 2), ("ddp", 3)], strict=True):
        name = f"chain-{step}"
        if before is not None:
            go_on_from(before, name, step)
        before = launch(*engine, name, "checkpoint.every_steps=1").folder
    assert_same_run(before, undisturbed(*SINGLE).folder, within=1e-5, tensors_within=ROUNDING)


def test_a_resumed_run_reads_no_sample_that_it_does_not_train_on(resumed):
    """None of those before its checkpoint; behind the last step a reader may be a few micro-batches ahead."""
    ranks = resumed(("ddp", 2), ("ddp", 2)).returned
    read = sorted(chain.from_iterable(watched.read for watched in ranks))
    trained = list(range(HALF * 8, STEPS * 8))
    assert read[: len(trained)] == trained
    assert len(read) <= len(trained) + 2 * 4 * 3  # ranks, micro-batches ahead, rows of one
