"""The recipe as a whole: one short run by one process."""

import json
import math
import os
import signal
from pathlib import Path

import pytest

from configs.loading import dump_config
from tests.ranks import RankFailure, run_ranks


def train(arguments: list[str]) -> int:
    from trainer.main import train

    return train(arguments)


@pytest.fixture
def arguments(config, tmp_path) -> list[str]:
    """The command line of a run of three steps in tmp_path / "short", which validates and saves at the second."""
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    settings = [f"run.dir={tmp_path}", "run.name=short", "train.steps=3", "train.warmup_steps=0"]
    settings += ["train.global_batch_size=2", "train.micro_batch_size=2", "validation.every_steps=2"]
    settings += ["checkpoint.every_steps=2", "checkpoint.async=false", "logging.trackers=[]"]
    return ["--config", str(path), *settings]


def complete(run: Path) -> list[str]:
    return sorted(marker.parent.name for marker in (run / "checkpoints").glob("*/COMPLETE"))


def validated(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "validation.jsonl").read_text().splitlines()]


def train_and_fall_at(step: int, how: str, arguments: list[str]) -> int:
    """Train, and be killed, or told to stop, in the middle of the validation of a step."""
    from trainer.process.stop_signals import install_stop_signals
    from trainer.validation.validator import Validator

    run = Validator._sample_all

    def fall(self, transformer, at):
        if at == step:
            os.kill(os.getpid(), {"killed": signal.SIGKILL, "stopped": signal.SIGTERM}[how])
        return run(self, transformer, at)

    Validator._sample_all = fall
    install_stop_signals()
    return train(arguments)


@pytest.mark.fault(4, "kill -9 behind a save that was due, during its validation")
def test_a_run_that_is_killed_while_it_validates_has_saved_that_step(arguments, tmp_path):
    with pytest.raises(RankFailure, match="died"):
        run_ranks("single", 1, train_and_fall_at, 2, "killed", arguments)
    run = tmp_path / "short"
    assert complete(run) == ["step-00000002"] and validated(run) == [0]
    assert run_ranks("single", 1, train, arguments) == [3]
    assert validated(run) == [0, 2, 3]


@pytest.mark.fault(3, "a stop signal during validation")
@pytest.mark.parametrize("at, saved", [(0, []), (2, ["step-00000002", "step-00000003"]), (3, ["step-00000003"])])
def test_a_run_that_is_told_to_stop_while_it_validates_stops_and_validates_then(arguments, tmp_path, at, saved):
    run = tmp_path / "short"
    with pytest.raises(RankFailure, match="Stopped: stopped by SIGTERM"):
        run_ranks("single", 1, train_and_fall_at, at, "stopped", arguments)
    assert set(saved) <= set(complete(run)) and not (run / "final").exists()
    assert at not in (validated(run) if at else [])
    assert run_ranks("single", 1, train, arguments) == [3]
    assert validated(run) == [0, *([2] if at != 2 else []), 3]
    assert (run / "final" / "model_index.json").is_file()


def train_and_fall_in(place: str, how: str, arguments: list[str]) -> int:
    """Train, and be told to stop, or find no memory, as a function begins for the first time.  place: its name in
    trainer/main.py or, behind that of a module, there."""
    import importlib

    import torch

    from trainer import main
    from trainer.process.stop_signals import install_stop_signals

    name, _, place = place.rpartition(".")
    module = importlib.import_module(name or "trainer.main")
    begun, falls = getattr(module, place), [how]

    def fall(*given, **options):
        if falls and falls.pop() == "stopped":
            os.kill(os.getpid(), signal.SIGUSR2)
        elif how == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return begun(*given, **options)

    setattr(module, place, fall)
    install_stop_signals()
    return main.train(arguments)


WITHOUT_VALIDATION = ("validation.every_steps=null", "checkpoint.every_steps=null")


@pytest.mark.fault(3, "a stop signal while weights are placed, and in the first step")
@pytest.mark.parametrize("place, saved", [("build_transformer", []), ("flow_loss", ["step-00000001"])])
def test_a_run_that_is_told_to_stop_as_it_begins_stops_then(arguments, tmp_path, place, saved):
    with pytest.raises(RankFailure, match=f"Stopped: stopped by SIGUSR2 after step {len(saved)}; resumable"):
        run_ranks("single", 1, train_and_fall_in, place, "stopped", [*arguments, *WITHOUT_VALIDATION])
    assert complete(tmp_path / "short") == saved and not (tmp_path / "short" / "final").exists()


@pytest.mark.fault(3, "a stop signal in a save")
def test_a_save_that_has_begun_ends_and_the_run_stops_after_the_next_step(arguments, tmp_path):
    place, settings = "trainer.checkpoints.save.write_tensors", ["validation.every_steps=null", "train.steps=4"]
    with pytest.raises(RankFailure, match="Stopped: stopped by SIGUSR2 after step 3; resumable"):
        run_ranks("single", 1, train_and_fall_in, place, "stopped", [*arguments, *settings])
    assert complete(tmp_path / "short") == ["step-00000002", "step-00000003"]


@pytest.mark.fault(3, "a stop signal in the export")
def test_an_export_that_has_begun_ends_though_the_run_is_told_to_stop(arguments, tmp_path):
    arguments = [*arguments, *WITHOUT_VALIDATION]
    assert run_ranks("single", 1, train_and_fall_in, "export_and_verify", "stopped", arguments) == [3]
    assert (tmp_path / "short" / "final" / "model_index.json").is_file()


@pytest.mark.fault(15, "torch's error in the export")
def test_an_export_that_does_not_fit_costs_no_step_and_is_made_up_for(arguments, tmp_path):
    run, arguments = tmp_path / "short", [*arguments, *WITHOUT_VALIDATION]
    with pytest.raises(RankFailure, match="OutOfMemoryError"):
        run_ranks("single", 1, train_and_fall_in, "export_and_verify", "memory", arguments)
    assert complete(run) == ["step-00000003"] and not (run / "final").exists()
    assert run_ranks("single", 1, train, arguments) == [3]
    assert (run / "final" / "model_index.json").is_file()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3, "nothing was trained again"


def test_a_run_returns_its_last_step_and_leaves_what_it_is_for(config, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    settings = [f"run.dir={tmp_path}", "run.name=short", "train.steps=3", "train.warmup_steps=0"]
    settings += [
        "train.global_batch_size=2",
        "train.micro_batch_size=2",
        "validation.every_steps=3",
        "checkpoint.every_steps=2",
    ]
    assert run_ranks("single", 1, train, ["--config", str(path), *settings]) == [3]
    run = tmp_path / "short"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3] and all(math.isfinite(line["loss"]) for line in lines)
    validated = [json.loads(line)["step"] for line in (run / "validation.jsonl").read_text().splitlines()]
    assert validated == [0, 3]
    saved = sorted(folder.name for folder in (run / "checkpoints").iterdir())
    assert saved == ["step-00000002", "step-00000003"]
    assert (run / "final" / "model_index.json").is_file()
