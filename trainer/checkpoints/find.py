"""Which checkpoint was meant: one by its folder, or a run's by its step or because it is the newest; each intact."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from configs.errors import InputError
from data.storage.checkpoint_folders import COMPLETE, checkpoint_folder, complete_checkpoints, step_of
from trainer.checkpoints.folders import find_damage, latest_checkpoint

log = logging.getLogger("fluxfill")

MOST_READS = 3  # of checkpoints that the run deletes while they are read

_T = TypeVar("_T")


class CheckpointDeleted(InputError):
    """A checkpoint went while it was read, deleted by its own run perhaps."""


def find_checkpoint(source: Path, step: int | None = None) -> Path:
    """The checkpoint at `source`; of the run there, that of a step, or the newest intact one.

    Raises InputError if there is none, naming the steps that there are, or if it is half-written or damaged.
    """
    if step is not None:
        refuse_step_of_no_run(source)
        folder = checkpoint_folder(source, step)
        if not folder.is_dir():
            raise InputError(f"{source}: has no checkpoint of step {step}. There are {list_steps(source)}.")
        return refuse_damaged(folder)
    if (source / "checkpoints").is_dir():
        if (found := latest_checkpoint(source)) is not None:
            return found
    elif (source / "state.json").is_file() or (source / COMPLETE).is_file():
        return refuse_damaged(source)
    if any((source / name).exists() for name in ("metrics.jsonl", "outcome.json", "checkpoints")):
        if not complete_checkpoints(source):
            raise no_checkpoint_yet(source)
        raise InputError(f"{source}: none of its checkpoints is intact.")
    what = "holds no intact checkpoint" if source.is_dir() else "there is no such folder"
    raise InputError(f"{source}: {what}. Give a run's folder, or one of its checkpoints/step-<number>.")


def no_checkpoint_yet(run: Path) -> InputError:
    return InputError(f"{run}: has no complete checkpoint yet.")


def refuse_step_of_no_run(source: Path) -> None:
    """Raises InputError if a step was asked for of what is no run, such as a checkpoint."""
    if not (source / "checkpoints").is_dir():
        raise InputError(f"{source}: is no run's folder. Give the run, or leave --step out.")


def intact_checkpoints(run: Path) -> list[Path]:
    """All of a run's complete checkpoints, oldest first, but for damaged ones, which are named in the log."""
    found = []
    for folder in complete_checkpoints(run):
        if damage := find_damage(folder):
            if _is_deleted(folder):
                log.warning("%s", _deleted(folder))
            else:
                log.warning("%s: left out, it is damaged (%s)", folder, damage)
        else:
            found.append(folder)
    return found


def list_steps(run: Path) -> str:
    return ", ".join(str(step_of(folder)) for folder in complete_checkpoints(run)) or "none that is complete"


def refuse_damaged(folder: Path) -> Path:
    """The folder. Raises InputError if it is half-written or damaged; reads every byte."""
    refuse_unfinished(folder)
    if damage := find_damage(folder):
        raise _deleted(folder) if _is_deleted(folder) else InputError(f"{folder}: {damage}. Take another step.")
    return folder


def refuse_unfinished(folder: Path) -> None:
    """Raises InputError if a checkpoint is not there, or not complete."""
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such checkpoint.")
    if not (folder / COMPLETE).is_file():
        raise InputError(
            f"{folder}: is half-written, or being written: it lacks its {COMPLETE} marker. Take another step."
        )


@contextmanager
def tell_if_deleted(folder: Path) -> Iterator[None]:
    """Raises CheckpointDeleted where what fails inside does so because the checkpoint that it reads is gone."""
    try:
        yield
    except (OSError, InputError) as error:
        if not _is_deleted(folder):
            raise
        raise _deleted(folder) from error


def read_chosen(choose: Callable[[], Path], read: Callable[[Path], _T], *, by_name: bool) -> _T:
    """What `read` gives of the checkpoint that `choose` finds. Of one that its run deletes meanwhile: of the next that
    is found, unless the user named it.

    Raises CheckpointDeleted where that has happened MOST_READS times, or by_name.
    """
    for number in range(1, MOST_READS + 1):
        try:
            folder = choose()
            with tell_if_deleted(folder):
                return read(folder)
        except CheckpointDeleted as error:
            if by_name or number == MOST_READS:
                raise
            log.warning("%s Now another is looked for.", error)
    raise AssertionError("unreachable")


def _is_deleted(folder: Path) -> bool:
    """Whether a checkpoint that was complete is being deleted, or gone: its marker goes first."""
    return not (folder / COMPLETE).is_file()


def _deleted(folder: Path) -> CheckpointDeleted:
    return CheckpointDeleted(
        f"{folder}: was deleted while it was read. A run keeps its newest ones alone (checkpoint.keep_last): take "
        "another step, or a copy of the folder."
    )
