"""The index of a shard: where its members lie, and their checksums; written with the tar, or rebuilt from it."""

import hashlib
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from safetensors import SafetensorError
from safetensors.numpy import load, save

from configs.errors import InputError
from data.cache.members import NO_TEXT, TEXT_SUFFIX
from data.storage.atomic_write import write_bytes_atomically

Place = tuple[int, int, int]  # offset, size and xxh3 of a member's data


@dataclass(frozen=True)
class ShardIndex:
    """The members of a tar by their places.  n samples, k mask variants, t texts; offsets and sizes in bytes.

    latents: int64 [n, 2] (offset, size).  latents_xxh3: uint64 [n].  masked: int64 [n, k, 2], masked_xxh3: [n, k].
    texts: int64 [t, 2], texts_xxh3: [t].  metas: int64 [n, 2], metas_xxh3: [n], of the JSON members.
    text_row: int32 [n], row of the sample's text.  tokens: int32 [n].
    hole_fraction: fp32 [n, k], share of the area that is painted.
    keys: n names.  plan: 32 hex digits, what the shard was made from.  tar_bytes, tar_sha256: of the tar.
    format_version: of the tar; since 2 a text stands with the first sample that has it.
    """

    latents: np.ndarray
    latents_xxh3: np.ndarray
    masked: np.ndarray
    masked_xxh3: np.ndarray
    texts: np.ndarray
    texts_xxh3: np.ndarray
    metas: np.ndarray
    metas_xxh3: np.ndarray
    text_row: np.ndarray
    tokens: np.ndarray
    hole_fraction: np.ndarray
    keys: tuple[str, ...]
    plan: str
    tar_bytes: int
    tar_sha256: str
    format_version: int = 1

    @property
    def num_samples(self) -> int:
        return len(self.keys)


@dataclass(frozen=True, slots=True)
class ShardSummary:
    """One shard's row of the shard table.  hole_counts: its masks per tenth of the area that is painted."""

    num_samples: int
    tar_bytes: int
    tar_sha256: str
    hole_counts: tuple[int, ...]

    @staticmethod
    def of(index: ShardIndex) -> "ShardSummary":
        return ShardSummary(index.num_samples, index.tar_bytes, index.tar_sha256, tuple(count_hole_fractions([index])))


@dataclass(frozen=True)
class IndexRow:
    """One sample's part of an index."""

    key: str
    latents: Place
    masked: Sequence[Place]
    meta: Place
    text_row: int
    tokens: int
    hole_fractions: Sequence[float]


def build_index(
    rows: Sequence[IndexRow],
    texts: Sequence[Place],
    *,
    plan: str,
    tar_bytes: int,
    tar_sha256: str,
    format_version: int,
) -> ShardIndex:
    """The index of a tar with these samples and texts, each in the tar's order."""
    num_variants = len(rows[0].masked) if rows else 0
    latents = np.array([row.latents for row in rows], dtype=object).reshape(len(rows), 3)
    masked = np.array([row.masked for row in rows], dtype=object).reshape(len(rows), num_variants, 3)
    metas = np.array([row.meta for row in rows], dtype=object).reshape(len(rows), 3)
    text = np.array(texts, dtype=object).reshape(len(texts), 3)
    return ShardIndex(
        latents=latents[:, :2].astype(np.int64),
        latents_xxh3=latents[:, 2].astype(np.uint64),
        masked=masked[:, :, :2].astype(np.int64),
        masked_xxh3=masked[:, :, 2].astype(np.uint64),
        texts=text[:, :2].astype(np.int64),
        texts_xxh3=text[:, 2].astype(np.uint64),
        metas=metas[:, :2].astype(np.int64),
        metas_xxh3=metas[:, 2].astype(np.uint64),
        text_row=np.array([row.text_row for row in rows], dtype=np.int32),
        tokens=np.array([row.tokens for row in rows], dtype=np.int32),
        hole_fraction=np.array([row.hole_fractions for row in rows], dtype=np.float32).reshape(len(rows), num_variants),
        keys=tuple(row.key for row in rows),
        plan=plan,
        tar_bytes=tar_bytes,
        tar_sha256=tar_sha256,
        format_version=format_version,
    )


def write_index(path: Path, index: ShardIndex) -> None:
    """Write an index atomically, as columns in a safetensors file."""
    keys = "\n".join(index.keys).encode()
    columns = {
        "latents": index.latents,
        "latents_xxh3": index.latents_xxh3,
        "masked": index.masked,
        "masked_xxh3": index.masked_xxh3,
        "texts": index.texts,
        "texts_xxh3": index.texts_xxh3,
        "metas": index.metas,
        "metas_xxh3": index.metas_xxh3,
        "text_row": index.text_row,
        "tokens": index.tokens,
        "hole_fraction": index.hole_fraction,
        "keys": np.frombuffer(keys, dtype=np.uint8),
        "plan": np.frombuffer(bytes.fromhex(index.plan), dtype=np.uint8),
        "tar_bytes": np.array([index.tar_bytes], dtype=np.int64),
        "tar_sha256": np.frombuffer(bytes.fromhex(index.tar_sha256), dtype=np.uint8),
    }
    if index.format_version > 1:  # those of format 1 have no such column
        columns["format_version"] = np.array([index.format_version], dtype=np.int64)
    contiguous = {name: np.ascontiguousarray(column) for name, column in columns.items()}
    contiguous["checksum"] = np.frombuffer(_checksum(contiguous), dtype=np.uint8)
    write_bytes_atomically(path, save(contiguous))


