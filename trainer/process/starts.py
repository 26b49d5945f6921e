"""A run's starts.jsonl: when each start of it began to train, on what hardware and by which versions, and how it ended.

Imports nothing heavy.
"""

import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import node, python_version
from typing import Any

from trainer.process.disk_room import told_if_not_written
from trainer.process.json_lines import append_line
from trainer.process.launcher import is_training

STARTS = "starts.jsonl"

_ROOT = Path(__file__).resolve().parents[2]

_PACKAGES = ("fluxfill", "torch", "accelerate", "diffusers", "transformers", "peft")
_PACKAGES_OF_SOME_RUNS = ("deepspeed", "bitsandbytes", "torchao")

_is_noted = False  # the start of this very process


def own_commit() -> str:
    """Of the checkout that this is; empty where there is none."""
    if not (_ROOT / ".git").exists():
        return ""
    line = ["git", "-C", str(_ROOT), "rev-parse", "HEAD"]
    try:
        return subprocess.run(line, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def note_start(run: Path, *, step: int, **place: Any) -> None:
    """Add {time, step, host, versions, ...} of a start that goes on from a step.  place: engine, processes, nodes, gpus
    (the kinds, by name), commit. For rank 0."""
    global _is_noted
    versions = {"python": python_version()} | {
        name: found for name in (*_PACKAGES, *_PACKAGES_OF_SOME_RUNS) if (found := _version(name)) is not None
    }
    append_line(run / STARTS, {"time": _now(), "step": step, "host": node(), **place, "versions": versions})
    _is_noted = True


def note_end(run: Path | None, *, code: int, reason: str, step: int | None) -> None:
    """Add {time, code, reason, step}, the outcome, to the start that it is of. Nothing where this one has not come so
    far as to be noted: it would be the end of an earlier one, days later. The first rank to fail may be any."""
    if run is not None and (_is_noted or is_training()) and (run / STARTS).is_file():
        with told_if_not_written(f"the end in {STARTS}"):
            append_line(run / STARTS, {"time": _now(), "code": code, "reason": reason, "step": step})


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _now() -> float:
    """Seconds since 1970."""
    return round(time.time(), 3)
