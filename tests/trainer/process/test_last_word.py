import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import PATIENCE
from trainer.process.last_word import repeat_behind_launcher

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("engine", [["--config_file", "configs/engines/ddp.yaml", "--num_processes", "2"], []])
def test_the_last_line_under_a_plain_launcher_is_the_reason(engine, patient_main):
    """torch's launcher, and accelerate's own for one process without a config file."""
    line = [sys.executable, "-P", "-m", "accelerate.commands.launch", *engine, "--main_process_port", "0"]
    if not engine:
        line += ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    environment = {name: value for name, value in os.environ.items() if name != "FLUXFILL_OUTCOME"}
    ended = subprocess.run(
        [*line, patient_main, "--config", "configs/demo.yaml", "train.lrr=1"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    lines = ended.stderr.strip().splitlines()
    assert ended.returncode == 1 and "Traceback (most recent call last):" in lines
    assert lines[-1] == "command line: train.lrr is 1, but there is no such key. Did you mean train.lr?"


@pytest.mark.parametrize(
    "variables", [{}, {"FLUXFILL_OUTCOME": "x"}, {"FLUXFILL_OUTCOME": "x", "TORCHELASTIC_RUN_ID": "y"}]
)
def test_without_a_launcher_and_below_fluxfill_train_nothing_is_repeated(monkeypatch, variables):
    for name in ("FLUXFILL_OUTCOME", "TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    repeat_behind_launcher("reason")
