"""Runs that meet bad batches: back to the last good checkpoint and past them, or the stop with its report."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.ranks import RankFailure
from tests.trainer.engines.runs import (
    HALF,
    SINGLE,
    STEPS,
    assert_same_run,
    furthest,
    read_metrics,
    read_tensors,
    slow,
)

GLOBAL_BATCH_SIZE = 8
BAD_BATCHES = (2, 3)  # of steps 3 and 4, behind the checkpoint of step 2
EXCLUDED = f"guard.exclude_batches={list(BAD_BATCHES)}"
GUARD = ("guard.max_skips=2", "guard.lr_factor=1.0")


def train_on_bad_rows(arguments: list[str], batches=BAD_BATCHES, diverge_at=None, die_at=None) -> list[float]:
    """The trainer, where the loss of the last row of some global batches is not a number, on the rank that has it.
    Returns the learning rate of each update.

    diverge_at: the update after which the weights are 2e10 times as large.  die_at: the one before which it raises.
    """
    from trainer import main
    from trainer.engines.base import Engine

    positions = {batch * GLOBAL_BATCH_SIZE + GLOBAL_BATCH_SIZE - 1 for batch in batches}
    rates: list[float] = []
    now: list[torch.Tensor] = []
    loss, step, micro_steps = main.flow_loss, Engine.step, Engine.micro_steps

    def watched_micro_steps(self, micro_batches):
        for rows in micro_steps(self, micro_batches):
            now[:] = [torch.tensor([int(p) in positions for p in rows.position]) & (rows.weight > 0)]
            yield rows

    def flow_loss(*given):
        return loss(*given).masked_fill(now[0], float("nan"))

    def watched_step(self, lr, loss_limit):
        rates.append(lr)
        if len(rates) == die_at:
            raise KeyboardInterrupt
        update = step(self, lr, loss_limit)
        if len(rates) == diverge_at:
            with torch.no_grad():
                for part in self.local_slices():
                    part.weight.mul_(2e10)
        return update

    main.flow_loss, Engine.step, Engine.micro_steps = flow_loss, watched_step, watched_micro_steps
    main.train(arguments)
    return rates


def train_and_note_the_bound(arguments: list[str]) -> list[float]:
    """Likewise. Returns how many times its bound the watchdog allows while the checkpoint to go back to is read."""
    from trainer import guard
    from trainer.checkpoints import resume
    from trainer.process import watchdog

    allowed: list[float] = []

    def noted(read):
        def read_and_note(*given, **named):
            if (watching := watchdog._watchdog) is not None:  # not over the start's, which is unwatched
                allowed.append(watching._allowed / watching._limit)
            return read(*given, **named)

        return read_and_note

    resume.find_damage, guard.load_tensors = noted(resume.find_damage), noted(guard.load_tensors)
    train_on_bad_rows(arguments)
    return allowed


def read_events(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]


def read_run_state(run: Path, step: int = STEPS) -> dict:
    return json.loads((run / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())["state"]


# --- rollback ---------------------------------------------------------------------------------------------------------


@pytest.mark.fault(13, "rows that give NaN in several batches in a row")
@pytest.mark.parametrize(
    "engine, num_processes", [("ddp", 2), ("zero2", 2), *slow(SINGLE, ("fsdp2", 2), ("zero1", 2), ("zero3", 2))]
)
def test_a_run_that_went_back_is_one_that_was_given_the_exclusions_beforehand(launch, engine, num_processes):
    """To the bit: weights, moments and average, losses and norms."""
    run, rates = launch(engine, num_processes, f"back-{engine}", *GUARD, function=train_on_bad_rows)
    expected = launch(engine, num_processes, f"excluded-{engine}", *GUARD, EXCLUDED).folder
    assert furthest(read_tensors(run), read_tensors(expected)) == 0
    figures = [[(line["step"], line["loss"], line["grad_norm"]) for line in read_metrics(f)] for f in (run, expected)]
    assert figures[0] == figures[1] and [step for step, *_ in figures[0]] == list(range(1, STEPS + 1))

    undone = [json.loads(line) for line in (run / "metrics.1.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in undone] == [(3, None), (4, None)]
    assert len(set(map(tuple, rates))) == 1 and len(rates[0]) == STEPS + len(BAD_BATCHES)
    state = read_run_state(run)
    assert (state["excluded"], state["rollbacks"], state["skips"], state["batch"]) == (list(BAD_BATCHES), 1, 0, 6)
    *skips, back = [event for event in read_events(run) if event["event"] in ("skip", "rollback")]
    assert [(event["event"], event["step"], event["batch"]) for event in skips] == [
        ("skip", batch + 1, batch) for batch in BAD_BATCHES
    ]
    assert {tuple(event["ranks"]) for event in skips} == {(num_processes - 1,)}
    assert (back["event"], back["step"], back["to_step"]) == ("rollback", 4, HALF)
    assert (back["passed_over"], back["lr_scale"]) == (list(BAD_BATCHES), 1.0)
    assert [sample["key"] for sample in back["samples"]] == [event["samples"][0]["key"] for event in skips]


@pytest.mark.slow
def test_the_way_back_may_take_as_long_as_a_save(launch):
    """All of a full fine-tune's checkpoint is read, first for its checksums and then to be loaded."""
    from trainer.process.watchdog import LONGER

    run, allowed = launch(*SINGLE, "bound", *GUARD, function=train_and_note_the_bound)
    assert read_run_state(run)["rollbacks"] == 1
    assert allowed == [[LONGER, LONGER]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, engine, num_processes, settings",
    [
        ("8bit", "fsdp2", 2, ("method={type: lora, rank: 4}", "train.optimizer=adamw8bit")),
        ("prodigy", *SINGLE, ("train.optimizer=prodigy", "train.lr=1.0")),
        ("adafactor", *SINGLE, ("train.optimizer=adafactor",)),
        ("rounded", "ddp", 2, ("train.optimizer=adamw", "train.weights=bf16_stochastic")),
    ],
)
def test_every_optimizers_state_goes_back(launch, name, engine, num_processes, settings):
    """In a process whose optimizer has gone on; also what cannot be cut by element."""
    given = (*GUARD, *settings)
    run = launch(engine, num_processes, f"back-{name}", *given, function=train_on_bad_rows).folder
    expected = launch(engine, num_processes, f"excluded-{name}", *given, EXCLUDED).folder
    assert_same_run(run, expected, within=0)


