"""Saves beside the training: what is written is the state of its step, and a run ends with its saves."""

import logging
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from tests.ranks import run_ranks


@pytest.fixture(autouse=True)
def heard(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("fluxfill"), "propagate", True)
    caplog.set_level(logging.INFO, logger="fluxfill")
    return caplog


@pytest.fixture
def make(config, engine, samples, tmp_path):
    """Makes (state, saver, parameter) of a run that trains one matrix: `make("key=value", ...)`."""
    from configs.loading import dump_config, load_config
    from trainer.checkpoints.run_state import RunState
    from trainer.checkpoints.save import Saver
    from trainer.engines.ema import Ema
    from trainer.training_data import choose_order, open_stream

    def start(*overrides: str):
        path = tmp_path / "config.yaml"
        path.write_text(dump_config(config), encoding="utf-8")
        settings = [f"run.dir={tmp_path}", "run.name=run", "train.steps=100", "train.warmup_steps=0"]
        run = load_config(path, [*settings, "checkpoint.every_steps=10", *overrides])
        model = torch.nn.Linear(8, 4, bias=False)
        model.device = torch.device("cpu")
        engine.prepare(model, lambda parameters: torch.optim.AdamW(parameters))
        state = RunState(step=10, batch=10, skips=0, restarts=0, order=choose_order(run, samples))
        return state, Saver(run, engine, Ema([], None), open_stream(run, engine, samples, state)), model.weight

    return start


def saved_weight(run: Path, step: int) -> torch.Tensor:
    from trainer.checkpoints.tensor_files import StateFiles

    return StateFiles(run / "checkpoints" / f"step-{step:08d}").read("weight", "weight", 0, 32)


def test_what_is_written_in_the_background_is_the_state_of_its_step(make, tmp_path, monkeypatch):
    import trainer.checkpoints.save

    state, saver, weight = make()
    may_write = threading.Event()
    real = trainer.checkpoints.save.write_tensors
    monkeypatch.setattr(trainer.checkpoints.save, "write_tensors", lambda *given: (may_write.wait(), real(*given)))
    before = weight.detach().clone().view(-1)
    saver.save_if_due(state)  # returns while nothing can be written yet
    with torch.no_grad():
        weight.add_(1.0)
    may_write.set()
    assert not (tmp_path / "run" / "checkpoints" / "step-00000010").exists()
    saver.finish()
    assert torch.equal(saved_weight(tmp_path / "run", 10), before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert len(modes) == 1  # a colleague who can read one file of it can read all


def test_a_finished_save_is_made_whole_at_the_next_step(make, tmp_path, heard):
    state, saver, _ = make()
    saver.save_if_due(state)
    saver._pending.written.result()
    saver.save_if_due(replace(state, step=11))
    assert (tmp_path / "run" / "checkpoints" / "step-00000010" / "COMPLETE").is_file()
    assert "saved" in heard.text


@pytest.mark.parametrize("how", ["stopping", "last step", "async=false"])
def test_some_saves_are_whole_before_the_run_goes_on(make, tmp_path, how):
    state, saver, _ = make(*(["checkpoint.async=false"] if how == "async=false" else []))
    state = replace(state, step={"stopping": 13, "last step": 100, "async=false": 10}[how])
    saver.save_if_due(state, stopping=how == "stopping")
    assert (tmp_path / "run" / "checkpoints" / f"step-{state.step:08d}" / "COMPLETE").is_file()


def test_a_save_that_fails_in_the_background_is_told_and_leaves_nothing(make, tmp_path, heard, monkeypatch):
    import trainer.checkpoints.save

    state, saver, _ = make()
    saver.save_if_due(state)
    saver.finish()

    def full(path: Path, tensors: dict) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer.checkpoints.save, "write_tensors", full)
    saver.save_if_due(replace(state, step=20))
    saver.finish()
    assert "step 20 was not saved" in heard.text and "No space left on device" in heard.text
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000010"]


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device (os error 28)")],
)
def test_a_disk_that_fills_up_at_the_end_of_a_save_is_told_and_left_as_it_was(
    make, tmp_path, heard, monkeypatch, error
):
    """When the ranks' files are there and the adapter is written: safetensors has an error of its own for it."""
    import trainer.checkpoints.save

    state, saver, _ = make()
    saver.save_if_due(state)
    saver.finish()

    def full(*_) -> None:
        raise error

    monkeypatch.setattr(trainer.checkpoints.save, "write_index", full)
    saver.save_if_due(replace(state, step=20))
    saver.finish()
    assert "step 20 was not saved" in heard.text and "No space left on device" in heard.text
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000010"]


def test_weights_that_are_not_finite_are_never_saved(make, tmp_path):
    state, saver, weight = make()
    with torch.no_grad():
        weight[2, 3] = float("nan")
    with pytest.raises(FloatingPointError, match=r"not finite and are not saved: weight \(rank 0\)"):
        saver.save_if_due(state)
    assert not list(tmp_path.glob("run/checkpoints/*/COMPLETE"))


def test_what_a_killed_save_left_is_removed(make, tmp_path):
    leftover = tmp_path / "run" / "checkpoints" / "step-00000007.staging"
    leftover.mkdir(parents=True)
    (leftover / "rank-00000.safetensors").write_bytes(b"half")
    make()
    assert not leftover.exists()


def test_the_clock_makes_a_save_due_too(make, tmp_path, monkeypatch):
    state, saver, _ = make("checkpoint.every_steps=null", "checkpoint.every_minutes=5")
    saver.save_if_due(state)
    assert saver._pending is None
    start = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: start + 301)
    saver.save_if_due(replace(state, step=11))
    assert saver._pending.state.step == 11
    saver.save_if_due(replace(state, step=12))
    saver.finish()
    assert not (tmp_path / "run" / "checkpoints" / "step-00000012").exists()


def save_with_one_rank_slow(arguments: list[str]) -> int:
    """The trainer, where rank 1 takes its time to write."""
    import os

    import trainer.checkpoints.save
    from trainer.main import train

    if os.environ["RANK"] == "1":
        real = trainer.checkpoints.save.write_tensors
        trainer.checkpoints.save.write_tensors = lambda *given: (time.sleep(1.0), real(*given))
    return train(arguments)


def test_a_checkpoint_waits_for_its_slowest_rank(config, tmp_path):
    """Ranks that finish apart: nothing is whole before all are, nothing hangs, and every checkpoint is right."""
    from configs.loading import dump_config
    from trainer.checkpoints.folders import complete_checkpoints, find_damage, step_of

    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    settings = ["train.steps=7", "train.warmup_steps=1", "train.global_batch_size=16", "checkpoint.every_steps=3"]
    settings += ["validation.every_steps=null", "logging.trackers=[]", f"run.dir={tmp_path}", "run.name=slow"]
    settings += ["checkpoint.keep_last=null"]
    run_ranks("fsdp2", 2, save_with_one_rank_slow, ["--config", str(path), *settings])
    found = complete_checkpoints(tmp_path / "slow")
    assert [step_of(folder) for folder in found] == [3, 6, 7]
    assert [find_damage(folder) for folder in found] == [None] * 3
    shutil.rmtree(tmp_path / "slow")
