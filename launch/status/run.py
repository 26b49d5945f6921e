"""The status of a run, from its folder alone: metrics, validation, checkpoints, outcome, and the ends of its jobs."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from configs.supervision import BAD_INPUT, FAILED, STOPPED
from data.storage.checkpoint_folders import COMPLETE, complete_checkpoints, step_of
from launch.slurm.restarts import End, JobEvent, read_all_ends, read_job_events
from launch.status.tail import parse_object, read_last_lines, read_lines

# starting: no step yet.  waiting: its job starts again, or has not begun.  silent: neither an end nor a sign of life.
State = Literal["starting", "running", "waiting", "silent", "finished", "stopped", "failed", "refused", "unknown"]

_RECENT_STEPS = 100  # over which loss and pace are taken
_RECENT_EVENTS = 200
_SILENT_SECONDS, _SILENT_STEPS = 900, 20  # without a sign of life, whichever is longer
_STATES: dict[int, State] = {0: "finished", FAILED: "failed", STOPPED: "stopped", BAD_INPUT: "refused"}


@dataclass(frozen=True)
class Checkpoint:
    """The newest complete one."""

    step: int
    bytes: int
    age_seconds: float


@dataclass(frozen=True)
class Validation:
    """The last validation.  hole_psnr: in dB, on held-out pictures if there are any.  best, best_step: so far."""

    step: int
    hole_psnr: float | None
    untrained: float | None
    best: float | None
    best_step: int


@dataclass(frozen=True)
class Restart:
    """A job's end that was not the run's.  step: of its newest checkpoint."""

    time: float
    step: int
    reason: str


@dataclass(frozen=True)
class Rollback:
    """The run's own way back, after too many skipped updates.  step, to_step: where it was, and to where it went."""

    step: int
    to_step: int
    lr_scale: float


@dataclass(frozen=True)
class SlowestRank:
    """The rank that waits longest for data.  wait_seconds, median_seconds: a step, its own and that of all ranks."""

    rank: int
    wait_seconds: float
    median_seconds: float


@dataclass(frozen=True)
class SlowestForward:
    """The rank that takes longest over its forward passes.  seconds, median_seconds: a step, its own and of all."""

    rank: int
    seconds: float
    median_seconds: float


@dataclass(frozen=True)
class RunStatus:
    """What a run's folder tells; None where it tells nothing.

    loss, seconds_per_step: mean and median of the last steps.  skipped: of those, the steps whose update was not
    finite.  rollbacks: of the last events, those to an earlier checkpoint.  silent_seconds: since anything was written.
    resumed: how often, as its newest checkpoint counts.  unreadable: files that this user may not read.  last_end: how
    its last start ended, by outcome.json: (state, why).
    """

    run: str
    name: str
    state: State
    reason: str
    step: int | None
    steps: int | None
    loss: float | None
    averaged: int
    seconds_per_step: float | None
    seconds_left: float | None
    skipped: int
    rollbacks: tuple[Rollback, ...]
    silent_seconds: float | None
    checkpoint: Checkpoint | None
    save_every_steps: int | None
    validation: Validation | None
    slowest_rank: SlowestRank | None
    slowest_forward: SlowestForward | None
    resumed: int
    restarts: tuple[Restart, ...]
    job: JobEvent | None
    unreadable: tuple[str, ...] = ()
    last_end: tuple[State, str] | None = None


# What the first seconds of a run leave in its folder, or its submission. A config alone may lie anywhere.
_MARKS = ("metrics.jsonl", "outcome.json", "checkpoints", "tensorboard", "slurm/jobs.jsonl")

