"""What all engines do alike: losses and weights of one process, and updates that all ranks skip or none."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from tests.trainer.engines.runs import (
    RANKS_PATIENCE,
    ROUNDING,
    SINGLE,
    STEPS,
    Run,
    assert_same_run,
    furthest,
    read_metrics,
    read_tensors,
    slow,
)
from trainer.engines.replicated import SingleEngine

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
    assert_same_run(run, undisturbed(*SINGLE).folder, within=1e-5, tensors_within=ROUNDING)


@pytest.mark.parametrize(
    "engine, num_processes, groups", [("ddp", 2, 1), ("fsdp2", 2, 1), ("zero2", 2, 2), *slow(("hsdp", 4, 3))]
)
def test_every_process_group_has_the_trainers_patience(undisturbed, engine, num_processes, groups):
    """Also those that a mesh, or DeepSpeed, has made for itself: NCCL's own patience is ten minutes."""
    for watched in undisturbed(engine, num_processes).returned:
        assert len(watched.patience) >= groups
        assert set(watched.patience) == {RANKS_PATIENCE.total_seconds()}


@pytest.mark.parametrize("is_main", [True, False])
def test_a_rank_has_no_more_than_one_gathering_queued(monkeypatch, is_main):
    """Rank 0 copies each weight to the host, which waits for it; the others wait all the same."""
    engine = object.__new__(SingleEngine)
    engine.rank, engine.device = int(not is_main), torch.device("cuda", 0)
    done = []

    def gather():
        for name in ("one", "two"):
            done.append(name)
            yield name, torch.ones(2)

    class Stream:
        def __init__(self, device):
            assert device == engine.device

        def synchronize(self):
            done.append("waited")

    engine._gather_weights = gather
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    weights = engine.full_weights()
    assert list(weights) == (["one", "two"] if is_main else [])
    assert done == (["one", "two"] if is_main else ["one", "waited", "two", "waited"])


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


@pytest.mark.parametrize("own, others", [(1.0, float("nan")), (float("inf"), 0.0)])
def test_a_gradient_that_one_rank_alone_finds_not_finite_is_skipped_on_all(engine, monkeypatch, own, others):
    """Else they would go on with different weights. Here another rank's share of the message is made up."""
    from trainer.engines.ranks import Ranks

    monkeypatch.setattr(Ranks, "all_reduce_sum_", lambda _, told: told.add_(torch.tensor([0.0, 0.0, others])))
    model = torch.nn.Linear(3, 1)
    model.device = torch.device("cpu")
    engine.prepare(model, lambda parameters: torch.optim.SGD(parameters))
    before = model.weight.detach().clone()
    engine.backward(model(torch.ones(1, 3)).sum(dim=1), torch.tensor([own]))
    update = engine.step(lr=1.0)
    assert not update.applied and torch.equal(model.weight, before)


# --- skipped updates --------------------------------------------------------------------------------------------------

FAULTS, LAST_STEP = {2: "loss", 4: "gradient", 6: "spike"}, 7  # of one row on the last rank
GOOD_STEPS = [step for step in range(1, LAST_STEP + 1) if step not in FAULTS]


class BadGradient(torch.autograd.Function):
    """The identity, with a gradient that is not a number."""

    @staticmethod
    def forward(ctx, losses):
        return losses.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


def train_with_faults(arguments: list[str]) -> tuple[list[bool], dict[int, list[str]], list[int]]:
    """The trainer, where at some steps the last rank's first micro-batch is faulty: (whether each update was applied,
    which weights, moments and step counts each changed, the updates that the average took in)."""
    from trainer import guard, main
    from trainer.engines.base import Engine
    from trainer.engines.ema import Ema

    applied: list[bool] = []
    changed: dict[int, list[str]] = {}
    averaged: list[int] = []
    met: list[str] = []
    loss, step, update_average = main.flow_loss, Engine.step, Ema.update
    is_last_rank = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1

    def flow_loss(*given):
        losses = loss(*given)
        fault = FAULTS.get(len(applied) + 1)
        if fault is None or fault in met or not is_last_rank:
            return losses
        met.append(fault)
        return (
            BadGradient.apply(losses) if fault == "gradient" else losses * {"loss": float("nan"), "spike": 1e7}[fault]
        )

    def state_of(engine):
        parts = {part.name: {"weight": part.weight, **part.moments} for part in engine.local_slices()}
        values = {f"{key}/{name}": value for name, kept in parts.items() for key, value in kept.items()}
        counts = {name: torch.as_tensor(state.get("step", 0)) for name, _, state in engine.optimizer_states()}
        return {name: value.clone() for name, value in (values | counts).items()}

    def watched_step(self, lr, loss_limit):
        before = state_of(self) if applied else {}  # of the first one, some optimizers have no state yet
        update = step(self, lr, loss_limit)
        after = state_of(self)
        changed[len(applied) + 1] = [name for name, value in before.items() if not torch.equal(value, after[name])]
        applied.append(update.applied)
        return update

    def watched_average(self, num_updates):
        averaged.append(num_updates)
        update_average(self, num_updates)

    guard._FEWEST_LOSSES = 2
    main.flow_loss, Engine.step, Ema.update = flow_loss, watched_step, watched_average
    main.train([*arguments, "guard.loss_spike=1e4"])
    return applied, changed, averaged


