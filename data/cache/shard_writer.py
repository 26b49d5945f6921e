"""One shard: a plain WebDataset tar and, beside it, the index by which its members are read at their offsets.

A shard holds samples of one dataset, bucket and split:
    text-<hash>.safetensors     t5 bf16 [L, D], pooled bf16 [P]; once per shard, ahead of its first use
    <key>.safetensors           latents bf16 [16, h, w]
    <key>.m<k>.safetensors      masked_latents bf16 [16, h, w], mask uint8 [H, W/8] (bit-packed rows); one per variant
    <key>.json                  caption, text, dataset, target, original size, crop, hole fractions
`webdataset.WebDataset(path)` reads it without any of this.
"""

import hashlib
import io
import json
import os
import secrets
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError
from safetensors.numpy import load
from safetensors.numpy import save as save_columns
from safetensors.torch import save
from torch import Tensor
from webdataset import TarWriter

from configs.errors import InputError
from data.cache_layout import index_path
from data.storage.atomic_write import fsync_folder, write_bytes_atomically
from data.storage.disk_full import DiskFull, raise_disk_full

_BLOCK = 512  # tar's unit: one header block per member, data padded to whole blocks


class NotFinite(InputError):
    """An encoder gave NaN or infinity: trained on, it would be in every weight a step later."""


@dataclass(frozen=True)
class SampleTensors:
    """What one sample stores.

    latents: bf16 [16, h, w].  masked_latents: bf16 [16, h, w] per variant.  masks: bool [H, W] per variant.
    text: key into the shard's texts.  tokens: real T5 tokens of its caption.  meta: the JSON member.
    """

    key: str
    latents: Tensor
    masked_latents: Sequence[Tensor]
    masks: Sequence[np.ndarray]
    text: str
    tokens: int
    meta: dict


@dataclass(frozen=True)
class ShardIndex:
    """Where everything lies in a tar.  n samples, k mask variants, t texts; offsets and sizes in bytes.

    latents: int64 [n, 2] (offset, size).  latents_xxh3: uint64 [n].  masked: int64 [n, k, 2], masked_xxh3: [n, k].
    texts: int64 [t, 2], texts_xxh3: [t].  metas: int64 [n, 2], metas_xxh3: [n], of the JSON members.
    text_row: int32 [n], row of the sample's text.  tokens: int32 [n].
    hole_fraction: fp32 [n, k], share of the area that is painted.
    keys: n names.  plan: 32 hex digits, what the shard was made from.  tar_bytes, tar_sha256: the whole file.
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

    @property
    def num_samples(self) -> int:
        return len(self.keys)


@dataclass(frozen=True, slots=True)
class ShardSummary:
    """What a cache's head tells of a shard.  hole_counts: its masks per tenth of the area that is painted."""

    num_samples: int
    tar_bytes: int
    tar_sha256: str
    hole_counts: tuple[int, ...]

    @staticmethod
    def of(index: ShardIndex) -> "ShardSummary":
        return ShardSummary(index.num_samples, index.tar_bytes, index.tar_sha256, tuple(count_hole_fractions([index])))


_Place = tuple[int, int, int]  # offset, size and xxh3 of a member's data


@dataclass(frozen=True)
class _Row:
    """What the index keeps of one sample."""

    key: str
    latents: _Place
    masked: Sequence[_Place]
    meta: _Place
    text_row: int
    tokens: int
    hole_fractions: Sequence[float]


def _build_index(
    rows: Sequence[_Row], texts: Sequence[_Place], *, plan: str, tar_bytes: int, tar_sha256: str
) -> ShardIndex:
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
    )


class _HashingFile(io.RawIOBase):
    """A file that hashes what is written to it."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")
        self.sha256 = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return self.file.write(data)

    def commit(self) -> None:
        """Flush to disk and close."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.close()

    def close(self) -> None:
        try:
            self.file.close()
        finally:
            super().close()