T = TypeVar("T")


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, begun or submitted."""
    try:
        return any((folder / name).exists() for name in _MARKS)
    except PermissionError:
        return True


def find_runs(root: Path, depth: int = 3) -> list[Path]:
    """The runs below a folder, sorted; nothing is looked for inside of a run, or behind a link.

    depth: levels of folders to look through.
    """
    found: list[Path] = []
    try:
        inner = [path for path in root.iterdir() if path.is_dir()]
    except OSError:
        return found
    for path in inner:
        if is_run(path):
            found.append(path)
        elif depth > 1 and not path.is_symlink():
            found += find_runs(path, depth - 1)
    return sorted(found)


def read_status(run: Path, now: float | None = None) -> RunStatus:
    """The status of the run in a folder.  now: seconds since 1970. Never raises for what is missing, half-written, of
    another version, or not to be read: it is left out."""
    now = time.time() if now is None else now
    unreadable: list[str] = []

    def attempt(name: str, read: Callable[[], T], nothing: T) -> T:
        try:
            return read()
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                unreadable.append(str(error.filename or run / name))
        except (LookupError, TypeError, ValueError, AttributeError):
            pass  # of another version
        return nothing

    nothing_saved: tuple[Checkpoint | None, int] = (None, 0)
    no_ends: list[End] = []
    no_events: list[JobEvent] = []
    no_lines: list[dict] = []
    settings: dict = attempt("config.yaml", lambda: _read_settings(run / "config.yaml"), {})
    metrics = attempt("metrics.jsonl", lambda: read_last_lines(run / "metrics.jsonl", _RECENT_STEPS), no_lines)
    outcome = attempt("outcome.json", lambda: parse_object((run / "outcome.json").read_bytes()), None)
    ends = attempt("slurm", lambda: read_all_ends(run), no_ends)
    events = attempt("slurm/jobs.jsonl", lambda: read_job_events(run), no_events)
    checkpoint, resumed = attempt("checkpoints", lambda: _read_checkpoint(run, now), nothing_saved)
    validation = attempt("validation.jsonl", lambda: _read_validation(run / "validation.jsonl"), None)
    no_rollbacks: tuple[Rollback, ...] = ()
    rollbacks = attempt("events.jsonl", lambda: _read_rollbacks(run / "events.jsonl"), no_rollbacks)
    exported = attempt("events.jsonl", lambda: _exported_step(run / "events.jsonl"), None)
    guard_stop = attempt("events.jsonl", lambda: _guard_stop(run / "events.jsonl"), None)
    slowest = attempt("metrics.jsonl", lambda: _slowest_rank(metrics), None)
    forward = attempt("metrics.jsonl", lambda: _slowest_forward(metrics), None)
    alive = attempt("", lambda: _last_sign(run), None)

    losses = [line["loss"] for line in metrics if _is_number(line.get("loss"))]
    paces = [line["seconds"] for line in metrics if _is_number(line.get("seconds"))]
    pace = statistics.median(paces) if paces else None
    steps = _whole(_inner(settings, "train", "steps"))
    step = _whole(metrics[-1].get("step")) if metrics else checkpoint.step if checkpoint else None
    silent = max(now - alive, 0.0) if alive is not None else None
    restarts = tuple(Restart(end.time, end.progress, end.reason) for end in ends if end.decision == "restart")
    begun = max((event.time for event in events if event.what == "started"), default=0.0)
    is_due = bool(ends) and ends[-1].decision == "restart" and ends[-1].time > begun
    last_end = None if outcome is None else _end_of(outcome)
    state, reason = _state_of(last_end, step, pace, silent, is_due, has_job=bool(events), has_begun=begun > 0)
    if state == "refused" and guard_stop is not None and guard_stop in reason:
        state = "failed"  # it had trained; the code is that of bad input as no restart helps
    elif state == "refused" and exported is not None and exported == step:
        state, reason = "finished", f"finished before; the last start was refused: {reason}"
    left = None
    if pace is not None and steps is not None and step is not None and state not in ("finished", "refused", "failed"):
        left = max(steps - step, 0) * pace
    return RunStatus(
        run=str(run),
        name=str(_inner(settings, "run", "name") or run.name),
        state=state,
        reason=reason,
        step=step,
        steps=steps,
        loss=sum(losses) / len(losses) if losses else None,
        averaged=len(losses),
        seconds_per_step=pace,
        seconds_left=left,
        skipped=sum(not all(_is_number(line.get(name)) for name in ("loss", "grad_norm")) for line in metrics),
        rollbacks=rollbacks,
        silent_seconds=silent,
        checkpoint=checkpoint,
        save_every_steps=_whole(_inner(settings, "checkpoint", "every_steps")),
        validation=validation,
        slowest_rank=slowest,
        slowest_forward=forward,
        resumed=resumed,
        restarts=restarts,
        job=_job_of(events, ends, outcome, alive),
        unreadable=tuple(dict.fromkeys(unreadable)),
        last_end=last_end,
    )


def _job_of(events: list[JobEvent], ends: list[End], outcome: dict | None, alive: float | None) -> JobEvent | None:
    """The run's newest job; None if that has ended and a run that was started by hand has written since."""
    if not events:
        return None
    newest = events[-1]
    over = [end.time for end in ends if end.job == newest.job and end.time >= newest.time and end.decision != "restart"]
    return None if over and outcome is None and alive is not None and alive > max(over) else newest


