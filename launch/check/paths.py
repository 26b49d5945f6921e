"""Folders that a run writes, and the adapter that it starts from."""

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile

from data.storage.checkpoint_folders import complete_checkpoints
from launch.check.result import Check, ok
from launch.check.situation import Situation


def check_paths(situation: Situation) -> Iterator[Check]:
    """Whether every folder that the run writes can be written, by writing; nothing of it stays."""
    config = situation.config
    data = config.data
    places = {"run.dir": config.run.folder}
    if isinstance(data.cache, Path):
        places["data.cache"] = data.cache
    if data.local_cache is not None:
        places["data.local_cache"] = data.local_cache
    for key, folder in places.items():
        yield check_folder(key, folder)
    if complete := complete_checkpoints(config.run.folder):
        goes_on = f"it goes on from {complete[-1].name}, or give another run.name"
        yield ok("paths", f"{config.run.folder} is a run already: {goes_on}")
    start = getattr(config.method, "init_from", None)
    if start is not None and not start.exists():
        cure = "Correct method.init_from, or set it to null to start at the base's output."
        yield Check("paths", "error", f"method.init_from {start}: there is no such file", cure)


def check_folder(key: str, folder: Path) -> Check:
    """Whether a folder, which need not be there yet, can be written."""
    there = existing(folder)
    try:
        if not there.is_dir():
            raise NotADirectoryError(20, "it is a file")
        with TemporaryFile(dir=there) as file:
            file.write(b"0")
            file.flush()
    except OSError as error:
        cure = f"Change its permissions, or point {key} elsewhere."
        return Check("paths", "error", f"{key} {folder}: nothing can be written in {there} ({error.strerror})", cure)
    return ok("paths", f"{key} {folder} can be {'written' if there == folder.absolute() else 'made'}")


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    places = (folder.absolute(), *folder.absolute().parents)
    return next(place for place in places if os.path.exists(place))  # Path.exists raises where it may not look
