"""All that a run's page shows, read from the run's folder alone, as JSON has it."""

import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from configs.redact import redact
from launch.report.curves import Curve, as_number, make_curve
from launch.report.json_log import JsonLog
from launch.report.marks import read_marks
from launch.report.sessions import STARTS, Session, count_cost, read_sessions
from launch.report.settings import Settings, read_settings
from launch.slurm.restarts import End, read_all_ends
from launch.status.run import RunStatus, read_status

PICTURE = re.compile(r"step-(\d{8})-(holdout|train)\.png")

_FIGURES = ("loss", "lr", "grad_norm", "samples_per_second", "peak_memory_gib", "data_wait_seconds")
_VALIDATED = ("hole_psnr", "hole_psnr_ceiling", "keep_psnr", "seam_error", "color_shift")
_SPLITS = ("holdout", "train")

T = TypeVar("T")


class RunReader:
    """A run's folder, read again and again; only what was added since is parsed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._logs: dict[str, JsonLog] = {}

    def read(self) -> dict[str, Any]:
        """The run as the page draws it, but for its pictures: name, state, curves, marks, settings, sessions, cost.

        Never raises for what is missing, half-written, of another version or not to be read: it is left out.
        """
        status = read_status(self.folder)
        metrics, validation, events, starts = (
            self._lines(name) for name in ("metrics.jsonl", "validation.jsonl", "events.jsonl", STARTS)
        )
        set_aside = sorted((path.name for path in self.folder.glob("metrics.*.jsonl")), key=_numbers)
        undone = [self._lines(name) for name in set_aside]
        sessions = read_sessions(starts, [*metrics, *events, *(line for lines in undone for line in lines)])
        no_ends: list[End] = []
        ends = _attempt(lambda: read_all_ends(self.folder), no_ends)
        no_settings: Settings = {"recipe": "", "settings": []}
        settings = _attempt(lambda: read_settings(self.folder / "config.yaml"), no_settings)
        marks = read_marks(events, sessions, ends)
        return {
            "name": status.name,
            "folder": str(self.folder),
            "status": _shown_status(status),
            "curves": {name: curve for name in _FIGURES if (curve := make_curve(metrics, name)) is not None},
            "clock": make_curve(metrics, "time", digits=13),
            "undone": [
                curve | {"clock": make_curve(lines, "time", digits=13)}
                for lines in undone
                if (curve := make_curve(lines, "loss")) is not None
            ],
            "validation": {split: _validation_curves(validation, split) for split in _SPLITS},
            "marks": [mark | {"text": redact(mark["text"], home="")} for mark in marks],
            "settings": settings,
            "sessions": [_shown_session(session) for session in sessions],
            "cost": count_cost(sessions, metrics, [line for lines in undone for line in lines]),
        }

    def pictures(self) -> dict[int, dict[str, str]]:
        """Step -> split -> name of the file of its grid in samples/."""
        found: dict[int, dict[str, str]] = {}
        nothing: list[str] = []
        for name in _attempt(lambda: sorted(path.name for path in (self.folder / "samples").iterdir()), nothing):
            if match := PICTURE.fullmatch(name):
                found.setdefault(int(match[1]), {})[match[2]] = name
        return found

    def _lines(self, name: str) -> list[dict]:
        log = self._logs.setdefault(name, JsonLog(self.folder / name))
        nothing: list[dict] = []
        return _attempt(log.read, nothing)


def _numbers(name: str) -> tuple[list[int], str]:
    """To sort by: the tenth log that was set aside comes after the second."""
    return [int(number) for number in re.findall(r"[0-9]+", name)], name


def _attempt(read: Callable[[], T], nothing: T) -> T:
    with suppress(OSError, LookupError, TypeError, ValueError, AttributeError):
        return read()
    return nothing


def _validation_curves(lines: list[dict], split: str) -> dict[str, Curve]:
    """Of the figures of a split, and of the mean of its losses on fixed noise."""
    flat = []
    for line in lines:
        figures = line.get(split)
        if not isinstance(figures, dict) or not figures:
            continue
        losses = [as_number(value) for name, value in figures.items() if str(name).startswith("loss_sigma")]
        known = [loss for loss in losses if loss is not None]
        mean = sum(known) / len(known) if known and len(known) == len(losses) else None
        flat.append({"step": line.get("step"), "loss": mean} | {name: figures.get(name) for name in _VALIDATED})
    return {name: curve for name in ("loss", *_VALIDATED) if (curve := make_curve(flat, name)) is not None}


def _shown_status(status: RunStatus) -> dict[str, Any]:
    best = status.validation
    return {
        "state": status.state,
        "reason": redact(status.reason, home=""),
        "step": status.step,
        "steps": status.steps,
        "seconds_per_step": status.seconds_per_step,
        "seconds_left": status.seconds_left if status.state in ("running", "starting") else None,
        "checkpoint": status.checkpoint.step if status.checkpoint else None,
        "best": None if best is None or best.best is None else {"hole_psnr": best.best, "step": best.best_step},
    }


def _shown_session(session: Session) -> dict[str, Any]:
    return {
        "begin": session.begin,
        "hours": session.hours,
        "step": session.step,
        "host": session.host,
        "engine": session.engine,
        "processes": session.processes,
        "nodes": session.nodes,
        "gpus": list(session.gpus),
        "commit": session.commit[:12],
        "versions": session.versions,
        "code": session.code,
        "reason": redact(session.reason, home=""),
    }
