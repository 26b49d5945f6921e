"""Three folders of pictures -> triples: target, mask, optional source, caption."""

import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import xxhash

from configs.errors import InputError
from configs.schema import CaptionsConfig, DatasetConfig
from data.pictures import PICTURE_SUFFIXES

_HASH_THREADS = 4  # hashing waits for the disk


@dataclass(frozen=True)
class Triple:
    """One training item as files.

    dataset: its dataset's name.  name: the target's path below its folder, without suffix ("a/b/cat").
    target, mask: files of one size.  source: what the model sees instead of the target, or None.
    caption: the text, trigger word included.  target_content: hash of the target's bytes, 32 hex digits.
    content: hash of the bytes of all its pictures, in which any change shows.
    """

    dataset: str
    name: str
    target: Path
    mask: Path
    source: Path | None
    caption: str
    target_content: str
    content: str

    @property
    def key(self) -> str:
        """Name inside a shard: letters, digits, - and _ only, at most 70 long, with a hash of the relative path (stems
        collide, and webdataset cuts names at the first dot)."""
        stem = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in self.name)[-48:]
        return f"{stem}-{xxhash.xxh3_64_hexdigest(f'{self.dataset}/{self.name}'.encode())}"


def _pictures_by_name(folder: Path, role: str, dataset: str) -> dict[str, Path]:
    """Relative path without suffix -> file, for every picture below a folder.

    Raises InputError if there is none, a folder is missing or cannot be read, a name is not UTF-8, or two pictures
    differ in their suffix alone.
    """
    where = f"dataset {dataset}: {role} folder {folder}"
    if not folder.is_dir():
        raise InputError(f"{where} does not exist. Check data.datasets.*.{role}.")

    def refuse(error: OSError) -> None:  # os.walk would pass over the folder in silence
        raise InputError(
            f"{where}: {error.filename} cannot be read ({error.strerror}). Change its permissions."
        ) from error

    found: dict[str, Path] = {}
    problems = []
    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in sorted(files):
            path = Path(parent, file)
            if path.suffix.lower() not in PICTURE_SUFFIXES or file.startswith("."):
                continue
            name = path.relative_to(folder).with_suffix("").as_posix()
            if name in found:
                problems.append(f"{where}: {found[name].name} and {file} have the same name. Keep one of them.")
            if not _is_utf8(name):
                problems.append(f"{where}: the name of {name!a} is not UTF-8. Rename it.")
            found[name] = path
    if problems:
        raise InputError(listed(problems))
    if not found:
        kinds = ", ".join(sorted(PICTURE_SUFFIXES))
        raise InputError(f"{where} holds no picture ({kinds}). Check data.datasets.*.{role}.")
    return found


def _is_utf8(name: str) -> bool:
    """False for a file name of other bytes, which Python holds as lone surrogates and no JSON can."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_caption(triple_files: Sequence[Path | None], captions: CaptionsConfig) -> str:
    """The text of the .txt beside the target, else beside the source, else the default; the trigger word in front."""
    text = captions.default
    for picture in triple_files:
        if picture is not None and (file := picture.with_suffix(".txt")).is_file():
            try:
                text = " ".join(file.read_text(encoding="utf-8-sig").split())
            except UnicodeDecodeError as error:
                raise InputError(f"{file}: not UTF-8 text ({error}). Save the caption as UTF-8.") from error
            except OSError as error:
                raise InputError(f"{file}: cannot be read ({error.strerror}). Change its permissions.") from error
            break
    if captions.trigger and not _holds_word(text, captions.trigger):
        text = f"{captions.trigger}, {text}" if text else captions.trigger
    return text


def _holds_word(text: str, word: str) -> bool:
    """Whether a text holds a word, not as part of another ("masks" does not hold "sks"); Chinese needs no gaps."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.ASCII) is not None


def content_hash(path: Path) -> str:
    """Hash of a file's bytes, 32 hex digits: the identity by which pictures are held out and changes noticed.

    Raises InputError if the file cannot be read.
    """
    digest = xxhash.xxh3_128()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}). Restore the file or its permissions.") from error
    return digest.hexdigest()


def list_triples(dataset: DatasetConfig, captions: CaptionsConfig) -> list[Triple]:
    """All triples of one dataset, sorted by name.

    Files belong together when their path below their folder agrees up to the suffix. Raises one InputError that names
    every target without mask (or source), and every mask or source without target. Reads every byte of the pictures.
    """
    targets = _pictures_by_name(dataset.target, "target", dataset.name)
    masks = _pictures_by_name(dataset.mask, "mask", dataset.name)
    sources = _pictures_by_name(dataset.source, "source", dataset.name) if dataset.source else {}
    problems = [
        f"{targets[name]}: no {role} of the same name in {folder}. Add it, or remove the target."
        for role, found, folder in (("mask", masks, dataset.mask), ("source", sources, dataset.source))
        if folder is not None
        for name in sorted(targets.keys() - found.keys())
    ] + [
        f"{found[name]}: no target of the same name in {dataset.target}. Add it, or remove this {role}."
        for role, found in (("mask", masks), ("source", sources))
        for name in sorted(found.keys() - targets.keys())
    ]
    if problems:
        raise InputError(listed(problems))
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        return list(
            pool.map(
                lambda name: _read_triple(dataset.name, name, targets[name], masks[name], sources.get(name), captions),
                sorted(targets),
            )
        )


def _read_triple(
    dataset: str, name: str, target: Path, mask: Path, source: Path | None, captions: CaptionsConfig
) -> Triple:
    hashes = [content_hash(picture) for picture in (target, mask, source) if picture is not None]
    content = xxhash.xxh3_128_hexdigest("".join(hashes).encode())
    return Triple(dataset, name, target, mask, source, _read_caption((target, source), captions), hashes[0], content)


def listed(problems: Sequence[str], *, limit: int = 50) -> str:
    """Problems one a line, the first `limit` of them and how many more there are."""
    more = len(problems) - limit
    return "\n".join([*problems[:limit], *([f"... and {more} more."] if more > 0 else [])])


def held_out(contents: Iterable[str], count: int) -> frozenset[str]:
    """Content hashes of the held-out pictures: the `count` smallest.

    A picture's split hangs on its bytes alone, so copies of it under other names, its repeats and its variants are on
    one side; adding pictures moves as few across as there are new ones among the smallest.
    """
    return frozenset(sorted(set(contents))[:count])
