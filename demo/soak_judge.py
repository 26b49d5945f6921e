"""What a soak holds its starts and runs against: how they may end, steps that may be lost, another run's end."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file

from data.storage.checkpoint_folders import checkpoint_folder, newest_step
from demo.soak_faults import FAULTS

STEPS, INTERVAL = 60, 5
MOVED_WITHIN = 1e-5  # of a run that other engines and numbers of processes went on with


@dataclass
class Event:
    """A start, and what became of it.

    seconds: until it ended.  gone_seconds: from then until the last of its processes had gone.  saved: the newest
    checkpoint then.  writing: the step whose save was not whole yet.  lost: steps that the one after it had to make
    again; None where it did not come to train.
    """

    run: str
    launch: str
    fault: str
    code: int
    first_step: int | None
    last_step: int
    seconds: float
    gone_seconds: float = 0.0
    saved: int = 0
    writing: int | None = None
    lost: int | None = None
    wrong: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return self.fault.partition(",")[0]


def most_lost(event: Event) -> int | None:
    """Steps that may be lost at the end of a start; None: any number.

    A kill loses an interval between checkpoints; where a save was still being written in the background, the steps
    trained meanwhile too, of which there are no more than an interval: the next save that is due waits for it.
    """
    if event.kind not in FAULTS:
        return 0
    intervals = FAULTS[event.kind].intervals
    if not intervals:
        return intervals
    meanwhile = 0 if event.writing is None else min(max(event.last_step - event.writing, 0), INTERVAL)
    return intervals * INTERVAL + meanwhile


def judge_loss(event: Event) -> list[str]:
    """What is wrong with the steps that were lost at the end of a start."""
    most = most_lost(event)
    if most is None or event.lost is None or 0 <= event.lost <= most:
        return []
    return [f"{event.lost} steps were lost, not at most {most}"]


def judge_replaced(replaced: list[dict], num_flips: int) -> list[str]:
    """What is wrong with the rows that others stood in for. A bit that flips damages one shard's.

    replaced: of a run's state.
    """
    shards = {row["shard"] for row in replaced}
    if num_flips and not shards:
        return ["a bit has flipped, and no row was replaced"]
    if len(shards) > num_flips:
        return [f"rows of {len(shards)} shard(s) were replaced, though bits flipped in {num_flips}"]
    return []


def unfinished_save(run: Path) -> int | None:
    """The step of a save that has begun and is no complete checkpoint, if there is one behind the newest that is."""
    newest = newest_step(run)
    begun = {int(path.stem.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*.staging")}
    begun |= {step for step in range(newest + 1, STEPS + 1) if checkpoint_folder(run, step).exists()}
    return max((step for step in begun if step > newest), default=None)


def read_losses(run: Path) -> list[float]:
    """Of every step, from metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines]


def read_tensors(run: Path, *, with_state: bool) -> dict[str, np.ndarray]:
    """The exported adapters; with_state: and all that the last checkpoint holds."""
    files = sorted(run.glob("final*/*.safetensors"))
    if with_state:
        files += sorted(checkpoint_folder(run, STEPS).glob("rank-*.safetensors"))
    return {f"{path.relative_to(run)}: {name}": value for path in files for name, value in load_file(path).items()}


def read_run_state(run: Path) -> dict:
    """Of the last checkpoint."""
    return json.loads((checkpoint_folder(run, STEPS) / "state.json").read_text(encoding="utf-8"))["state"]


class Comparison(NamedTuple):
    """Of a run with another.  apart: their losses and tensors, at most.  wrong: in what it is another; "" if in
    nothing."""

    apart: float
    wrong: str


def compare(run: Path, expected: Path, *, exact: bool) -> Comparison:
    """The end of a run with that of another.

    exact: losses, exported adapters and all state, bit for bit; else losses and adapters to MOVED_WITHIN.
    """
    losses, others = read_losses(run), read_losses(expected)
    if len(losses) != len(others):
        return Comparison(np.inf, f"{len(losses)} losses, not {len(others)}")
    tensors, wanted = read_tensors(run, with_state=exact), read_tensors(expected, with_state=exact)
    if tensors.keys() != wanted.keys() or not tensors:
        return Comparison(np.inf, f"{len(tensors)} tensors, not {len(wanted)}")
    most = 0.0 if exact else MOVED_WITHIN
    pairs = [("losses are", np.array(losses, np.float64), np.array(others, np.float64))]
    pairs += [(f"{name} is", value, wanted[name]) for name, value in tensors.items()]
    furthest = 0.0
    for what, value, other in pairs:
        if value.shape != other.shape:
            return Comparison(np.inf, f"{what} of shape {value.shape}, not {other.shape}")
        apart = float(np.abs(value - other).max())
        if not apart <= most:
            return Comparison(apart, f"{what} {apart:.1e} apart")
        furthest = max(furthest, apart)
    return Comparison(furthest, "")
