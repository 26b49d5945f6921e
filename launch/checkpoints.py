"""Which checkpoint was meant, where --resume got a folder that is none; by names and markers alone."""

from pathlib import Path

from data.storage.checkpoint_folders import COMPLETE, complete_checkpoints


def suggest_checkpoint(folder: Path) -> str | None:
    """What to give where a complete checkpoint was asked for; None: the folder is one.

    Of a run's folder, of its checkpoints, and of a checkpoint that is not complete, the newest that is.
    """
    if (folder / COMPLETE).is_file():
        return None
    runs = (folder, folder.parent, folder.parent.parent)
    newest = next((complete[-1] for run in runs if (complete := complete_checkpoints(run))), None)
    return str(newest) if newest is not None else "runs/NAME/checkpoints/step-<number>"
