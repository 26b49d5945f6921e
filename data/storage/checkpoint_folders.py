"""Checkpoint folders by name: <run>/checkpoints/step-<nnnnnnnn>/, complete once they hold their marker.

Whatever has another name beside them is no checkpoint: step-<number>.undone, which a run that went back behind it has
set aside, marker and all; step-<number>.staging, a save that has begun.
"""

import re
from pathlib import Path

from configs.errors import InputError

COMPLETE = "COMPLETE"
_NAME = re.compile(r"step-(\d{8,})")


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def checkpoint_folders(run: Path) -> list[Path]:
    """Folders of checkpoints, complete or not, oldest first. By step number, never by time: clocks differ between
    machines."""
    found = [path for path in (run / "checkpoints").glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def complete_checkpoints(run: Path) -> list[Path]:
    """Folders with the marker, oldest first."""
    return [folder for folder in checkpoint_folders(run) if (folder / COMPLETE).is_file()]


def newest_step(run: Path) -> int:
    """The step of the newest complete checkpoint; 0 if there is none."""
    return max(map(step_of, complete_checkpoints(run)), default=0)


def newest_save(run: Path) -> tuple[int, int]:
    """The step of the newest complete checkpoint, and what tells it from another of the same step; zeros if there is
    none."""
    for folder in reversed(complete_checkpoints(run)):
        return step_of(folder), (folder / COMPLETE).stat().st_mtime_ns
    return 0, 0


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name. Raises InputError if it is no such folder."""
    if (match := _NAME.fullmatch(folder.name)) is None:
        raise InputError(f"{folder}: not a checkpoint folder (step-<number>).")
    return int(match[1])
