"""The walk of a folder: all files below it, behind links too; one that cannot be read is an error."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from configs.errors import InputError

# What systems and file servers keep beside the pictures; thumbnails, some of them.
OF_SYSTEMS = frozenset({"@eaDir", "@Recycle", "#recycle", "#snapshot", "$RECYCLE.BIN", "__MACOSX", "lost+found"})


def walk_folder(folder: Path, where: str) -> Iterator[tuple[str, list[str]]]:
    """(path of a folder, its files sorted) of a folder and all below it, but for what is hidden by a dot in front, and
    folders that a system keeps there (OF_SYSTEMS).

    Raises InputError, which begins with `where`, if one cannot be read, or a link leads back to a folder above it.
    """

    def refuse(error: OSError) -> NoReturn:  # os.walk would pass over the folder in silence
        raise InputError(
            f"{where}: {error.filename} cannot be read ({error.strerror}). Change its permissions."
        ) from error

    def identity(path: str) -> tuple[int, int]:
        try:
            status = os.stat(path)
        except OSError as error:
            refuse(error)
        return status.st_dev, status.st_ino

    above = {str(folder): {identity(str(folder))}}  # of a folder that is still to be walked: it and those above it
    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in OF_SYSTEMS)
        on_the_way = above.pop(parent)
        for name in folders:
            path = os.path.join(parent, name)
            if (folders_own := identity(path)) in on_the_way:
                raise InputError(f"{where}: {path} leads back to a folder above it, by a link. Remove the link.")
            above[path] = on_the_way | {folders_own}
        yield parent, sorted(name for name in files if not name.startswith("."))