@pytest.mark.slow
def test_an_online_run_goes_back_too(launch, tmp_path):
    settings = (*GUARD, "data.mode=online", "data.encoder_devices=[cpu]", f"data.cache={tmp_path / 'cache'}")
    run = launch(*SINGLE, "online", *settings, function=train_on_bad_rows).folder
    expected = launch(*SINGLE, "online-excluded", *settings, EXCLUDED).folder
    assert_same_run(run, expected, within=0)


def test_a_run_that_died_behind_a_rollback_goes_on_as_if_it_had_not(launch, undisturbed):
    """Before anything was saved since. And its rate is cut."""
    settings = ("guard.max_skips=2", "guard.lr_factor=0.5", "train.lr_schedule=constant", "train.warmup_steps=0")
    whole = launch(*SINGLE, "rolled-back", *settings, function=train_on_bad_rows)
    with pytest.raises(RankFailure, match="KeyboardInterrupt"):
        launch(*SINGLE, "dies", *settings, function=partial(train_on_bad_rows, die_at=6))
    died = undisturbed(*SINGLE).folder.parent / "dies"
    assert [path.name for path in (died / "checkpoints").iterdir()] == ["step-00000002"]
    run, ((*rates,),) = launch(*SINGLE, "dies", *settings, function=train_on_bad_rows)
    assert_same_run(run, whole.folder, within=0)
    (whole_rates,) = whole.returned
    assert whole_rates == [rates[0] * 2] * 4 + [rates[0]] * 2 and rates == [rates[0]] * 2


