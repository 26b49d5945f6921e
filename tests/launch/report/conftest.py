"""A run's folder with all that befalls runs: skips, a rollback, a preemption, a restart on other GPUs, pictures."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from configs.loading import dump_config, load_config

RECIPE = Path(__file__).resolve().parents[3] / "configs" / "fill_lora.yaml"
BEGIN = 1_795_000_000.0
PACE = 30.0


def metrics_line(step: int, time: float, *, rate: float = 1.0, bad: bool = False) -> dict:
    noise = random.Random(step)
    return {
        "step": step,
        "time": time,
        "loss": None if bad else rate * (0.4 + math.exp(-step / 60)) + 0.03 * noise.gauss(0, 1),
        "grad_norm": None if bad else 1 + noise.random(),
        "lr": 1e-4 * min(step / 20, 1),
        "seconds": PACE,
        "samples_per_second": 0.5 + 0.02 * noise.random(),
        "data_wait_seconds": 0.01 + (2 if step % 50 == 0 else 0),
        "peak_memory_gib": 61.25,
    }


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """make_run(name, title=name, rate=1.0, key="cat", end=None): 200 steps of a run that was preempted at step 120, had
    the steps from 101 undone, and went on with half the GPUs."""

    def make(name: str, *, title: str = "", rate: float = 1.0, key: str = "cat", end: dict | None = None) -> Path:
        run = tmp_path / "runs" / name
        (run / "samples").mkdir(parents=True)
        config = dump_config(load_config(RECIPE, ["run.name=a-run", "train.lr=3e-5"]))
        config = config.replace("name: a-run", f"name: {json.dumps(title or name)}")
        (run / "config.yaml").write_text(config, encoding="utf-8")
        again = BEGIN + 120 * PACE + 3600
        times = {step: BEGIN + step * PACE if step <= 100 else again + (step - 100) * PACE for step in range(1, 201)}
        kept = [metrics_line(step, times[step], rate=rate, bad=step in (60, 61)) for step in times]
        undone = [metrics_line(step, BEGIN + step * PACE, rate=rate) for step in range(101, 121)]
        write_lines(run / "metrics.jsonl", kept)
        write_lines(run / "metrics.1.jsonl", undone)
        skips = [
            {
                "time": times[step],
                "event": "skip",
                "step": step,
                "why": "the loss is not finite on rank 0",
                "samples": [{"key": key}],
            }
            for step in (60, 61)
        ]
        back = {"time": times[61], "event": "rollback", "step": 61, "to_step": 50, "lr_scale": 0.5, "why": "2 skips"}
        write_lines(run / "events.jsonl", [*skips, back])
        of_gpus = {"host": "n01", "engine": "fsdp2", "nodes": 1, "gpus": ["NVIDIA H100"], "commit": "a1b2c3d4e5f6a7"}
        starts = [
            {"time": BEGIN, "step": 0, "processes": 8, **of_gpus, "versions": {"torch": "2.13.0"}},
            {
                "time": BEGIN + 121 * PACE,
                "code": 75,
                "reason": "stopped by SIGUSR1 after step 120; resumable",
                "step": 120,
            },
            {"time": again, "step": 100, "processes": 4, **of_gpus, "versions": {"torch": "2.13.1"}},
        ]
        write_lines(run / "starts.jsonl", starts + ([] if end is None else [{"time": times[200], **end}]))
        figures = {"loss_sigma_0.1": 0.9, "loss_sigma_0.9": 0.3, "hole_psnr_ceiling": 31.0, "keep_psnr": 29.0}
        validated = [
            {
                "step": step,
                "holdout": figures | {"hole_psnr": 15 + step / 20},
                "train": figures | {"hole_psnr": 16 + step / 20},
            }
            for step in (0, 100, 200)
        ]
        write_lines(run / "validation.jsonl", validated)
        for step in (0, 100, 200):
            for split, green in (("holdout", 90), ("train", 140)):
                picture = Image.new("RGB", (640, 320), (step, green, 160))
                picture.save(run / "samples" / f"step-{step:08d}-{split}.png")
        if end is not None:
            (run / "outcome.json").write_text(json.dumps(end), encoding="utf-8")
        return run

    return make
