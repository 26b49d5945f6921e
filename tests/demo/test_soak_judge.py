"""The judge of a soak finds what is wrong."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from demo.soak_judge import STEPS, Event, compare, judge_loss, judge_replaced, unfinished_save


def write_run(folder: Path, change: float = 0.0, *, losses: int = STEPS, of: str = "final") -> Path:
    """A folder as a run leaves it, one number of one file changed."""
    lines = [json.dumps({"step": step, "loss": 1 / step}) for step in range(1, losses + 1)]
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    for name in ("final", "final-ema", f"checkpoints/step-{STEPS:08d}"):
        (folder / name).mkdir(parents=True)
        file = "rank-00000.safetensors" if name.startswith("checkpoints") else "pytorch_lora_weights.safetensors"
        tensor = np.ones((3, 4), np.float32)
        tensor[1, 2] += change if name == of else 0.0
        save_file({"x": tensor}, folder / name / file)
    return folder


@pytest.mark.parametrize(
    "change, exact, found",
    [
        ({}, True, ""),
        ({"change": 1e-6}, True, "x is 9.5e-07 apart"),
        ({"change": 1e-6}, False, ""),
        ({"change": 1e-4}, False, "x is 1.0e-04 apart"),
        ({"change": float("nan")}, False, "x is nan apart"),
        ({"change": 1e-6, "of": "final-ema"}, True, "final-ema/pytorch_lora_weights.safetensors: x is"),
        ({"change": 1e-6, "of": f"checkpoints/step-{STEPS:08d}"}, True, "rank-00000.safetensors: x is"),
        ({"losses": STEPS - 1}, False, f"{STEPS - 1} losses, not {STEPS}"),
    ],
)
def test_another_end_of_a_run_is_found(tmp_path, change, exact, found):
    apart, told = compare(write_run(tmp_path / "a", **change), write_run(tmp_path / "b"), exact=exact)
    assert (found in told) if found else (told == "" and apart <= change.get("change", 0.0))


@pytest.mark.parametrize(
    "fault, last, writing, lost, most",
    [
        ("kill -9 a rank, after 3 steps", 15, None, 5, None),
        ("kill -9 a rank, after 3 steps", 15, None, 6, 5),
        ("kill -9 a rank, after 3 steps", 17, 15, 7, None),  # two steps while the save of 15 was being written
        ("kill -9 a rank, after 3 steps", 17, 15, 8, 7),
        ("kill -9 a rank, after 3 steps", 15, 10, 10, None),  # the next save, which is due, waits for it
        ("kill -9 a rank, after 3 steps", 40, 10, 35, 10),  # a save that never ends
        ("kill -9 a rank, after 3 steps", 17, None, -1, 5),
        ("truncated shard, after 3 steps", 17, None, 6, 5),
        ("signal, after 3 steps", 17, None, 0, None),
        ("signal, after 3 steps", 17, 15, 1, 0),
        ("none", 17, None, 1, 0),
        ("full disk, after 6 steps", 30, None, 30, None),
    ],
)
def test_steps_that_were_lost_are_held_against_the_interval(fault, last, writing, lost, most):
    event = Event("run", "ddp", fault, 1, 1, last, 9.0, writing=writing, lost=lost)
    assert judge_loss(event) == ([] if most is None else [f"{lost} steps were lost, not at most {most}"])


@pytest.mark.parametrize(
    "shards, flips, found",
    [
        ([], 0, ""),
        (["a", "a"], 1, ""),
        (["a", "b"], 2, ""),
        ([], 1, "a bit has flipped, and no row was replaced"),
        (["a"], 0, "rows of 1 shard(s) were replaced, though bits flipped in 0"),
        (["a", "b"], 1, "rows of 2 shard(s) were replaced, though bits flipped in 1"),
    ],
)
def test_rows_are_replaced_where_a_bit_has_flipped_and_nowhere_else(shards, flips, found):
    assert judge_replaced([{"shard": shard} for shard in shards], flips) == ([found] if found else [])


def test_a_save_that_was_not_whole_is_seen(tmp_path):
    folder = tmp_path / "checkpoints"
    whole, half = folder / "step-00000005", folder / "step-00000010"
    whole.mkdir(parents=True)
    (whole / "COMPLETE").touch()
    assert unfinished_save(tmp_path) is None
    half.mkdir()
    assert unfinished_save(tmp_path) == 10
    half.rmdir()
    (folder / "step-00000005.staging").mkdir()  # left over: the step is saved
    assert unfinished_save(tmp_path) is None
    (folder / "step-00000010.staging").mkdir()
    assert unfinished_save(tmp_path) == 10
