"""What all engines do alike: losses and weights of one process, and updates that all ranks skip or none."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from tests.ranks import RankFailure
from tests.trainer.engines.runs import (
    SINGLE,
    STEPS,
    Run,
    assert_same_run,
    furthest,
    read_metrics,
    read_tensors,
    slow,
)

# Engine, processes. Three do not divide the global batch of 8: ranks get floor or ceil of the rows.
LAUNCHES = [
    *(("ddp", 2), ("fsdp2", 2), ("zero2", 2)),
    *slow(("ddp", 3), ("ddp", 4), ("fsdp2", 1), ("fsdp2", 3), ("fsdp2", 4), ("hsdp", 4), ("zero1", 2), ("zero1", 3)),
    *slow(("zero3", 2), ("zero3", 3), ("fsdp2-offload", 2), ("zero3-offload", 2)),
]


@pytest.mark.parametrize("engine, num_processes", LAUNCHES)
def test_losses_and_weights_are_those_of_one_process(undisturbed, engine, num_processes):
    run = undisturbed(engine, num_processes).folder
    assert {name.split("/")[0] for name in read_tensors(run)} == {"weight", "exp_avg", "exp_avg_sq", "ema"}
    assert_same_run(run, undisturbed(*SINGLE).folder, within=1e-5)


def test_padding_rows_add_nothing_to_loss_and_gradient(engine, config):
    model = torch.nn.Linear(3, 1)
    model.device = torch.device("cpu")
    engine.prepare(model, lambda parameters: torch.optim.SGD(parameters))
    rows = torch.randn(2, 3)
    found = []
    for weight in ([1.0, 1.0], [1.0, 1.0, 0.0, 0.0]):
        batch = torch.cat([rows, 1000 * torch.ones(len(weight) - 2, 3)])
        engine.backward(model(batch).square().sum(dim=1), torch.tensor(weight))
        found.append(engine.step(lr=0.0))
    expected = model(rows).square().sum().item() / config.train.global_batch_size
    assert [update.loss for update in found] == pytest.approx([expected] * 2)
    assert found[0].grad_norm == pytest.approx(found[1].grad_norm) and found[0].grad_norm > 0
    assert all(update.applied for update in found)


# --- skipped updates --------------------------------------------------------------------------------------------------

BAD_STEP, LAST_STEP = 3, 5


def train_with_a_bad_loss(arguments: list[str]) -> tuple[list[bool], dict[int, list[str]], list[int]]:
    """The trainer, where at one step one loss of the last rank is not a number: (whether each update was applied, which
    weights and moments that step and the next one changed, the updates that the average took in)."""
    from trainer import main
    from trainer.engines.base import Engine
    from trainer.engines.ema import Ema

    applied: list[bool] = []
    changed: dict[int, list[str]] = {}
    averaged: list[int] = []
    bad: list[float] = []
    loss, step, update_average = main.flow_loss, Engine.step, Ema.update

    def flow_loss(*given):
        losses = loss(*given)
        if len(applied) + 1 == BAD_STEP and not bad and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            bad.append(float("nan"))
            losses = losses * bad[0]
        return losses

    def state_of(engine):
        parts = {part.name: {"weight": part.weight, **part.moments} for part in engine.local_slices()}
        return {f"{key}/{name}": value.clone() for name, kept in parts.items() for key, value in kept.items()}

    def watched_step(self, lr):
        number = len(applied) + 1
        before = state_of(self) if number in (BAD_STEP, BAD_STEP + 1) else {}
        update = step(self, lr)
        if before:
            after = state_of(self)
            changed[number] = [name for name, value in before.items() if not torch.equal(value, after[name])]
        applied.append(update.applied)
        return update

    def watched_average(self, num_updates):
        averaged.append(num_updates)
        update_average(self, num_updates)

    main.flow_loss, Engine.step, Ema.update = flow_loss, watched_step, watched_average
    main.train(arguments)
    return applied, changed, averaged


@pytest.fixture(scope="session")
def met_a_bad_loss(launch) -> Callable[[str, int, str], Run]:
    """A run that met a bad loss: `met_a_bad_loss(engine, processes, precision)`, made once."""
    made: dict[str, Run] = {}

    def run(engine: str, num_processes: int, precision: str) -> Run:
        name = f"bad-{engine}-{num_processes}-{precision}"
        if name not in made:
            settings = [f"model.precision={precision}", "train.micro_batch_size=1"]
            settings += [f"train.steps={LAST_STEP}", "checkpoint.every_steps=null"]
            made[name] = launch(engine, num_processes, name, *settings, function=train_with_a_bad_loss)
        return made[name]

    return run


@pytest.mark.parametrize(
    "engine, num_processes, precision",
    [
        (*SINGLE, "fp32"),
        *(("ddp", 2, "fp32"), ("fsdp2", 2, "fp32"), ("zero2", 2, "fp32"), ("zero2", 2, "bf16")),
        *slow((*SINGLE, "bf16"), ("ddp", 2, "bf16"), ("fsdp2", 2, "bf16")),
        *slow(*((engine, 2, dtype) for engine in ("zero1", "zero3", "zero3-offload") for dtype in ("fp32", "bf16"))),
        *slow(("hsdp", 4, "fp32"), ("hsdp", 4, "bf16")),
    ],
)
def test_a_loss_that_is_not_a_number_on_one_rank_skips_the_update_on_all_and_leaves_nothing_behind(
    met_a_bad_loss, engine, num_processes, precision
):
    """The rest of the run is that of one process that met the same; in bf16 nearly."""
    run, told = met_a_bad_loss(engine, num_processes, precision)
    others = [step for step in range(1, LAST_STEP + 1) if step != BAD_STEP]
    for applied, changed, averaged in told:
        assert [step for step, was in enumerate(applied, 1) if was] == others
        assert changed[BAD_STEP] == [] and len(changed[BAD_STEP + 1]) > 100
        assert [number + 1 for number in averaged] == others
    alone = met_a_bad_loss(*SINGLE, "fp32").folder
    losses, expected = ([line["loss"] for line in read_metrics(folder)] for folder in (run, alone))
    assert len(losses) == LAST_STEP and losses.pop(BAD_STEP - 1) is None and expected.pop(BAD_STEP - 1) is None
    assert losses == pytest.approx(expected, **({"abs": 1e-5} if precision == "fp32" else {"rel": 0.01}))
    if precision == "fp32":
        assert furthest(read_tensors(run, LAST_STEP), read_tensors(alone, LAST_STEP)) < 1e-5


def train_with_bad_losses(arguments: list[str]) -> None:
    """The trainer, where rank 0 computes no number from step 3 on."""
    from trainer import main
    from trainer.engines.base import Engine

    loss, step, steps = main.flow_loss, Engine.step, []

    def flow_loss(*given):
        return loss(*given) * (float("nan") if len(steps) + 1 >= BAD_STEP and os.environ["RANK"] == "0" else 1.0)

    def counted_step(self, lr):
        steps.append(step(self, lr))
        return steps[-1]

    main.flow_loss, Engine.step = flow_loss, counted_step
    main.train(arguments)


def test_five_skipped_updates_in_a_row_end_the_run(launch, undisturbed):
    """One that is followed by an applied one does not: the runs that met a bad loss reach their ends."""
    with pytest.raises(RankFailure, match=r"FloatingPointError: step 7: loss or gradient not finite 5 times in a row"):
        launch("ddp", 2, "five-skips", f"checkpoint.every_steps={STEPS}", function=train_with_bad_losses)
    run = undisturbed(*SINGLE).folder.parent / "five-skips"
    assert [line["step"] for line in read_metrics(run) if line["loss"] is None] == [3, 4, 5, 6]
    assert not list(run.glob("checkpoints/*")) and not (run / "final").exists()


# --- validation, compilation ------------------------------------------------------------------------------------------

WATCHED = ("validation.every_steps=8", "validation.images=3", "validation.sampler_steps=3")


@pytest.fixture(scope="session")
def watched_alone(launch) -> Path:
    return launch(*SINGLE, "watched-alone", *WATCHED).folder


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero3"])
def test_validation_gives_the_figures_and_pictures_of_one_process(launch, watched_alone, engine):
    run = launch(engine, 2, f"watched-{engine}", *WATCHED).folder
    for mine, alone in zip(read_validation(run), read_validation(watched_alone), strict=True):
        assert mine["step"] == alone["step"]
        for split in ("train", "holdout"):
            assert mine[split] == pytest.approx(alone[split], abs=1e-3)
    for picture in sorted((watched_alone / "samples").glob("*.png")):
        with Image.open(picture) as alone, Image.open(run / "samples" / picture.name) as mine:
            apart = np.asarray(ImageChops.difference(mine, alone))
        assert apart.max() <= 2  # of 255: the last digit of a rounding


def read_validation(run: Path) -> list[dict]:
    lines = (run / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, STEPS]
    return [json.loads(line) for line in lines]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiled_blocks_give_the_losses_of_plain_ones(launch):
    """Recomputed in the backward pass, too, where a block must meet the graph that its forward pass met."""
    short = ("train.steps=2", "train.warmup_steps=1")
    switches = ("train.compile=regional", "train.activation_checkpointing=true")
    compiled = launch("ddp", 2, "compiled", *short, *switches, timeout_seconds=590).folder
    plain = launch(*SINGLE, "plain", *short).folder
    losses = [[line["loss"] for line in read_metrics(run)] for run in (compiled, plain)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and len(losses[0]) == 2
