"""A log of JSON lines that another process writes to meanwhile, read as it grows."""

import os
from pathlib import Path

from launch.status.tail import parse_object


class JsonLog:
    """The objects of a log; `read` takes what has come since. A file that was replaced (steps were set aside) is read
    anew, one that is gone has none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: tuple[int, int] | None = None
        self._offset = 0
        self._lines: list[dict] = []

    def read(self) -> list[dict]:
        """All objects so far, oldest first; the caller changes none. Lines that are no object are left out, the last
        one without an end waits for it. Raises OSError if the file cannot be read."""
        try:
            with self._path.open("rb") as file:
                found = os.fstat(file.fileno())
                if (found.st_dev, found.st_ino) != self._file or found.st_size < self._offset:
                    self._file, self._offset, self._lines = (found.st_dev, found.st_ino), 0, []
                file.seek(self._offset)
                text = file.read()
        except (FileNotFoundError, NotADirectoryError):
            self._file, self._offset, self._lines = None, 0, []
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        self._lines += [value for line in whole.splitlines() if (value := parse_object(line)) is not None]
        return self._lines
