import logging
import math
from dataclasses import replace

import pytest
import torch

from configs.errors import InputError
from configs.schema import GuardConfig
from data.batches.order import OrderSettings
from trainer.checkpoints.run_state import RECENT_LOSSES, RunState
from trainer.engines.base import Update
from trainer.guard import Guard, Skip, TrainedSample, loss_limit
from trainer.training_data import choose_order, open_stream

ORDER = OrderSettings.current(seed=1, global_batch_size=2, weights={"photos": 1.0}, shards="0" * 32)
START = RunState(step=0, batch=0, skips=0, restarts=0, order=ORDER)


def after(losses: list[float], applied: bool = True) -> RunState:
    state = START
    for loss in losses:
        state = state.after(Update(loss, grad_norm=1.0, applied=applied))
    return state


def test_a_spike_is_so_many_robust_deviations_above_the_median():
    losses = [0.5, 0.7, 0.9, 1.1, 1.3] * 4  # median 0.9, median distance from it 0.2
    assert loss_limit(GuardConfig(loss_spike=4.0), after(losses)) == pytest.approx(0.9 + 4 * 1.4826 * 0.2)


def test_outliers_do_not_move_the_limit():
    losses = [0.5, 0.7, 0.9, 1.1, 1.3] * 9
    calm, wild = (loss_limit(GuardConfig(loss_spike=4.0), after(each)) for each in (losses, [*losses, 1e6, 1e6]))
    assert wild == pytest.approx(calm, rel=0.5)


def test_losses_that_hardly_differ_are_no_spikes():
    assert loss_limit(GuardConfig(loss_spike=5.0), after([2.0] * 30)) == pytest.approx(2.0 + 5 * 0.02)


@pytest.mark.parametrize("loss_spike, count", [(None, 100), (4.0, 19)])
def test_there_is_no_limit_unless_it_is_asked_for_and_something_is_known(loss_spike, count):
    assert loss_limit(GuardConfig(loss_spike=loss_spike), after([1.0] * count)) == math.inf


def test_only_the_last_losses_that_were_applied_count():
    state = after([9.0] * 50 + [1.0, 2.0] * (RECENT_LOSSES // 2))
    assert len(state.losses) == RECENT_LOSSES and max(state.losses) == 2.0
    skipped = replace(state).after(Update(1e9, grad_norm=1.0, applied=False))
    assert skipped.losses == state.losses


def test_the_first_skip_of_a_start_is_told_to_the_webhook(config, engine, samples, tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr("trainer.guard.notify", lambda run, kind, **told: sent.append((run, kind, told)))
    run = config.model_copy(update={"run": config.run.model_copy(update={"dir": tmp_path, "name": "nan"})})
    run.run.folder.mkdir()
    state = replace(START, order=choose_order(run, samples))
    update = Update(math.nan, grad_norm=1.0, applied=False)
    with open_stream(run, engine, samples, state, 2) as stream:
        next(stream)
        monkeypatch.setattr(engine, "_losses", [torch.full((2,), math.nan)])
        guard = Guard(run, engine, None, samples, stream, None, None)
        for _ in range(2):
            state = state.after(update)
            guard._record_skip(state, update)
    ((name, kind, told),) = sent
    assert (name, kind, told["step"], told["wait"]) == ("nan", "skipped an update", 1, False)
    assert "not finite" in told["reason"]


def test_a_disk_that_takes_no_report_does_not_change_the_stop(config, engine, samples, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("fluxfill"), "propagate", True)
    run = config.model_copy(update={"run": config.run.model_copy(update={"dir": tmp_path, "name": "stopped"})})
    (run.run.folder / "rollbacks.json").mkdir(parents=True)
    (run.run.folder / "events.jsonl").mkdir()
    (run.run.folder / "guard-report").touch()
    state = replace(START, order=choose_order(run, samples))
    state = state.after(Update(math.nan, grad_norm=1.0, applied=False))
    sample = TrainedSample(0, "photos", "a.tar", 0, "a", math.nan)
    with open_stream(run, engine, samples, state, 2) as stream:
        guard = Guard(run, engine, None, samples, stream, None, None)
        guard._skips.append(Skip(1, 0, "the loss is not finite on rank 0", math.nan, 1.0, [0], [sample]))
        with pytest.raises(InputError, match=r"step 1: 1 updates in a row were skipped; .* not finite on rank 0\. "):
            guard._stop(state, "1 updates in a row were skipped", by_skips=True)
    files = ("the stop in events.jsonl", "guard-report/report.txt", "batch 0 in guard-report")
    for what in ("what to pass over at the next start", *files):
        assert f"not written: {what}: " in caplog.text


@pytest.mark.parametrize(
    "update, advice",
    [
        (Update(3.0, grad_norm=1.0, applied=False), "Lower train.lr, or mend the pictures, or raise guard.loss_spike;"),
        (Update(math.nan, grad_norm=1.0, applied=False), "Lower train.lr, or mend the pictures;"),
    ],
)
def test_a_stop_over_losses_above_the_limit_names_the_key_that_limits_them(
    config, engine, samples, tmp_path, monkeypatch, update, advice
):
    keys = {"run": {"dir": tmp_path, "name": "spikes"}, "guard": {"loss_spike": 6.0}}
    run = config.model_copy(update={name: getattr(config, name).model_copy(update=keys[name]) for name in keys})
    run.run.folder.mkdir()
    state = replace(START, order=choose_order(run, samples), losses=[1.0] * 100).after(update)
    with open_stream(run, engine, samples, state, 2) as stream:
        next(stream)
        monkeypatch.setattr(engine, "_losses", [torch.full((2,), update.loss)])
        guard = Guard(run, engine, None, samples, stream, None, None)
        guard._record_skip(state, update)
        with pytest.raises(InputError) as stop:
            guard._stop(state, "1 updates in a row were skipped", by_skips=True)
    assert advice in str(stop.value)