@pytest.fixture(scope="module")
def met_faults(launch) -> Callable[[str, int, str], Run]:
    """A run that met the faults: `met_faults(engine, processes, precision)`, made once."""
    made: dict[str, Run] = {}

    def run(engine: str, num_processes: int, precision: str) -> Run:
        name = f"bad-{engine}-{num_processes}-{precision}"
        if name not in made:
            settings = [f"model.precision={precision}", "train.global_batch_size=4", "train.micro_batch_size=1"]
            settings += [f"train.steps={LAST_STEP}", "checkpoint.every_steps=null"]
            made[name] = launch(engine, num_processes, name, *settings, function=train_with_faults)
        return made[name]

    return run


@pytest.mark.fault(12, "NaN loss, infinite gradient or a spike on one rank, under every engine")
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
def test_loss_gradient_or_spike_of_one_rank_skips_the_update_on_all_and_leaves_nothing_behind(
    met_faults, engine, num_processes, precision
):
    """The rest of the run is that of one process that met the same; in bf16 nearly."""
    run, told = met_faults(engine, num_processes, precision)
    for applied, changed, averaged in told:
        assert [step for step, was in enumerate(applied, 1) if was] == GOOD_STEPS
        assert all(changed[step] == [] for step in FAULTS)
        assert all(len(changed[step + 1]) > 100 for step in FAULTS)
        assert [number + 1 for number in averaged] == GOOD_STEPS
    alone = met_faults(*SINGLE, "fp32").folder
    losses, expected = ([read_metrics(folder)[step - 1]["loss"] for step in GOOD_STEPS] for folder in (run, alone))
    assert losses == pytest.approx(expected, **({"abs": 1e-5} if precision == "fp32" else {"rel": 0.01}))
    if precision == "fp32":
        assert furthest(read_tensors(run, LAST_STEP), read_tensors(alone, LAST_STEP)) < 1e-5
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    told_of = [event for event in events if event["event"] == "skip"]
    assert [(event["step"], event["batch"]) for event in told_of] == [(n, n - 1) for n in FAULTS]
    last = num_processes - 1
    assert [event["ranks"] for event in told_of] == [[last], [], []]
    loss, gradient, spike = (event["why"] for event in told_of)
    assert loss == f"the loss is not finite on rank {last}" and gradient == "the gradient is not finite, every loss is"
    assert spike.startswith("the loss is above ")
    assert [sample["loss"] for sample in told_of[0]["samples"]] == [None] * len(told_of[0]["samples"]) != []
    assert told_of[2]["samples"][0]["loss"] > 1e4 > told_of[2]["samples"][-1]["loss"]


# --- validation, compilation ------------------------------------------------------------------------------------------

WATCHED = (f"validation.every_steps={STEPS}", "validation.images=3", "validation.sampler_steps=3")


@pytest.fixture(scope="module")
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
def test_compiled_blocks_give_loss_and_gradient_of_plain_ones(launch):
    """Recomputed in the backward pass, too, where a block must meet the graph that its forward pass met. One step: the
    next may be of another size, whose kernels a CPU's compiler writes for another minute."""
    short = ("train.steps=1", "train.warmup_steps=0")
    switches = ("train.compile=regional", "train.activation_checkpointing=true")
    compiled = launch("ddp", 2, "compiled", *short, *switches).folder
    plain = launch(*SINGLE, "plain", *short).folder
    (mine,), (expected,) = map(read_metrics, (compiled, plain))
    for figure in ("loss", "grad_norm"):
        assert mine[figure] == pytest.approx(expected[figure], abs=1e-4)