def _checksum(columns: Mapping[str, np.ndarray]) -> bytes:
    """Of all columns: a flipped bit in `text_row` would else be another caption, and nobody would know."""
    digest = xxhash.xxh3_128()
    for name, column in sorted(columns.items()):
        digest.update(f"{name} {column.dtype} {column.shape};".encode())
        digest.update(np.ascontiguousarray(column).data)
    return digest.digest()


def read_index(path: Path) -> ShardIndex:
    """Read an index. Raises FileNotFoundError if there is none, InputError if it is damaged."""
    try:
        # Not mapped: over NFS, one that is replaced meanwhile would end the process by SIGBUS.
        columns = load(path.read_bytes())
        stored = columns.pop("checksum").tobytes()
        if stored != _checksum(columns):
            raise ValueError("its checksum differs")
        keys = columns.pop("keys").tobytes().decode()
        format_version = columns.pop("format_version", np.ones(1, dtype=np.int64))
        return ShardIndex(
            keys=tuple(keys.split("\n")) if keys else (),
            plan=columns.pop("plan").tobytes().hex(),
            tar_bytes=int(columns.pop("tar_bytes")[0]),
            tar_sha256=columns.pop("tar_sha256").tobytes().hex(),
            format_version=int(format_version[0]),
            **columns,
        )
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: damaged index ({error}). Delete it: it is rebuilt from the shard.") from error


def count_hole_fractions(indexes: Iterable[ShardIndex]) -> list[int]:
    """How many masks paint up to 10 %, 20 %, ... 100 % of the area."""
    counts = np.zeros(10, dtype=np.int64)
    for index in indexes:
        counts += np.histogram(index.hole_fraction, bins=10, range=(0, 1))[0]
    return counts.tolist()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def rebuild_index(tar: Path, path: Path, *, plan: str, sha256: str) -> ShardIndex:
    """The index of a shard whose index was lost, from the tar itself; written to `path`, if that can be written to.

    Raises InputError if the tar is missing or its sha256 is not the one given: a damaged tar would be indexed short
    without complaint, as Python's tarfile takes a bad header for the end.
    """
    if not tar.is_file():
        raise InputError(f"{tar}: missing shard. Restore it, or run `fluxfill preprocess CONFIG` again.")
    if (actual := file_sha256(tar)) != sha256:
        raise InputError(
            f"{tar}: damaged shard (sha256 {actual[:12]}, not {sha256[:12]}). Delete it and run "
            "`fluxfill preprocess CONFIG` again: only that shard is encoded again."
        )
    members: dict[str, dict[str, Place]] = {}
    metas: dict[str, dict] = {}
    with tarfile.open(tar) as archive, tar.open("rb") as file:
        for member in archive:
            file.seek(member.offset_data)
            data = file.read(member.size)
            key, suffix = member.name.split(".", 1)
            members.setdefault(key, {})[suffix] = (member.offset_data, member.size, xxhash.xxh3_64_intdigest(data))
            if suffix == "json":
                metas[key] = json.loads(data)
    format_version = 2 if any(TEXT_SUFFIX in suffixes for suffixes in members.values()) else 1
    if format_version == 1:
        texts = {key: suffixes["safetensors"] for key, suffixes in members.items() if key not in metas}
    else:
        with_text = ((meta["text"], members[key][TEXT_SUFFIX]) for key, meta in metas.items())
        texts = {text: place for text, place in with_text if place[1] != len(NO_TEXT)}
    text_rows = {text: row for row, text in enumerate(texts)}
    rows = [
        IndexRow(
            key,
            members[key]["safetensors"],
            [members[key][f"m{variant}.safetensors"] for variant in range(len(meta["hole_fractions"]))],
            members[key]["json"],
            text_rows[meta["text"]],
            meta["tokens"],
            meta["hole_fractions"],
        )
        for key, meta in metas.items()
    ]
    index = build_index(
        rows,
        list(texts.values()),
        plan=plan,
        tar_bytes=tar.stat().st_size,
        tar_sha256=sha256,
        format_version=format_version,
    )
    with suppress(OSError):  # a cache that is shared read-only; the next process does this again
        path.parent.mkdir(parents=True, exist_ok=True)
        write_index(path, index)
    return index
