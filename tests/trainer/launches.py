"""Real launches of a small run whose trainer may have a fault, under the supervisor of `fluxfill train`."""

import json
import os
import sys
from pathlib import Path

from configs.loading import dump_config
from configs.schema import Config
from launch.command import SHUTDOWN_SECONDS, render_environment
from launch.supervise import Outcome, run_supervised
from tests.orphans import adopt_no_orphans

ROOT = Path(__file__).parents[2]


def launch(
    config: Config,
    folder: Path,
    name: str,
    engine: str,
    num_processes: int,
    fault: str,
    *overrides: str,
    shutdown_seconds: int = SHUTDOWN_SECONDS,
) -> Outcome:
    """How a run of four steps ended that saves every second one.

    fault: Python that each rank executes before it starts, with its `rank`.  shutdown_seconds: from a stop signal to
    SIGKILL.
    """
    path = folder / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    settings = [f"run.dir={folder}", f"run.name={name}", "train.steps=4", "train.warmup_steps=0"]
    settings += [f"train.global_batch_size={4 * num_processes}", "train.micro_batch_size=4", "logging.trackers=[]"]
    settings += ["validation.every_steps=null", "checkpoint.every_steps=2", "checkpoint.async=false"]
    command = [sys.executable, "-P", "-m", "accelerate.commands.launch", "--num_processes", str(num_processes)]
    command += ["--config_file", str(ROOT / "configs" / "engines" / f"{engine}.yaml"), "--main_process_port", "0"]
    command += [str(ROOT / "tests" / "trainer" / "faulty_train.py"), "--config", str(path), *settings, *overrides]
    outcome_file = folder / name / "outcome.json"
    environment = render_environment(outcome_file, num_processes, 2, os.environ, shutdown_seconds)
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "FAULT": fault}
    try:
        return run_supervised(command, environment, outcome_file, restarts_after=("out of memory", "hang"))
    finally:
        adopt_no_orphans()


def losses(run: Path) -> list[float]:
    """Of the four steps."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    return [line["loss"] for line in lines]
