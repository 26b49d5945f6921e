"""Logs of JSON lines, and a run's events.jsonl: what befell it, when, and why.

Imports nothing heavy.
"""

import json
import logging
import math
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from data.storage.disk_full import DiskFull
from trainer.process.disk_room import append_text, told_if_not_written, with_room

log = logging.getLogger("fluxfill")

EVENTS = "events.jsonl"

_waiting: dict[Path, list[str]] = defaultdict(list)  # for room on their disk


def append_line(path: Path, line: dict) -> None:
    """Add a line to a log of a run; null stands for figures that are nan or inf. While the disk is full lines wait in
    memory, for the next one that fits, or the run's end."""
    _waiting[path].append(json.dumps(without_nan(line), allow_nan=False) + "\n")
    try:
        _write(path)
    except DiskFull as error:
        if len(_waiting[path]) == 1:
            log.error("%s waits for room: %s", path.name, error)


def write_waiting_lines() -> None:
    """Write what still waits for room, at the end of a run: what a save had taken that did not fit is free again. What
    does not fit even now is told, and lost."""
    for path, waiting in _waiting.items():
        if waiting:
            with told_if_not_written(f"the last {len(waiting)} line(s) of {path.name}"):
                _write(path)


def _write(path: Path) -> None:
    """Raises DiskFull if there is no room for what waits."""
    waiting = _waiting[path]
    with_room(path.parent, lambda: append_text(path, "".join(waiting)))
    if len(waiting) > 1:
        log.info("%s: %d lines that waited for room are written", path.name, len(waiting))
    waiting.clear()


def write_event(run: Path, event: str, **fields: Any) -> None:
    """Add {time, event, ...} to a run's events.  time: seconds since 1970. For rank 0."""
    append_line(run / EVENTS, {"time": round(time.time(), 3), "event": event, **fields})


def without_nan(value: Any) -> Any:
    """A value as JSON has it: null for nan and inf."""
    if isinstance(value, dict):
        return {name: without_nan(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
