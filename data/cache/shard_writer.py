"""The writer of a shard: a plain WebDataset tar, and the index of its members (shard_index.py).

A shard holds samples of one dataset, bucket and split:
    <key>.text.safetensors      t5 bf16 [L, D], pooled bf16 [P]; nothing if an earlier sample of its caption has them
    <key>.safetensors           latents bf16 [16, h, w]
    <key>.m<k>.safetensors      masked_latents bf16 [16, h, w], mask uint8 [H, W/8] (bit-packed rows); one per variant
    <key>.json                  caption, text, dataset, target, original size, crop, hole fractions
In format 1 a text is a sample of its own, ahead of the others: text-<hash>.safetensors.
`webdataset.WebDataset(path)` reads it without any of this.
"""

import hashlib
import io
import json
import os
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors.torch import save
from torch import Tensor
from webdataset import TarWriter

from data.cache.manifest import FORMAT_VERSION
from data.cache.members import NO_TEXT, TEXT_SUFFIX
from data.cache.shard_index import IndexRow, Place, ShardIndex, build_index, write_index
from data.cache_layout import index_path
from data.encoders.encode import NotFinite
from data.storage.atomic_write import fsync_folder
from data.storage.disk_full import DiskFull, raise_disk_full
from data.storage.tar_members import BLOCK, padded


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

    def __init__(self, path: Path, format_version: int = FORMAT_VERSION) -> None:
        self.path = path
        self._format_version = format_version
        self._index_path = index_path(path, format_version)
        # Of its own name: a worker that was taken for dead may still write when another makes the shard again.
        self._part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
        with raise_disk_full(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._index_path.parent.mkdir(parents=True, exist_ok=True)
            self._sink = _HashingFile(self._part)
        self._tar = TarWriter(self._sink, encoder=False, mtime=0, user="fluxfill", group="fluxfill")
        self._offset = 0
        self._texts: list[Place] = []
        self._text_rows: dict[str, int] = {}
        self._unwritten: dict[str, bytes] = {}  # texts that wait for their first sample
        self._rows: list[IndexRow] = []

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

    def _add_member(self, key: str, suffix: str, data: bytes) -> Place:
        """Append one member; returns (offset, size, xxh3) of its data."""
        if len(key) + len(suffix) + 1 > 100:
            raise ValueError(f"{self.path}: the name {key}.{suffix} is longer than the 100 bytes a tar header holds")
        with raise_disk_full(self.path):
            self._tar.write({"__key__": key, suffix: data})
        offset = self._offset + BLOCK
        self._offset = offset + padded(len(data))
        return offset, len(data), xxhash.xxh3_64_intdigest(data)

    def add_text(self, text: str, **tensors: Tensor) -> None:
        """Store a caption's tensors under `text`, once: `pooled` bf16 [P], `t5` bf16 [L, D] (or int8 with `t5_scale`
        fp32 [L]). Raises NotFinite if they are not.

        Since format 2 they are written with the first sample that has them, and wait for it in memory.
        """
        self._refuse_non_finite(text, **tensors)
        data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        if self._format_version == 1:
            self._note_text(text, self._add_member(text, "safetensors", data))
        else:
            self._unwritten[text] = data

    def _note_text(self, text: str, place: Place) -> None:
        self._text_rows[text] = len(self._texts)
        self._texts.append(place)

    def add_sample(self, sample: SampleTensors) -> None:
        """Store a sample whose text was added before. Raises NotFinite if its tensors are not."""
        self._refuse_non_finite(sample.key, latents=sample.latents)
        if sample.text in self._unwritten:
            data = self._unwritten.pop(sample.text)
            self._note_text(sample.text, self._add_member(sample.key, TEXT_SUFFIX, data))
        elif self._format_version > 1:
            self._add_member(sample.key, TEXT_SUFFIX, NO_TEXT)
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
        self._rows.append(IndexRow(sample.key, member, variants, place, text_row, sample.tokens, fractions))

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
        index = build_index(
            self._rows,
            self._texts,
            plan=plan,
            tar_bytes=tar_bytes,
            tar_sha256=tar_sha256,
            format_version=self._format_version,
        )
        check()
        # At no moment is there an index of a tar that it does not describe: a new one with an old tar, perhaps of the
        # same size, would pass for a finished shard. Nor after a power cut, though the two lie in different folders.
        with suppress(FileNotFoundError):
            self._index_path.unlink()
            fsync_folder(self._index_path.parent)
        self._part.replace(self.path)
        fsync_folder(self.path.parent)
        check()
        try:
            write_index(self._index_path, index)
        except DiskFull:
            self.path.unlink(missing_ok=True)  # of no use without it, and nothing is as large
            raise
        return index
