"""The manifest of a cache, manifest.json: what was cached, by which encoders; and its shard table, shards.npz."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import xxhash

from configs.cache_settings import LATER_KEYS, is_place, manifest_settings, picture_settings
from configs.errors import InputError, os_errors_named
from configs.schema import Config
from data.cache_layout import MANIFEST, SHARD_TABLE, SHARDS, VALIDATION
from data.encoders.model_folder import encoder_fingerprints
from data.storage.atomic_write import write_atomically, write_text_atomically

FORMAT_VERSION = 2  # of new caches; one that was begun in format 1 keeps it (read_format)


class NewerFormat(InputError):
    """A cache of a format that a later release made."""


class ForeignManifest(InputError):
    """A manifest.json of another program, which is not to be deleted as a damaged one of ours is."""


@contextmanager
def cache_errors_named(cache: Path) -> Iterator[None]:
    """A time in which a cache that cannot be read, or not looked into, is a message. For commands: whoever mends a
    damaged cache must not take one for it that is another user's."""
    try:
        yield
    except OSError as error:
        cure = ""
        if isinstance(error, PermissionError):
            cure = f" Whoever trains needs to read all of data.cache: ask its owner for `chmod -R a+rX {cache}`."
        elif isinstance(error, IsADirectoryError):
            cure = " A cache has a file there: point data.cache at a folder of its own."
        with os_errors_named(Path(error.filename or cache), "read", cure):
            raise


@dataclass(frozen=True)
class ShardTable:
    """One row a shard, as columns of equal length.

    path: str, below the cache folder.  dataset, bucket ("HxW"), split ("train" | "holdout"): str.
    samples, bytes: int64.  sha256: str, of the tar.  plan: str, what it was made from.
    """

    path: np.ndarray
    dataset: np.ndarray
    bucket: np.ndarray
    split: np.ndarray
    samples: np.ndarray
    bytes: np.ndarray
    sha256: np.ndarray
    plan: np.ndarray

    def __len__(self) -> int:
        return len(self.path)


@dataclass(frozen=True)
class Manifest:
    """The properties that all shards of a cache share.

    settings: `manifest_settings` of the config, and `picture_settings` of its datasets.  encoders: part -> fingerprint.
    vae_shift, vae_scale: latents = (z - shift) * scale.  text_width, pooled_width: numbers per T5 token and of CLIP.
    mask_variants: per dataset.  samples: dataset -> split -> count.  hole_fractions: dataset -> masks, all variants,
    per tenth of the area that is painted.
    files: path below the cache -> xxh3-128, of all files beside the shards; `write_manifest` fills it.
    """

    format_version: int
    order_version: int
    settings: dict
    encoders: dict[str, str]
    vae_shift: float
    vae_scale: float
    text_length: int
    text_dtype: str
    text_width: int
    pooled_width: int
    mask_variants: dict[str, int]
    samples: dict[str, dict[str, int]]
    hole_fractions: dict[str, list[int]]
    files: dict[str, str] = field(default_factory=dict)


def write_manifest(cache: Path, manifest: Manifest, table: ShardTable) -> Manifest:
    """Write shards.npz, then manifest.json: a cache with a manifest is complete, so all else that belongs to it has to
    be there. Returns the manifest with `files` filled."""

    def write_table(temporary: Path) -> None:
        with temporary.open("wb") as file:
            # Text of fixed width: the columns of a table that was read would be pickled.
            columns: dict[str, Any] = {
                name: np.array(column.tolist()) if column.dtype.kind == "T" else column
                for name, column in vars(table).items()
            }
            np.savez_compressed(file, **columns)

    write_atomically(cache / SHARD_TABLE, write_table)
    beside = [cache / SHARD_TABLE, *cache.glob("*.safetensors"), *(cache / VALIDATION).glob("*")]
    written = replace(manifest, files=hash_files(cache, [path.relative_to(cache).as_posix() for path in beside]))
    fields = asdict(written)
    text = json.dumps(fields | {"checksum": _checksum(fields)}, indent=2, sort_keys=True)
    write_text_atomically(cache / MANIFEST, text + "\n")
    return written


def hash_files(cache: Path, paths: Iterable[str]) -> dict[str, str]:
    """Path below the cache -> xxh3-128 of the file's bytes, "" if it is missing or cannot be read."""
    hashes = {}
    for path in sorted(paths):
        digest = xxhash.xxh3_128()
        try:
            with (cache / path).open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
            hashes[path] = digest.hexdigest()
        except OSError:
            hashes[path] = ""
    return hashes


def _checksum(fields: dict) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(fields, sort_keys=True).encode())


def read_manifest(cache: Path) -> Manifest:
    """The manifest of a cache. Raises InputError if the cache is not complete, or of a newer format; OSError if it
    cannot be read (cache_errors_named)."""
    path = cache / MANIFEST
    if not path.is_file():
        raise InputError(
            f"data.cache {cache}: no {MANIFEST}, so no finished cache is there. Run `fluxfill preprocess CONFIG` first."
        )
    return parse_manifest(path.read_bytes(), path)