def _end_of(outcome: dict) -> tuple[State, str]:
    code = outcome.get("code")
    return _STATES.get(code, "failed") if isinstance(code, int) else "unknown", str(outcome.get("reason", ""))


def _state_of(
    last_end: tuple[State, str] | None,
    step: int | None,
    pace: float | None,
    silent: float | None,
    is_due: bool,
    *,
    has_job: bool,
    has_begun: bool,
) -> tuple[State, str]:
    """(state, why).  is_due: its job ended and asked for a restart, which has not come."""
    if last_end is not None:
        state, reason = last_end
        if is_due:
            return "waiting", f"starts again; {reason}"
        return state, "" if state == "finished" else reason
    if is_due:
        return "waiting", "starts again"
    if has_job and not has_begun:
        return "waiting", "submitted, not begun"
    if silent is not None and silent > max(_SILENT_SECONDS, _SILENT_STEPS * (pace or 0)):
        return "silent", ""
    if step is not None:
        return "running", ""
    return ("starting", "") if silent is not None else ("unknown", "")


def _read_settings(path: Path) -> dict:
    """As plain YAML: the config of an older version is not valid today."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError:
        return {}
    return value if isinstance(value, dict) else {}


def _read_checkpoint(run: Path, now: float) -> tuple[Checkpoint | None, int]:
    """(the newest complete one, how often the run had been resumed by then)."""
    complete = complete_checkpoints(run)
    if not complete:
        return None, 0
    folder = complete[-1]
    age = now - (folder / COMPLETE).stat().st_mtime
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    state = parse_object((folder / "state.json").read_bytes()) if (folder / "state.json").is_file() else None
    resumed = _whole(_inner(state or {}, "state", "restarts")) or 0
    return Checkpoint(step_of(folder), size, max(age, 0.0)), resumed


def _read_validation(path: Path) -> Validation | None:
    scores: list[tuple[int, float | None, float | None]] = []
    for line in read_lines(path):  # all of it: the best may be of long ago
        figures = line.get("holdout") or line.get("train") or {}
        score, untrained = figures.get("hole_psnr"), figures.get("hole_psnr_untrained")
        scores.append((line["step"], score, untrained))
    if not scores:
        return None
    step, score, untrained = scores[-1]
    best, best_step = max(((score, step) for step, score, _ in scores if score is not None), default=(None, step))
    return Validation(step, score, untrained, best, best_step)


def _read_rollbacks(path: Path) -> tuple[Rollback, ...]:
    events = read_last_lines(path, _RECENT_EVENTS)
    return tuple(
        Rollback(event["step"], event["to_step"], event["lr_scale"])
        for event in events
        if event.get("event") == "rollback"
    )


def _exported_step(path: Path) -> int | None:
    """The last step whose weights the run has exported; None: it has come to none."""
    events = read_last_lines(path, _RECENT_EVENTS)
    return max((event["step"] for event in events if event.get("event") == "exported"), default=None)


def _guard_stop(path: Path) -> str | None:
    """Why the guard stopped the run last, in words that an outcome of that start holds; None: it has not."""
    events = read_last_lines(path, _RECENT_EVENTS)
    return next((event["why"] for event in reversed(events) if event.get("event") == "stop"), None)


def _slowest_rank(metrics: list[dict]) -> SlowestRank | None:
    """As the trainer compares its ranks every so many steps; None of one process, or of a version that did not."""
    for line in reversed(metrics):
        if told := line.get("slowest_rank"):
            return SlowestRank(told["rank"], told["data_wait_seconds"], told["median_seconds"])
    return None


def _slowest_forward(metrics: list[dict]) -> SlowestForward | None:
    """Likewise."""
    for line in reversed(metrics):
        if told := line.get("slowest_forward"):
            return SlowestForward(told["rank"], told["seconds"], told["median_seconds"])
    return None


def _last_sign(run: Path) -> float | None:
    """When anything of the run was written last."""
    names = ("config.yaml", "metrics.jsonl", "validation.jsonl", "samples", "checkpoints", "outcome.json")
    newest = [path.stat().st_mtime for name in names if (path := run / name).exists()]
    newest += [path.stat().st_mtime for path in (run / "checkpoints").glob("step-*")]
    return max(newest, default=None)


def _inner(settings: dict, section: str, key: str) -> Any:
    inner = settings.get(section)
    return inner.get(key) if isinstance(inner, dict) else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
