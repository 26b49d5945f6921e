"""The stored bytes of samples, by (shard, row): read at their offsets, straight to their place, and checked.

There is nothing to decode, `preadv` releases the GIL, and xxh3 (30 GB/s) costs next to nothing.
"""

import json
import math
import os
import struct
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from configs.errors import InputError
from data.manifest import Manifest, ShardTable, parse_bucket
from data.shards import ShardIndex, index_path, read_index, rebuild_index

# File handles and indexes that a reader keeps. The order stays within a block or two of shards per dataset and bucket,
# but goes round all of these; a process may have 1024 files open where nobody raised the limit.
_OPEN_SHARDS = 256
_MAX_HEADER = 1 << 16

_ENCODE_ANEW = "Delete the shard and run `fluxfill preprocess CONFIG` again: only that shard is encoded anew."


class DamagedShard(InputError):
    """A shard on disk is not what the manifest promised."""


@dataclass(frozen=True)
class _Layout:
    """How one kind of member looks: its safetensors header, and (name, bytes) in the order of its data."""

    header: bytes
    fields: tuple[tuple[str, int], ...]

    @property
    def num_bytes(self) -> int:
        return len(self.header) + sum(size for _, size in self.fields)


def _parse_layout(data: bytes, expected: dict[str, tuple[str, list[int]]], where: str) -> _Layout:
    """Layout of a safetensors member from its first bytes.

    expected: name -> (safetensors dtype, shape).  Raises DamagedShard if the bytes are no header, or say otherwise.
    """
    try:
        (length,) = struct.unpack_from("<Q", data)
        if length > _MAX_HEADER:
            raise ValueError(f"a header of {length} bytes")
        entries = json.loads(data[8 : 8 + length])
        found = {name: (entry["dtype"], entry["shape"]) for name, entry in entries.items()}
        starts = {name: entry["data_offsets"][0] for name, entry in entries.items()}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedShard(f"{where}: no safetensors header ({error}). {_ENCODE_ANEW}") from error
    if found != expected:
        raise DamagedShard(
            f"{where}: holds {found}, the cache's bucket and text length ask for {expected}. {_ENCODE_ANEW}"
        )
    sizes = {name: math.prod(shape) * (2 if dtype == "BF16" else 1) for name, (dtype, shape) in expected.items()}
    return _Layout(data[: 8 + length], tuple((name, sizes[name]) for name in sorted(starts, key=starts.__getitem__)))


@dataclass(frozen=True)
class _OpenShard:
    path: Path
    handle: "_Handle"
    index: ShardIndex
    layouts: dict[str, _Layout]


