"""Logs of JSON lines that other processes write to meanwhile: their last lines, or all of them."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

_MOST_BYTES = 1 << 20  # read from the end of a file, whatever its size


def read_last_lines(path: Path, count: int) -> list[dict]:
    """The last `count` objects of a log, oldest first; empty where there is no such file.

    Lines that are no JSON object are left out: a process is writing the last one, or was killed while it did. Raises
    OSError if the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - _MOST_BYTES, 0))
            lines = file.read(_MOST_BYTES).splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return []
    if size > _MOST_BYTES:
        del lines[0]  # its beginning was not read
    found: list[dict] = []
    for line in reversed(lines):
        if len(found) == count:
            break
        if (value := parse_object(line)) is not None:
            found.append(value)
    return found[::-1]


def read_lines(path: Path) -> Iterator[dict]:
    """All objects of a log, oldest first, one at a time: of those that stay small. Otherwise likewise."""
    try:
        with path.open("rb") as file:
            yield from (value for line in file if (value := parse_object(line)) is not None)
    except (FileNotFoundError, NotADirectoryError):
        return


def parse_object(text: bytes | str) -> dict | None:
    """A JSON object; None of anything else."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