def read_format(cache: Path) -> int:
    """The format that a cache is in, finished or not; of a folder that is none yet, the newest.

    Raises NewerFormat, ForeignManifest, and InputError if there is a manifest that cannot be read.
    """
    path = cache / MANIFEST
    with cache_errors_named(cache):
        try:
            return parse_manifest(path.read_bytes(), path).format_version
        except (NewerFormat, ForeignManifest):
            raise
        except (FileNotFoundError, NotADirectoryError, InputError):
            # There is none while preprocessing is at work. Then indexes lie where format 1 has them, or none does.
            return 1 if any((cache / SHARDS).glob("*/*.index")) else FORMAT_VERSION


def parse_manifest(data: bytes, path: Path | str) -> Manifest:
    """The manifest of a file's bytes. Raises InputError, naming `path`, if they are none: NewerFormat, ForeignManifest,
    or else they are damaged."""
    try:
        fields = json.loads(data.decode())
        if fields and not _is_of_a_cache(fields):
            raise ForeignManifest(
                f"{path}: another program's, not that of a cache (it has not the format_version and checksum of ours). "
                "Point data.cache at a folder of its own, or move the file away."
            )
        version = fields["format_version"]
        if version > FORMAT_VERSION:
            raise NewerFormat(
                f"{path}: format version {version}, this fluxfill reads up to {FORMAT_VERSION}. Update fluxfill."
            )
        if fields.pop("checksum") != _checksum(fields):
            raise ValueError("its checksum differs")
        manifest = Manifest(**fields)
        for name in manifest.files:  # they become paths, of what a server sends too
            if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
                raise ValueError(f"names a file outside of the cache: {name}")
        return manifest
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: damaged ({error}). Run `fluxfill preprocess CONFIG` again; whole shards are kept."
        ) from error


def _is_of_a_cache(fields: object) -> bool:
    """Whether JSON is a manifest of this or of a later format, perhaps one that does not hold what it should."""
    version = fields.get("format_version") if isinstance(fields, dict) else None
    return isinstance(fields, dict) and isinstance(version, int) and (version > FORMAT_VERSION or "checksum" in fields)


def read_shard_table(cache: Path) -> ShardTable:
    """The shard table of a cache. Raises InputError if shards.npz is missing or damaged, or names a file outside of the
    cache."""
    path = cache / SHARD_TABLE
    try:
        with np.load(path, allow_pickle=False) as columns:
            table = ShardTable(**{name: _compact(columns[name]) for name in columns.files})
        _refuse_names(table)
    except FileNotFoundError:
        raise InputError(f"{path}: missing. Run `fluxfill preprocess CONFIG` again; whole shards are kept.") from None
    except PermissionError:
        raise
    except Exception as error:  # zipfile, zlib and numpy each have their own
        raise InputError(
            f"{path}: damaged ({error}). Run `fluxfill preprocess CONFIG` again; whole shards are kept."
        ) from error
    if len({len(column) for column in vars(table).values()}) != 1:
        raise InputError(f"{path}: columns of unequal length. Run `fluxfill preprocess CONFIG` again.")
    return table


def _refuse_names(table: ShardTable) -> None:
    """Raise ValueError unless paths are below shards/ and hashes are hashes: both become names of files. By columns:
    there may be a million rows."""
    outside = ~np.strings.startswith(table.path, f"{SHARDS}/") | (np.strings.find(table.path, "..") >= 0)
    if outside.any():
        raise ValueError(f"names a file outside of the cache: {table.path[outside][0]}")
    strange = (np.strings.str_len(table.sha256) != 64) | (np.strings.strip(table.sha256, "0123456789abcdef") != "")
    if strange.any():
        raise ValueError(f"has a sha256 that is none: {table.sha256[strange][0]!r}")


def _compact(column: np.ndarray) -> np.ndarray:
    """Text in a byte a character where npz has four: a million shards are 200 MiB of every rank, not 700."""
    return column.astype(np.dtypes.StringDType()) if column.dtype.kind == "U" else column


def refuse_other_settings(config: Config, model: Path, manifest: Manifest, *, pictures: bool = True) -> None:
    """Raise InputError that lists every setting and encoder in which a config and its model differ from a cache's.

    pictures: compare as well what the pictures of a dataset are (folders or tars, with a source or without, under which
    names of columns or members). Not where they lie, nor what the cache does not say, as those that were made before
    this was written down.
    """
    encoders, wanted = encoder_fingerprints(model), manifest_settings(config.data)
    if pictures:
        for dataset in config.data.datasets:
            wanted |= {key: value for key, value in picture_settings(dataset).items() if key in manifest.settings}
    found = manifest.settings
    problems = [
        f"{part} of model.base {config.model.base} is not the one that encoded the cache: its files are others "
        f"({encoders[part][:12]}, not {manifest.encoders.get(part, 'none')[:12]}), be their weights the same or not"
        for part in encoders
        if encoders[part] != manifest.encoders.get(part)
    ] + [
        f"{key} is {wanted.get(key)!r}, the cache was made with {found.get(key)!r}"
        for key in [*wanted, *sorted(LATER_KEYS - wanted.keys())]
        if wanted.get(key) != found.get(key) and not (is_place(key) and wanted[key] and found.get(key))
    ]
    if problems:
        raise InputError(
            f"data.cache {config.data.cache} was made by other settings:\n  " + "\n  ".join(problems) + "\n"
            "Run `fluxfill preprocess CONFIG` again, or point data.cache (or model.base) at the one that fits "
            "(docs/troubleshooting.md#the-cache-is-of-another-run)."
        )