class ShardReader:
    """Reads rows of a cache's shards; safe to call from many threads.

    Keeps the last few shards open. Raises DamagedShard, naming shard and sample, for whatever is not as written.
    """

    def __init__(self, cache: Path, manifest: Manifest, table: ShardTable) -> None:
        self.cache = cache
        self.manifest = manifest
        self.table = table
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()
        self._scratch = threading.local()

    def shard(self, number: int) -> _OpenShard:
        """An open shard. Raises DamagedShard if it is missing, of another size, or not the one in the table."""
        with self._lock:
            if number in self._open:
                self._open.move_to_end(number)
                return self._open[number]
        # Not under the lock: the others read on while this thread waits for the disk. Two that open one shard at the
        # same moment end up with the same.
        newly_opened = self._open_shard(number)
        with self._lock:
            opened = self._open.setdefault(number, newly_opened)
            if len(self._open) > _OPEN_SHARDS:
                # Not closed here: another thread may be reading from it. The handle goes with the last reference.
                self._open.popitem(last=False)
            return opened

    def close(self) -> None:
        """Let go of all shards: their files are closed when nobody reads from them any more."""
        with self._lock:
            self._open.clear()

    def _open_shard(self, number: int) -> _OpenShard:
        path = self.cache / str(self.table.path[number])
        sha256, size = str(self.table.sha256[number]), int(self.table.bytes[number])
        try:
            handle = _Handle(path)
        except OSError as error:
            raise DamagedShard(
                f"{path}: cannot be opened ({error.strerror}). Restore it, or run `fluxfill preprocess CONFIG` again."
            ) from error
        if (actual := os.fstat(handle).st_size) != size:
            raise DamagedShard(
                f"{path}: {actual} bytes, the manifest says {size}. Restore it, or delete it and run "
                "`fluxfill preprocess CONFIG` again."
            )
        try:
            index = read_index(index_path(path))
        except FileNotFoundError:
            index = rebuild_index(path, plan=str(self.table.plan[number]), sha256=sha256)
        if index.tar_sha256 != sha256:
            raise DamagedShard(
                f"{index_path(path)}: belongs to another shard. Delete it: it is rebuilt from the shard."
            )
        bucket = parse_bucket(str(self.table.bucket[number]))
        latents = ("BF16", [16, *bucket.latent_size])
        text_length, manifest = self.manifest.text_length, self.manifest
        kinds = {
            "latents": (index.latents, {"latents": latents}),
            "masked": (
                index.masked.reshape(-1, 2),
                {"masked_latents": latents, "mask": ("U8", [bucket.height, bucket.width // 8])},
            ),
            "text": (
                index.texts,
                {"t5": ("BF16", [text_length, manifest.text_width]), "pooled": ("BF16", [manifest.pooled_width])},
            ),
        }
        layouts = {}
        for kind, (places, expected) in kinds.items():
            head = os.pread(handle, min(int(places[0, 1]), _MAX_HEADER), int(places[0, 0]))
            layouts[kind] = _parse_layout(head, expected, f"{path}: first {kind} member")
        return _OpenShard(path, handle, index, layouts)

    def key(self, shard: int, row: int) -> str:
        """A sample's name."""
        return self.shard(shard).index.keys[row]

    def num_variants(self, shard: int) -> int:
        """Mask variants that every sample of a shard has."""
        return self.shard(shard).index.masked.shape[1]

    def read_latents(self, shard: int, row: int, out: np.ndarray) -> None:
        """Fill `out` (uint8, contiguous) with a sample's latents as they are stored."""
        index = (opened := self.shard(shard)).index
        self._read(opened, "latents", index.latents[row], index.latents_xxh3[row], {"latents": out}, index.keys[row])

    def read_masked(self, shard: int, row: int, variant: int, masked_latents: np.ndarray, mask: np.ndarray) -> None:
        """Fill `masked_latents` and `mask` (uint8, contiguous) with one mask variant of a sample."""
        index = (opened := self.shard(shard)).index
        out = {"masked_latents": masked_latents, "mask": mask}
        self._read(opened, "masked", index.masked[row, variant], index.masked_xxh3[row, variant], out, index.keys[row])

    def read_text(self, shard: int, row: int, t5: np.ndarray, pooled: np.ndarray) -> None:
        """Fill `t5` and `pooled` (uint8, contiguous) with the text of a sample."""
        index = (opened := self.shard(shard)).index
        text = index.text_row[row]
        out = {"t5": t5, "pooled": pooled}
        self._read(opened, "text", index.texts[text], index.texts_xxh3[text], out, f"the text of {index.keys[row]}")

    def _read(
        self, opened: _OpenShard, kind: str, place: np.ndarray, xxh3: np.uint64, out: dict[str, np.ndarray], name: str
    ) -> None:
        layout = opened.layouts[kind]
        offset, size = int(place[0]), int(place[1])
        where = f"{opened.path}: {name} ({kind}, {size} bytes at {offset})"
        if size != layout.num_bytes:
            raise DamagedShard(
                f"{where} should have {layout.num_bytes} bytes, as the others of its shard. {_ENCODE_ANEW}"
            )
        if not hasattr(self._scratch, "header"):
            self._scratch.header = bytearray(_MAX_HEADER)
        header = memoryview(self._scratch.header)[: len(layout.header)]
        parts = [header, *(out[field].reshape(-1).data for field, _ in layout.fields)]
        try:
            if os.preadv(opened.handle, parts, offset) != size:
                _read_again(opened.handle, parts, offset, size, where)
        except OSError as error:
            raise DamagedShard(f"{where} cannot be read ({error.strerror}). Look at the disk it lies on.") from error
        digest = xxhash.xxh3_64()
        for part in parts:
            digest.update(part)
        if digest.intdigest() != int(xxh3):
            raise DamagedShard(f"{where} does not match its checksum. {_ENCODE_ANEW}")
        if header != layout.header:
            raise DamagedShard(f"{where} holds other tensors than the others of its shard. {_ENCODE_ANEW}")


def _read_again(handle: int, parts: list, offset: int, size: int, where: str) -> None:
    """Finish a short read: legal on network filesystems, and the only answer at the end of a cut file."""
    data = bytearray()
    while len(data) < size and (piece := os.pread(handle, size - len(data), offset + len(data))):
        data += piece
    if len(data) != size:
        raise DamagedShard(f"{where}: the file ends there. {_ENCODE_ANEW}")
    start = 0
    for part in parts:
        part[:] = data[start : start + len(part)]
        start += len(part)


class _Handle(int):
    """A file descriptor that closes itself with its last reference."""

    def __new__(cls, path: Path) -> "_Handle":
        return super().__new__(cls, os.open(path, os.O_RDONLY))

    def __del__(self, close=os.close) -> None:  # bound here: at exit the module may be gone before the last handle
        close(self)
