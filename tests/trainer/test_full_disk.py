"""A run whose disk fills up: it trains on, keeps its figures, and says from where it can go on."""

import json
import os
import signal
import sys
import threading

import pytest

from configs.loading import dump_config
from tests.data.storage.small_disk import open_small_disk
from tests.patience import PATIENCE
from tests.ranks import run_ranks


def train_until_stopped(arguments: list[str], fill_at: int, stop_at: int) -> int:
    """The exit code of a run whose disk is filled up after a step, and which is told to stop after a later one. What a
    save could write before it failed is there until the first validation after it is logged."""
    import trainer.checkpoints.save
    from trainer.main import train
    from trainer.process.outcome import run_and_report
    from trainer.process.stop_signals import install_stop_signals
    from trainer.run_log import RunLog

    step, validation, write_tensors = RunLog.step, RunLog.validation, trainer.checkpoints.save.write_tensors
    validated = threading.Event()

    def validate(self, line):
        validation(self, line)
        if line is not None and line["step"] > 0:
            validated.set()

    def write_and_wait(*given):
        try:
            return write_tensors(*given)
        finally:
            validated.wait(PATIENCE)

    def faulty(self, state, *rest):
        step(self, state, *rest)
        if state.step == fill_at:
            with (self._folder / "ballast").open("wb", buffering=0) as file:
                try:
                    while file.write(bytes(4096)) == 4096:
                        pass
                except OSError:
                    pass
        if state.step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    RunLog.step, RunLog.validation, trainer.checkpoints.save.write_tensors = faulty, validate, write_and_wait
    install_stop_signals()
    sys.argv = ["main.py", *arguments]
    return run_and_report(train)


@pytest.mark.fault(9, "a real disk of 16 MiB, filled in mid-run")
def test_figures_and_outcome_survive_and_the_outcome_names_what_is_saved(config, tmp_path):
    """The disk of 16 MiB has no room for a checkpoint of 60."""
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    with open_small_disk(tmp_path) as disk:
        if not disk.is_real:
            pytest.skip("no disk can be mounted here")
        settings = [f"run.dir={disk.folder}", "run.name=run", "train.steps=40", "train.warmup_steps=0"]
        settings += ["train.global_batch_size=2", "train.micro_batch_size=2", "validation.every_steps=4"]
        settings += ["checkpoint.every_steps=3", "logging.trackers=[tensorboard]"]
        arguments = ["--config", str(path), *settings]
        assert run_ranks("single", 1, train_until_stopped, arguments, 2, 8) == [75]
        run = disk.folder / "run"
        outcome = json.loads((run / "outcome.json").read_text())
        assert outcome["reason"] == "stopped by SIGTERM after step 9, which was not saved; resumable from the start"
        lines = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert lines == list(range(1, 10))
        assert not list(run.glob("checkpoints/*"))
        assert [json.loads(line)["step"] for line in (run / "validation.jsonl").read_text().splitlines()] == [0, 4]


def train_without_saves_from(arguments: list[str], step: int) -> int:
    """The exit code of a run whose saves meet a full disk from a step on, its export a disk with room again."""
    import trainer.checkpoints.save as save
    from trainer.main import train
    from trainer.process.outcome import run_and_report

    real = save.write_tensors

    def write(path, tensors):
        if int(path.parent.stem.removeprefix("step-")) >= step:
            raise OSError(28, "No space left on device")
        return real(path, tensors)

    save.write_tensors = write
    sys.argv = ["main.py", *arguments]
    return run_and_report(train)


@pytest.mark.fault(9, "ENOSPC at a run's last saves alone")
def test_a_run_whose_last_state_is_saved_nowhere_has_failed_though_its_export_is_whole(config, tmp_path):
    path, run = tmp_path / "config.yaml", tmp_path / "run"
    path.write_text(dump_config(config), encoding="utf-8")
    settings = [f"run.dir={tmp_path}", "run.name=run", "train.steps=4", "train.warmup_steps=0"]
    settings += ["train.global_batch_size=2", "train.micro_batch_size=2", "validation.every_steps=null"]
    arguments = ["--config", str(path), *settings, "checkpoint.every_steps=2", "logging.trackers=[]"]
    assert run_ranks("single", 1, train_without_saves_from, arguments, 4) == [1]
    outcome = json.loads((run / "outcome.json").read_text())
    assert outcome["code"] == 1 and "step 4 was not saved ([Errno 28] No space left" in outcome["reason"]
    assert f"{run / 'final'} is whole" in outcome["reason"] and "goes on from step 2 " in outcome["reason"]
    assert (run / "final" / "model_index.json").is_file()
    assert run_ranks("single", 1, train_without_saves_from, arguments, 5) == [0], "the same command makes up for it"
    assert (run / "checkpoints" / "step-00000004" / "COMPLETE").is_file()
    assert json.loads((run / "outcome.json").read_text())["code"] == 0
