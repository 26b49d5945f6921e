"""Two real steps of training, by the command that `fluxfill train` runs: on the finished cache, else on one that is
made of a few pictures, in a folder that goes again."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import NamedTuple

from rich.progress import Progress

from configs.errors import InputError
from configs.supervision import STOPPED
from configs.this_machine import count_cores
from launch.check.few_pictures import write_few_pictures
from launch.check.pictures import Pictures
from launch.check.result import Check, error_of, ok
from launch.check.situation import Situation
from launch.command import render_command, render_environment, render_preprocess, render_worker_environments
from launch.supervise import Outcome, run_supervised, run_workers

_STEPS = 2
_SHOWN_LINES = 25  # of what a run printed that failed
_NOTHING_KEPT = (
    f"train.steps={_STEPS}",
    "train.warmup_steps=0",
    "validation.every_steps=null",
    "checkpoint.every_steps=null",
    "checkpoint.every_minutes=null",
    "checkpoint.at_end=false",
    "logging.trackers=[]",
)


def check_steps(
    situation: Situation, pictures: Pictures | None, progress: Progress, *, cache_can_be_read: bool
) -> list[Check]:
    """Whether two steps run, how long they take, and what the GPU then holds.

    pictures: of which a few are encoded where the cache cannot be read. Raises KeyboardInterrupt if it is stopped.
    """
    bar = progress.add_task("two steps of training", total=None)
    try:
        with TemporaryDirectory(prefix="fluxfill-check-") as name:
            folder = Path(name)
            overrides = [*situation.overrides, f"run.dir={json.dumps(name)}", "run.name=check", *_NOTHING_KEPT]
            if situation.config.data.mode == "cached" and not cache_can_be_read:
                assert pictures is not None
                progress.update(bar, description="encoding a few pictures")
                overrides += write_few_pictures(situation.config.data, pictures.samples, folder / "pictures")
                overrides.append(f"data.cache={json.dumps(str(folder / 'cache'))}")
                if failed := _encode(situation, overrides, folder):
                    return [failed]
                progress.update(bar, description="two steps of training")
            elif not isinstance(situation.config.data.cache, Path):
                overrides.append(f"data.local_cache={json.dumps(str(folder / 'copies'))}")
            return list(_train(situation, overrides, folder))
    except InputError as error:
        return [error_of("steps", error)]
    except OSError as error:
        what = f"{error.filename}: cannot be read or written ({error.strerror})"
        return [Check("steps", "error", what, f"Make room in {gettempdir()}, or set TMPDIR to another folder.")]
    finally:
        progress.remove_task(bar)


def _encode(situation: Situation, overrides: Sequence[str], folder: Path) -> Check | None:
    """Preprocess the few pictures; the check of how that failed, None if it did not."""
    environments = render_worker_environments(1, count_cores(), inherited=os.environ)
    log = folder / "preprocess.log"
    with log.open("wb") as output:
        command = render_preprocess(situation.config_path, overrides)
        outcome = run_workers(command, environments, output=output)
    return None if outcome.code == 0 else _failure("encoding a few pictures", outcome, log)


def _train(situation: Situation, overrides: Sequence[str], folder: Path) -> Iterator[Check]:
    outcome_file, log = folder / "outcome.json", folder / "train.log"
    command = render_command(situation.config_path, overrides, situation.engine, situation.processes, port=0)
    environment = render_environment(outcome_file, situation.processes, count_cores(), inherited=os.environ)
    with log.open("wb") as output:
        outcome = run_supervised(command, environment, outcome_file, output=output)
    if outcome.code != 0:
        yield _failure("training", outcome, log)
        return
    yield judge_steps(read_steps(folder / "check" / "metrics.jsonl"))


class Step(NamedTuple):
    """A line of metrics.jsonl.  loss: None if it was not finite.  peak_memory_gib: None without a GPU."""

    loss: float | None
    seconds: float
    peak_memory_gib: float | None


def read_steps(metrics: Path) -> list[Step]:
    lines = map(json.loads, metrics.read_text(encoding="utf-8").splitlines())
    return [Step(line["loss"], line["seconds"], line["peak_memory_gib"]) for line in lines]


def judge_steps(steps: Sequence[Step]) -> Check:
    """The check of steps that were made."""
    losses = ", ".join("not finite" if step.loss is None else f"{step.loss:.4f}" for step in steps)
    peaks = [step.peak_memory_gib for step in steps if step.peak_memory_gib is not None]
    peak = f", {max(peaks):.1f} GiB of a GPU at most" if peaks else ""
    what = f"{len(steps)} steps, the last in {steps[-1].seconds:.3g} s{peak}; loss {losses}"
    if any(step.loss is None or not math.isfinite(step.loss) for step in steps):
        cure = "Lower train.lr, or look at the pictures of the first batches with `fluxfill shards show`."
        return Check("steps", "error", what, cure)
    return ok("steps", what)


def _failure(what: str, outcome: Outcome, log: Path) -> Check:
    """The check of a process that failed, with the end of what it printed."""
    if outcome.code == STOPPED:
        raise KeyboardInterrupt(outcome.reason)
    reason, _, cure = outcome.reason.partition(". ")
    if "out of memory" in outcome.reason:
        cure = "Lower train.micro_batch_size or data.resolution, or quantize the base (model.precision)."
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_SHOWN_LINES:]
    return Check("steps", "error", f"{what} failed: {reason}", cure or "What it said last stands below.", tuple(lines))
