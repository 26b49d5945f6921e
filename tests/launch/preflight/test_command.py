"""The command as a person gives it: alone, and under accelerate's launcher."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from configs.loading import dump_config
from tests.holding import HOLD
from tests.patience import PATIENCE

if TYPE_CHECKING:
    from data.cache.open_cache import Cache

ALONE = ["-c", "from launch.cli import main; main()", "preflight"]
ENGINE = Path(__file__).resolve().parents[3] / "configs" / "engines" / "ddp.yaml"
LAUNCHED = ["-P", "-m", "accelerate.commands.launch", "--config_file", str(ENGINE), "--num_processes", "2"]
LAUNCHED += ["--main_process_port", "0", "-m", "launch.preflight.command"]


def run_patiently(*words: str) -> "subprocess.CompletedProcess[str]":
    """Python, in which a preflight waits as long as tests wait."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HOLD), *sys.path])}
    line = [sys.executable, *words]
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)


@pytest.mark.parametrize("line, ranks", [(ALONE, 1), (LAUNCHED, 2)], ids=["alone", "accelerate launch"])
def test_a_machine_that_is_fit_is_said_to_be(
    line: list[str], ranks: int, cache: "Cache", demo_config: Callable, tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(demo_config(cache.folder, f"run.dir={tmp_path}/runs", "logging.trackers=[]")))
    done = run_patiently(*line, str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"64 MiB between {ranks} ranks in" in done.stdout if ranks > 1 else "64 MiB" not in done.stdout
    assert done.stdout.count(f"{path}: all is right") == 1


def test_a_wrong_config_is_a_finding(tmp_path: Path) -> None:
    done = run_patiently(*ALONE, str(tmp_path / "none.yaml"))
    assert done.returncode == 2 and "there is no such file" in done.stdout