def test_a_run_that_has_saved_nothing_goes_back_to_before_the_skips(launch):
    """A skip changes nothing, so the weights are still there."""
    settings = (*GUARD, "checkpoint.every_steps=null")
    run = launch(*SINGLE, "unsaved", *settings, function=train_on_bad_rows).folder
    expected = launch(*SINGLE, "unsaved-excluded", *settings, EXCLUDED).folder
    assert_same_run(run, expected, within=0)
    (back,) = [event for event in read_events(run) if event["event"] == "rollback"]
    assert back["checkpoint"] is None and back["to_step"] == 2


@pytest.mark.fault(13, "weights that have diverged between two skips")
def test_weights_that_had_diverged_are_not_what_a_run_goes_back_to(launch):
    """Saved between two skips, finite, 2e10 times too large: neither by the rollback nor by a start with a lower rate,
    and the checkpoint before outlives keep_last."""
    settings = ("guard.max_skips=2", "checkpoint.every_steps=1", "checkpoint.keep_last=1", "checkpoint.keep_best=null")
    diverges = partial(train_on_bad_rows, batches=(1,), diverge_at=3)  # a skip, a good update, and then no number
    run = launch(*SINGLE, "diverged", *settings, "train.steps=6", function=diverges).folder
    *skips, back = [event for event in read_events(run) if event["event"] in ("skip", "rollback")]
    assert [event["step"] for event in skips] == [2, 4, 5]
    assert (back["to_step"], back["passed_over"]) == (1, [1, 3, 4])
    assert [path.name for path in (run / "checkpoints").glob("*.undone")] == ["step-00000004.undone"]
    assert max(value.abs().max() for value in read_tensors(run, 6).values()) < 1e3


def train_until_a_number_breaks(arguments: list[str], kind: str, after: int) -> None:
    """The trainer, where after an update, once, a number of the last rank's state is infinite: of its average, or of
    its second moments, by which its weight does not move any more and stays finite."""
    from trainer import main
    from trainer.engines.ema import Ema

    update, engines = Ema.update, []

    def break_after(self, num_updates):
        update(self, num_updates)
        (engine,) = engines
        if num_updates + 1 == after and engine.rank == engine.world_size - 1:
            part = next(part for part in engine.local_slices() if part.owned and part.weight.numel())
            tensor = self.averages[part.name] if kind == "ema" else part.moments[kind]
            tensor.view(-1)[0] = float("inf")
            Ema.update = update

    start = main.start_engine
    main.start_engine = lambda config: engines.append(start(config)) or engines[0]
    Ema.update = break_after
    main.train(arguments)


@pytest.mark.fault(14, "an infinite moment, or average, of one rank in mid-run, found at the last save")
@pytest.mark.parametrize(
    "kind, engine, num_processes", [("exp_avg_sq", "fsdp2", 2), *slow(("ema", "ddp", 2), ("exp_avg_sq", "zero3", 2))]
)
def test_a_run_whose_state_cannot_be_saved_goes_back_and_ends_as_if_nothing_had_been(
    launch, undisturbed, kind, engine, num_processes
):
    breaks = partial(train_until_a_number_breaks, kind=kind, after=HALF + 1)
    settings = ("guard.lr_factor=1.0", "train.ema_decay=0.9")
    run = launch(engine, num_processes, f"broken-{kind}-{engine}", *settings, function=breaks).folder
    assert_same_run(run, undisturbed(engine, num_processes).folder, within=0)
    (back,) = [event for event in read_events(run) if event["event"] == "rollback"]
    assert (back["step"], back["to_step"], back["passed_over"]) == (STEPS, HALF, [])
    assert f"is not finite and is not saved on rank {num_processes - 1}" in back["why"] and kind in back["why"]
    assert (run / "final").is_dir() and not list(run.glob("guard-report/*"))


