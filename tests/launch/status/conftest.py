"""A run's folder, as the trainer and its jobs leave it."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.loading import dump_config, load_config
from launch.slurm.restarts import JobEvent, write_job_event

RECIPE = Path(__file__).resolve().parents[3] / "configs" / "fill_lora.yaml"


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """make_run(name, steps=40, pace=2.0, outcome=None, checkpoint=None, job=None, age=0): a run below tmp_path/runs of
    4,000 steps, whose files are `age` seconds old."""

    def make(
        name: str,
        steps: int = 40,
        pace: float = 2.0,
        outcome: dict | None = None,
        checkpoint: int | None = None,
        job: str | None = None,
        age: float = 0,
    ) -> Path:
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(dump_config(load_config(RECIPE, [f"run.name={name}"])))
        lines = [{"step": step, "loss": 0.5, "grad_norm": 1.0, "seconds": pace} for step in range(1, steps + 1)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if outcome is not None:
            (run / "outcome.json").write_text(json.dumps(outcome))
        if checkpoint is not None:
            folder = run / "checkpoints" / f"step-{checkpoint:08d}"
            folder.mkdir(parents=True)
            (folder / "rank-00000.safetensors").write_bytes(bytes(1000))
            (folder / "COMPLETE").touch()
        if job is not None:
            write_job_event(run, JobEvent(job, "submitted"))
            write_job_event(run, JobEvent(job, "started", "n[1-2]"))
        for path in run.rglob("*"):
            os.utime(path, (time.time() - age,) * 2)
        return run

    return make
