"""Looks that were taken before, in OUT/looks.jsonl: a second run looks only at files that are new or changed."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any

import xxhash

from data.migrate.find import OldTriple
from data.migrate.look import Contents, Look
from data.sources.file_stamps import outwait_the_clock
from data.sources.mask_checks import Fault
from data.storage.atomic_write import write_text_atomically

LOOKS = "looks.jsonl"
_VERSION = 1  # of what a look tells


class LookCache:
    """Looks by the paths, sizes and times of their files. A line is written as each is taken, by any thread."""

    def __init__(self, folder: Path, max_megapixels: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._max_megapixels = folder / LOOKS, max_megapixels
        self._found = _read(self._path)
        self._lines: dict[str, str] = {}  # of this run, by key
        self._lock = Lock()
        self._file = self._path.open("a", encoding="utf-8")
        self._file.write("\n")  # behind half a line of a run that was killed

    def look(self, triple: OldTriple, take: Callable[[OldTriple], Look]) -> Look:
        """The look at a triple: the one from before, or the one that `take` takes. One that shows a problem is taken
        again each time: what is to blame may have been mended by other means than the file's."""
        key = self._key(triple)
        record = self._found.get(key)
        look = _look_of(record) if record is not None else take(triple)
        if not look.problems:
            line = json.dumps([key, asdict(look)], separators=(",", ":"))
            with self._lock:
                self._lines[key] = line
                if record is None:
                    self._file.write(f"{line}\n")
        return look

    def close(self, *, complete: bool) -> None:
        """complete: all triples were looked at, so lines of others are of no more use."""
        self._file.close()
        if complete:
            write_text_atomically(self._path, "".join(f"{line}\n" for line in sorted(self._lines.values())))

    def _key(self, triple: OldTriple) -> str:
        # Not ctime: a hard link that is made to a file changes it.
        places = [file.place if file else "" for file in (triple.target, triple.mask, triple.masked)]
        stats = [os.stat(place) if os.path.exists(place) else None for place in places]
        outwait_the_clock(places)
        stamps = [(stat.st_size, stat.st_mtime_ns) if stat else None for stat in stats]
        text = repr((_VERSION, self._max_megapixels, places, stamps))
        return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogateescape"))


def _read(path: Path) -> dict[str, dict[str, Any]]:
    found = {}
    with suppress(FileNotFoundError), path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            with suppress(ValueError):
                key, record = json.loads(line)
                found[key] = record
    return found


def _look_of(record: dict[str, Any]) -> Look:
    """asdict() of a look, as JSON holds it."""
    faults = {colour: fault and Fault(*fault) for colour, fault in record["faults"].items()}
    shown = {colour: Contents(*contents) for colour, contents in record["shown"].items()}
    whole = {name: record[name] and Fault(*record[name]) for name in ("fault_of_mask", "turn")}
    return Look(**record | whole | {"faults": faults, "shown": shown, "problems": ()})
