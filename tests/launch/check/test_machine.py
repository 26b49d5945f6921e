import sys
from pathlib import Path

import pytest

from launch.check.machine import check_gpus, check_processes, check_torch
from launch.gpus import Gpu


def card(index: int = 0, *, used: float = 0.5, capability: tuple[int, int] = (9, 0)) -> Gpu:
    return Gpu(index, "NVIDIA H200", 140.0, used, "580.1", capability)


def test_a_machine_without_gpus_is_told():
    (made,) = check_gpus([])
    assert made.state == "ok" and "none" in made.what


def test_gpus_are_counted_and_one_that_is_in_use_is_named(monkeypatch):
    monkeypatch.setattr("launch.check.machine.check_torch", lambda count: None)
    first, busy, _ = check_gpus([card(0), card(1, used=60)])
    assert first.what == "2 x NVIDIA H200 with 140 GiB, driver 580.1"
    assert busy.state == "warning" and "GPU 1: 60.0 of its 140.0 GiB" in busy.what


@pytest.mark.parametrize(
    "answer, state, words",
    [
        ('["2.13.0+cpu", null, 0]', "error", "built for CPUs"),
        ('["2.13.0", "13.0", 0]', "error", "sees 0 of 2"),
        ('["2.13.0", "13.0", 2]', "ok", "sees 2"),
        ("", "error", "cannot be imported"),
    ],
)
def test_torch_is_asked_for_the_gpus_that_the_driver_has(answer: str, state: str, words: str, tmp_path: Path):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{answer}'\n")
    python.chmod(0o755)
    made = check_torch(2, str(python))
    assert made.state == state and words in made.what and (made.cure or state == "ok")


def test_a_torch_that_does_not_answer_is_told(tmp_path: Path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 60\n")
    python.chmod(0o755)
    made = check_torch(1, str(python), timeout_seconds=0.1)
    assert made.state == "error" and "did not answer within 0.1 s" in made.what and made.cure


def test_the_torch_of_this_environment_answers():
    made = check_torch(1, sys.executable)
    assert "torch" in made.what and "cannot be imported" not in made.what


@pytest.mark.parametrize(
    "overrides, gpus, processes, state, words",
    [
        ([], (card(), card(1)), 2, "ok", "each with 1 of 2 samples"),
        ([], (card(),), 2, "error", "2 processes, and 1 GPU"),
        ([], (), 4, "warning", "leaves some of 4 processes idle"),
        (["train.global_batch_size=7"], (), 2, "ok", "each with 3 or 4 of 7 samples"),
    ],
)
def test_processes_are_held_against_gpus_and_batch(overrides, gpus, processes, state, words, situate):
    (made,) = check_processes(situate(*overrides, gpus=gpus, processes=processes))
    assert made.state == state and words in made.what


def test_cards_without_bf16_are_named(situate):
    old = (card(capability=(7, 5)),)
    assert any("bf16 in software" in made.what for made in check_processes(situate(gpus=old)))
    assert all(made.state == "ok" for made in check_processes(situate("model.precision=fp32", gpus=old)))


@pytest.mark.parametrize(
    "devices, overrides, warned",
    [
        ("[cuda:9]", [], True),
        ("[cuda:2]", [], False),
        ("[cuda:2, cuda:3]", [], False),
        ("[cuda:9]", ["slurm.gpus_per_node=10"], False),
        ("[cpu]", [], False),
    ],
)
def test_a_gpu_that_encodes_far_behind_those_that_train_is_a_warning(devices, overrides, warned, situate):
    online = ("data.mode=online", f"data.encoder_devices={devices}", *overrides)
    checks = list(check_processes(situate(*online, processes=2)))
    found = [made for made in checks if made.state == "warning"]
    assert bool(found) is warned
    for made in found:
        assert "names cuda:9, but 2 that train and 1 that encode are 3 GPUs" in made.what and "cuda:2" in made.cure