@pytest.mark.fault(14, "an infinite average and nothing to go back to")
def test_a_run_whose_state_can_be_saved_nowhere_does_not_end_as_if_it_were(launch, undisturbed):
    breaks = partial(train_until_a_number_breaks, kind="ema", after=HALF)
    reason = rf"InputError: step {STEPS}: ema/.* is not finite .* no good checkpoint to go back to\. Lower .* begins"
    with pytest.raises(RankFailure, match=reason):
        launch(*SINGLE, "nowhere", "checkpoint.every_steps=null", function=breaks)
    run = undisturbed(*SINGLE).folder.parent / "nowhere"
    assert read_events(run)[-1]["event"] == "stop"
    assert not (run / "final").exists() and not list(run.glob("checkpoints/*"))


# --- the stop ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(launch, undisturbed) -> Path:
    """The folder of a run of two ranks that went back once and met no end of bad batches."""
    settings = ("guard.max_skips=2", "guard.max_rollbacks=1", "guard.lr_factor=0.25")
    reason = r"InputError: step 4: 2 updates in a row were skipped, and 1 rollback\(s\) .* not finite on rank 1\. "
    with pytest.raises(RankFailure, match=reason):
        launch("ddp", 2, "stopped", *settings, function=partial(train_on_bad_rows, batches=range(2, 100)))
    return undisturbed(*SINGLE).folder.parent / "stopped"


@pytest.mark.fault(13, "rows that give NaN for good")
def test_a_run_that_cannot_be_helped_stops_and_names_ranks_shards_and_samples(stopped):
    report = json.loads((stopped / "guard-report" / "report.json").read_text())
    assert [skip["batch"] for skip in report["skips"]] == [4, 5] and report["ranks"] == [1]
    assert report["excluded_batches"] == [2, 3, 4, 5] and report["lr_scale"] == 0.25
    for skip in report["skips"]:
        assert len(skip["samples"]) == GLOBAL_BATCH_SIZE
        bad = [sample for sample in skip["samples"] if sample["loss"] is None]
        assert [sample["rank"] for sample in bad] == [1] and bad[0]["key"] in report["keys"]
    text = (stopped / "guard-report" / "report.txt").read_text()
    for word in (*report["keys"], *report["shards"], "step 3, batch 4", "rank 1", "loss nan"):
        assert word in text
    assert read_events(stopped)[-1]["event"] == "stop" and read_events(stopped)[-1]["batches"] == [4, 5]


def test_the_batch_that_it_stopped_at_can_be_looked_at(stopped, config):
    """Each rank's rows: where they stand in the order, and their noise."""
    from data.batches.noise import draw_noise

    report = json.loads((stopped / "guard-report" / "report.json").read_text())
    for rank in range(2):
        path = stopped / "guard-report" / f"batch-00000004-rank-{rank:05d}.safetensors"
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            keys = json.loads(file.metadata()["keys"])
        assert set(keys) == {sample["key"] for sample in report["skips"][0]["samples"] if sample["rank"] == rank}
        positions = list(range(4 * GLOBAL_BATCH_SIZE + 4 * rank, 4 * GLOBAL_BATCH_SIZE + 4 * rank + 4))
        assert tensors["position"].tolist() == positions
        for position, noise in zip(positions, tensors["noise"], strict=True):
            expected = torch.empty(noise.shape)
            draw_noise(config.run.seed, position, expected.numpy())
            assert torch.equal(noise, expected)
        assert all(torch.isfinite(tensors[name].float()).all() for name in ("latents", "masked_latents", "t5"))


def test_the_next_start_goes_on_from_the_good_checkpoint_at_the_full_rate_past_the_bad_batches(stopped, launch):
    run = launch("ddp", 2, "stopped", "guard.max_skips=2").folder
    state = read_run_state(run)
    assert (state["excluded"], state["rollbacks"], state["lr_scale"]) == ([2, 3, 4, 5], 0, 1.0)
    assert (state["step"], state["batch"]) == (STEPS, 8)
