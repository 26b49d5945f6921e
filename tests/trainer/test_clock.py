"""A run under a clock that jumps, as of a machine that is set right, or wrong, while it trains."""

import itertools
import json
import time

import pytest

from configs.loading import dump_config
from tests.ranks import run_ranks

SETTINGS = ["train.steps=6", "train.warmup_steps=0", "train.global_batch_size=2", "train.micro_batch_size=2"]
SETTINGS += ["validation.every_steps=null", "logging.trackers=[]", "method={type: lora, rank: 2, alpha: 2}"]
SETTINGS += ["checkpoint.every_steps=4", "checkpoint.every_minutes=60", "guard.step_timeout_minutes=5"]
JUMPS = (0.0, 86400.0, -86400.0, 3.2e8, -3.2e8)  # a day, ten years


def train(arguments: list[str], jumps: tuple[float, ...]) -> tuple[int, int]:
    """(steps that were reached, how often the clock was read); each look finds it at another time."""
    from trainer import main

    looks, clock, count = itertools.cycle(jumps), time.time, itertools.count()
    time.time = lambda: (next(count), clock() + next(looks))[1]
    try:
        return main.train(arguments), next(count)
    finally:
        time.time = clock


@pytest.mark.fault(19, "the clock jumps by days and years, back and forth, at every look of a run that trains")
def test_a_clock_that_jumps_changes_nothing_of_a_run(config, tmp_path):
    """Neither a save by the clock is due, nor a step taken for a hang, nor is the folder lost, nor a line left out."""
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    place = ["--config", str(path), f"run.dir={tmp_path}", "run.name=run"]
    [(steps, looks)] = run_ranks("single", 1, train, [*place, *SETTINGS], JUMPS)
    assert steps == 6 and looks > 0, "nothing would be shown"
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(value >= 0 for line in lines for value in line.values() if isinstance(value, float)), "paces and times"
    assert sorted(folder.name for folder in (run / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
    events = [json.loads(line)["event"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert events == ["exported"] and not list(run.glob("stacks/*"))
