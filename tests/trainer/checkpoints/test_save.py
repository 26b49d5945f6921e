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

from configs.errors import StorageFailed
from tests.ranks import run_ranks
from trainer.process.run_owner import disown


@pytest.fixture(autouse=True)
def heard(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("fluxfill"), "propagate", True)
    caplog.set_level(logging.INFO, logger="fluxfill")
    return caplog


@pytest.fixture
def averages():
    """Of the run that was made last, if it keeps any."""
    return {}


@pytest.fixture
def make(config, engine, samples, tmp_path, averages):
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
        ema = Ema(engine.local_slices(), run.train.ema_decay)
        averages.update(ema.averages)
        state = RunState(step=10, batch=10, skips=0, restarts=0, order=choose_order(run, samples))
        return state, Saver(run, engine, ema, open_stream(run, engine, samples, state, 16)), model.weight

    return start


def saved_weight(run: Path, step: int) -> torch.Tensor:
    from trainer.checkpoints.tensor_files import StateFiles

    return StateFiles(run / "checkpoints" / f"step-{step:08d}").read("weight", "weight", 0, 32)


def test_what_is_written_in_the_background_is_the_state_of_its_step(make, tmp_path, monkeypatch):
    import trainer.checkpoints.save

    state, saver, weight = make()
    may_write = threading.Event()
    real = trainer.checkpoints.save.write_tensors
    monkeypatch.setattr(trainer.checkpoints.save, "write_tensors", lambda *given: (may_write.wait(), real(*given))[1])
    before = weight.detach().clone().view(-1)
    saver.save_if_due(state)  # returns while nothing can be written yet
    with torch.no_grad():
        weight.add_(1.0)
    assert not (tmp_path / "run" / "checkpoints" / "step-00000010").exists()
    may_write.set()
    saver.finish()
    assert torch.equal(saved_weight(tmp_path / "run", 10), before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert len(modes) == 1  # a colleague who can read one file of it can read all


def test_a_finished_save_is_made_whole_at_the_next_step(make, tmp_path, heard):
    state, saver, _ = make()
    saver.save_if_due(state)
    saver._pending.written.result()
    saver.save_if_due(replace(state, step=11))
    assert saver._pending is None
    saver.finish()
    assert (tmp_path / "run" / "checkpoints" / "step-00000010" / "COMPLETE").is_file()
    assert "saved" in heard.text


def test_the_training_does_not_wait_for_what_rank_0_completes_and_deletes(make, tmp_path, monkeypatch):
    """A network filesystem takes minutes to delete a large checkpoint, and all ranks would stand still for it."""
    import trainer.checkpoints.save

    may_delete = threading.Event()
    monkeypatch.setattr(trainer.checkpoints.save, "remove_old", lambda *_: may_delete.wait())
    state, saver, _ = make()
    saver.save_if_due(state)
    saver._pending.written.result()
    saver.save_if_due(replace(state, step=11))  # returns, though nothing is deleted yet
    disowning = threading.Thread(target=disown)
    while not (tmp_path / "run" / "checkpoints" / "step-00000010" / "COMPLETE").exists():
        time.sleep(0.01)
    disowning.start()
    disowning.join(0.2)
    assert disowning.is_alive()  # the folder is this run's until the last of it is done
    may_delete.set()
    saver.finish()
    disowning.join()


def test_a_save_stands_where_old_ones_cannot_be_looked_through(make, tmp_path, monkeypatch, heard):
    import trainer.checkpoints.save

    def refuse(*_) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(trainer.checkpoints.save, "remove_old", refuse)
    state, saver, _ = make()
    saver.save_if_due(state)
    saver.finish()
    assert "old checkpoints were not deleted: [Errno 5] Input/output error" in heard.text
    assert "was not saved" not in heard.text and saver.saved_step == 10


def test_a_node_without_room_for_copies_saves_while_training_waits(make, tmp_path, monkeypatch, heard):
    from trainer.checkpoints import host_copies

    monkeypatch.setattr(host_copies, "available_memory_bytes", lambda: 140.0)
    state, saver, weight = make()  # whose weights take 128 bytes
    saver.save_if_due(state)
    with torch.no_grad():
        weight.zero_()
    assert (tmp_path / "run" / "checkpoints" / "step-00000010" / "COMPLETE").is_file()
    assert saved_weight(tmp_path / "run", 10).any()
    assert "step 10 is saved while training waits (not checkpoint.async): its copy takes 0.0 GiB" in heard.text


@pytest.mark.parametrize("how", ["stopping", "last step", "async=false"])
def test_some_saves_are_whole_before_the_run_goes_on(make, tmp_path, how):
    state, saver, _ = make(*(["checkpoint.async=false"] if how == "async=false" else []))
    state = replace(state, step={"stopping": 13, "last step": 100, "async=false": 10}[how])
    saver.save_if_due(state, stopping=how == "stopping")
    assert (tmp_path / "run" / "checkpoints" / f"step-{state.step:08d}" / "COMPLETE").is_file()


@pytest.mark.parametrize("stopping", [False, True])
def test_without_a_save_at_the_end_one_that_has_begun_is_made_whole(make, tmp_path, stopping):
    state, saver, _ = make("checkpoint.at_end=false", "train.steps=13")
    saver.save_if_due(state)
    saver.save_if_due(replace(state, step=13 - stopping), stopping=stopping)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000010"]
    assert (tmp_path / "run" / "checkpoints" / "step-00000010" / "COMPLETE").is_file()


@pytest.mark.fault(9, "ENOSPC in the background of a save")
def test_a_save_that_fails_in_the_background_is_told_and_leaves_nothing(make, tmp_path, heard, monkeypatch):
    import trainer.checkpoints.save

    state, saver, _ = make()
    saver.save_if_due(state)
    saver.finish()

    def full(path: Path, tensors: dict) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer.checkpoints.save, "write_tensors", full)
    assert saver.save_if_due(replace(state, step=20)) is None
    saver.finish()
    assert "step 20 was not saved" in heard.text and "No space left on device" in heard.text
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000010"]
    with pytest.raises(StorageFailed, match=r"last save has failed: step 20 .* goes on from step 10 "):
        saver.refuse_unsaved_end()
    monkeypatch.undo()
    saver.save_if_due(replace(state, step=30))
    saver.finish()
    saver.refuse_unsaved_end()


