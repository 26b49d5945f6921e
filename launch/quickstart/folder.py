"""A folder of written files that a user edits: written again only where that loses nothing.

.quickstart.json holds the hashes of every text that was ever written, by file. A file with one of them is as it was
written. It is saved before the files are, so that a run which is ended between the two takes no file for an edited one.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from configs.errors import InputError
from data.storage.atomic_write import write_bytes_atomically, write_text_atomically

WRITTEN = ".quickstart.json"


@dataclass(frozen=True)
class Comparison:
    """What is to be written, beside what is there.

    texts: name -> new text.  hashes: name -> those of every text written before.  edited: name -> what the user made of
    it, where that is not the new text.  kept: the edited ones whose new text is what the user began from.
    """

    texts: Mapping[str, str]
    hashes: Mapping[str, tuple[str, ...]]
    edited: Mapping[str, str]
    kept: Collection[str]

    @property
    def in_conflict(self) -> list[str]:
        """Edited files that would have to be overwritten."""
        return [name for name in self.edited if name not in self.kept]


def compare_folder(folder: Path, texts: Mapping[str, str]) -> Comparison:
    """Which of the files in the folder were edited. Raises InputError where a file cannot be read."""
    hashes = _written_before(folder)
    edited = {}
    for name, text in texts.items():
        try:
            found = (folder / name).read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise InputError(f"{folder / name}: cannot be read ({error.strerror}). Give another --out.") from error
        if found != text.encode() and _sha256(found) not in hashes.get(name, ()):
            edited[name] = found.decode("utf-8", errors="replace")
    kept = {name for name in edited if hashes.get(name, ())[-1:] == (_sha256(texts[name].encode()),)}
    return Comparison(texts, hashes, edited, kept)


def write_folder(folder: Path, comparison: Comparison, *, executable: Collection[str], force: bool) -> list[str]:
    """Write what differs, but no file that was edited unless forced; the names of those written.

    executable: names of files to be run. Raises InputError where the folder cannot be made or written.
    """
    names = [name for name in comparison.texts if force or name not in comparison.edited]
    hashes = dict(comparison.hashes)
    for name in names:
        new = _sha256(comparison.texts[name].encode())
        hashes[name] = (*(old for old in hashes.get(name, ()) if old != new), new)
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(folder / WRITTEN, json.dumps({"version": 1, "written": hashes}, indent=1) + "\n")
        for name in names:
            path, data = folder / name, comparison.texts[name].encode()
            if not path.is_file() or path.read_bytes() != data:
                write_bytes_atomically(path, data)
                written.append(name)
            if name in executable:
                mode = path.stat().st_mode
                path.chmod(mode | (mode & 0o444) >> 2)  # whoever may read it may run it
    except InputError:  # of a full disk
        raise
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}). Give another --out.") from error
    return written


def _written_before(folder: Path) -> dict[str, tuple[str, ...]]:
    path = folder / WRITTEN
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))["written"]
        return {name: tuple(hashes) for name, hashes in stored.items()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: cannot be read as what quickstart wrote. Delete it; every file that differs is then taken for an "
            "edited one."
        ) from error


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