class ShardWriter:
    """Writes one shard: `add_text` before the samples that use it, `add_sample`, then `finish`.

    The tar grows as <path>.<random>.part and gets its name in `finish`; its index comes last, so a shard with an index
    is done. Its bytes depend on what is stored alone (no times, no user, no paths, no order of arrival).
    All of it raises DiskFull where there is no room.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Of its own name: a worker that was taken for dead may still write when another makes the shard anew.
        self._part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
        with raise_disk_full(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._sink = _HashingFile(self._part)
        self._tar = TarWriter(self._sink, encoder=False, mtime=0, user="fluxfill", group="fluxfill")
        self._offset = 0
        self._texts: list[_Place] = []
        self._text_rows: dict[str, int] = {}
        self._rows: list[_Row] = []

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        """Leave nothing behind of a shard that was not finished."""
        with suppress(OSError, ValueError):  # a full disk, or closed already; the file goes anyway
            self._tar.close()  # else it writes its end later, when it is collected, to a file that is closed
        with suppress(OSError):  # it flushes what is left
            self._sink.close()
        self._part.unlink(missing_ok=True)

    @property
    def num_samples(self) -> int:
        """Those that were added."""
        return len(self._rows)

    def _add_member(self, key: str, suffix: str, data: bytes) -> _Place:
        """Append one member; returns (offset, size, xxh3) of its data."""
        if len(key) + len(suffix) + 1 > 100:
            raise ValueError(f"{self.path}: the name {key}.{suffix} is longer than the 100 bytes a tar header holds")
        with raise_disk_full(self.path):
            self._tar.write({"__key__": key, suffix: data})
        offset = self._offset + _BLOCK
        self._offset = offset + -(-len(data) // _BLOCK) * _BLOCK
        return offset, len(data), xxhash.xxh3_64_intdigest(data)

    def add_text(self, text: str, **tensors: Tensor) -> None:
        """Store a caption's tensors under `text`, once: `pooled` bf16 [P], `t5` bf16 [L, D] (or int8 with `t5_scale`
        fp32 [L]).

        Raises NotFinite if they are not.
        """
        self._refuse_non_finite(text, **tensors)
        self._text_rows[text] = len(self._texts)
        data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        self._texts.append(self._add_member(text, "safetensors", data))

    def add_sample(self, sample: SampleTensors) -> None:
        """Store a sample whose text was added before. Raises NotFinite if its tensors are not."""
        self._refuse_non_finite(sample.key, latents=sample.latents)
        member = self._add_member(sample.key, "safetensors", save({"latents": sample.latents.contiguous()}))
        variants = []
        for variant, (masked_latents, mask) in enumerate(zip(sample.masked_latents, sample.masks, strict=True)):
            self._refuse_non_finite(sample.key, masked_latents=masked_latents)
            tensors = {
                "masked_latents": masked_latents.contiguous(),
                "mask": torch.from_numpy(np.packbits(mask, axis=1)),
            }
            variants.append(self._add_member(sample.key, f"m{variant}.safetensors", save(tensors)))
        fractions = [round(float(mask.mean()), 4) for mask in sample.masks]
        meta = sample.meta | {"hole_fractions": fractions} | {"text": sample.text, "tokens": sample.tokens}
        json_text = json.dumps(meta, sort_keys=True, ensure_ascii=False).encode()
        place = self._add_member(sample.key, "json", json_text)
        text_row = self._text_rows[sample.text]
        self._rows.append(_Row(sample.key, member, variants, place, text_row, sample.tokens, fractions))

    def _refuse_non_finite(self, key: str, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise NotFinite(
                    f"{self.path}: {name} of {key} holds NaN or infinity: the encoder failed on it. Look at the "
                    "picture and its caption; if others fail too, at the model's files and at the GPU."
                )

    def finish(self, *, plan: str, check: Callable[[], object] = lambda: None) -> ShardIndex:
        """Close the tar, give it its name, write its index.

        plan: 32 hex digits of what it was made from.  check: called before either gets its name, when what takes long
        is done; raises if they must not.
        """
        with raise_disk_full(self.path):
            self._tar.close()
            self._sink.commit()
        tar_bytes, tar_sha256 = self._part.stat().st_size, self._sink.sha256.hexdigest()
        index = _build_index(self._rows, self._texts, plan=plan, tar_bytes=tar_bytes, tar_sha256=tar_sha256)
        check()
        # At no moment does an index stand beside a tar that it does not describe: a new one beside an old tar, perhaps
        # of the same size, would pass for a finished shard.
        index_path(self.path).unlink(missing_ok=True)
        self._part.replace(self.path)
        fsync_folder(self.path.parent)
        check()
        try:
            write_index(index_path(self.path), index)
        except DiskFull:
            self.path.unlink(missing_ok=True)  # of no use without it, and nothing is as large
            raise
        return index


def write_index(path: Path, index: ShardIndex) -> None:
    """Store an index as columns (a safetensors file), whole or not at all."""
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
    contiguous = {name: np.ascontiguousarray(column) for name, column in columns.items()}
    contiguous["checksum"] = np.frombuffer(_checksum(contiguous), dtype=np.uint8)
    write_bytes_atomically(path, save_columns(contiguous))


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
        return ShardIndex(
            keys=tuple(keys.split("\n")) if keys else (),
            plan=columns.pop("plan").tobytes().hex(),
            tar_bytes=int(columns.pop("tar_bytes")[0]),
            tar_sha256=columns.pop("tar_sha256").tobytes().hex(),
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


def rebuild_index(tar: Path, *, plan: str, sha256: str) -> ShardIndex:
    """The index of a shard whose index was lost, from the tar itself; written beside it, if that can be written to.

    Raises InputError if the tar is missing or its sha256 is not the one given: a damaged tar would be indexed short
    without complaint, as Python's tarfile takes a bad header for the end.
    """
    if not tar.is_file():
        raise InputError(f"{tar}: missing shard. Restore it, or run `fluxfill preprocess CONFIG` again.")
    if (actual := file_sha256(tar)) != sha256:
        raise InputError(
            f"{tar}: damaged shard (sha256 {actual[:12]}, not {sha256[:12]}). Delete it and run "
            "`fluxfill preprocess CONFIG` again: only that shard is encoded anew."
        )
    members: dict[str, dict[str, _Place]] = {}
    metas: dict[str, dict] = {}
    with tarfile.open(tar) as archive, tar.open("rb") as file:
        for member in archive:
            file.seek(member.offset_data)
            data = file.read(member.size)
            key, suffix = member.name.split(".", 1)
            members.setdefault(key, {})[suffix] = (member.offset_data, member.size, xxhash.xxh3_64_intdigest(data))
            if suffix == "json":
                metas[key] = json.loads(data)
    texts = {key: suffixes["safetensors"] for key, suffixes in members.items() if key not in metas}
    text_rows = {text: row for row, text in enumerate(texts)}
    rows = [
        _Row(
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
    index = _build_index(rows, list(texts.values()), plan=plan, tar_bytes=tar.stat().st_size, tar_sha256=sha256)
    with suppress(OSError):  # a cache that is shared read-only; the next process does this again
        write_index(index_path(tar), index)
    return index