@pytest.mark.fault(9, "ENOSPC at the end of a save, as the system and as safetensors say it")
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


def test_a_save_goes_wrong_and_the_run_goes_on_where_the_disk_does_not_tell_whose_the_folder_is(
    make, tmp_path, heard, monkeypatch
):
    from trainer.process import run_owner

    def refuse() -> None:
        raise OSError(5, "Input/output error")

    state, saver, _ = make()
    monkeypatch.setattr(run_owner, "confirm_ownership", refuse)
    saver.save_if_due(state)
    saver.finish()
    assert "step 10 was not saved" in heard.text and "Input/output error" in heard.text


@pytest.mark.fault(14, "NaN in a weight at the save")
def test_weights_that_are_not_finite_are_never_saved(make, tmp_path, heard):
    """Whoever asked for the save is told, and goes back; a run that stops does that at its next start."""
    state, saver, weight = make()
    with torch.no_grad():
        weight[2, 3] = float("nan")
    wrong = "weights are not finite and are not saved: weight (rank 0)"
    assert saver.save_if_due(state) == wrong
    assert f"step 10 was not saved ({wrong}); earlier checkpoints are intact" in heard.text
    assert saver.save_if_due(replace(state, step=11)) is None, "it is told once"
    assert saver.save_if_due(replace(state, step=100)) == wrong
    assert saver.save_if_due(replace(state, step=13), stopping=True) is None
    assert not list(tmp_path.glob("run/checkpoints/*"))


@pytest.mark.fault(14, "NaN and infinity in a moment or the average at the save, which runs beside the training")
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("kind", ["exp_avg", "exp_avg_sq", "ema"])
def test_moments_and_averages_that_are_not_finite_are_never_saved(make, engine, averages, tmp_path, heard, kind, value):
    state, saver, _ = make("train.ema_decay=0.9")
    engine.init_optimizer_state()
    saver.save_if_due(replace(state, step=10))
    tensor = averages["weight"] if kind == "ema" else engine.local_slices()[0].moments[kind]
    before = tensor.clone()
    tensor.view(-1)[17] = value
    assert saver.save_if_due(replace(state, step=20)) is None, "it is looked for beside the training"
    wrong = f"{kind}/weight is not finite and is not saved on rank 0"
    assert saver.save_if_due(replace(state, step=30)) == wrong, "and nothing of that state is begun"
    saver.finish()
    assert f"step 20 was not saved ({wrong})" in heard.text and "step 30" not in heard.text
    assert saver.saved_step == 10, "the one before stands"
    tensor.copy_(before)
    assert saver.save_if_due(replace(state, step=40)) is None
    saver.finish()
    assert saver.saved_step == 40
    saver.refuse_unsaved_end()


@pytest.mark.fault(10, "a killed save's folder, found at the next start")
def test_what_a_killed_save_left_is_removed(make, tmp_path):
    leftover = tmp_path / "run" / "checkpoints" / "step-00000007.staging"
    leftover.mkdir(parents=True)
    (leftover / "rank-00000.safetensors").write_bytes(b"half")
    make()
    assert not leftover.exists()


def test_the_clock_makes_a_save_due_too(make, tmp_path, monkeypatch):
    state, saver, _ = make("checkpoint.every_steps=null", "checkpoint.every_minutes=5")
    saver.save_if_due(state)
    assert not saver._pending
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
        trainer.checkpoints.save.write_tensors = lambda *given: (time.sleep(1.0), real(*given))[1]
    return train(arguments)


@pytest.mark.fault(26, "one of two ranks writes a second longer")
def test_a_checkpoint_waits_for_its_slowest_rank(config, tmp_path):
    """Ranks that finish apart: nothing is whole before all are, nothing hangs, and every checkpoint is right."""
    from configs.loading import dump_config
    from data.storage.checkpoint_folders import complete_checkpoints, step_of
    from trainer.checkpoints.folders import find_damage

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


def test_the_step_that_a_run_can_go_on_from_falls_with_a_rollback(make, tmp_path):
    from trainer.checkpoints.folders import set_later_ones_aside

    state, saver, _ = make("checkpoint.async=false")
    assert saver.saved_step == 0
    for step in (10, 20):
        saver.save_if_due(replace(state, step=step))
        assert saver.saved_step == step
    set_later_ones_aside(tmp_path / "run", 10)
    assert saver.saved_step == 10
