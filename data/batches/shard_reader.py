"""The stored bytes of samples, by (shard, row): read at their offsets, straight to their place, and checked.

There is nothing to decode, reading releases the GIL, and xxh3 (30 GB/s) costs next to nothing. Members that lie side
by side in the tar are read by one call.
"""

import logging
import math
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from configs.errors import InputError
from data.cache.members import LATENTS, MASKED, MAX_HEADER, TEXT, Tensors, num_bytes, parse_header, sample_tensors
from data.cache.open_cache import Cache
from data.cache.shard_index import ShardIndex, read_index, rebuild_index
from data.cache_layout import index_path
from data.samples.geometry import Bucket
from data.storage.file_handle import FileHandle, read_at, read_into
from data.storage.retry import with_retries

log = logging.getLogger("fluxfill")

# File handles and indexes that a reader keeps. The order stays within a block or two of shards per dataset and bucket,
# but goes round all of these; a process may have 1024 files open where nobody raised the limit.
_OPEN_SHARDS = 256
_REFETCH_SECONDS = 3600.0
_MAX_GAP = 4096  # bytes between two members that are read along rather than by a call of their own: tar's header

_ENCODE_AGAIN = "Delete the shard and run `fluxfill preprocess CONFIG` again: only that shard is encoded."

Buffers = Mapping[str, memoryview]  # tensor name -> its bytes, contiguous and writable


class DamagedShard(InputError):
    """A shard on disk is not what the manifest promised."""


class DamagedSample(DamagedShard):
    """One sample of a shard is not what was written; the others may be."""


@dataclass(frozen=True)
class _Layout:
    """How one kind of member looks: its safetensors header, and the names of its tensors in the order of their data."""

    kind: str
    header: bytes
    names: tuple[str, ...]
    num_bytes: int


def _parse_layout(kind: str, data: bytes, expected: Tensors, where: str) -> _Layout:
    """Layout of a safetensors member from its first bytes.

    expected: name -> (safetensors dtype, shape).  Raises DamagedShard if the bytes are no header, or say otherwise.
    """
    try:
        length, entries = parse_header(data)
    except ValueError as error:
        raise DamagedShard(f"{where}: no safetensors header ({error}). {_ENCODE_AGAIN}") from error
    found = {name: (entry["dtype"], entry["shape"]) for name, entry in entries.items()}
    starts = {name: entry["data_offsets"][0] for name, entry in entries.items()}
    if found != expected:
        raise DamagedShard(
            f"{where}: holds {found}, the cache's bucket and text length ask for {expected}. {_ENCODE_AGAIN}"
        )
    names = tuple(sorted(starts, key=starts.__getitem__))
    return _Layout(kind, data[:length], names, length + num_bytes(expected))


@dataclass(frozen=True)
class _Member:
    """One member to read. name: of what, for messages.  xxh3: of its bytes."""

    layout: _Layout
    name: str
    offset: int
    size: int
    xxh3: int


class _OpenShard:
    """A shard's handle and index. The index is kept as lists: single numbers are taken from them for every row.

    where: the shard, for messages.
    """

    def __init__(self, where: str, handle: FileHandle, index: ShardIndex, layouts: dict[str, _Layout]) -> None:
        self.where, self.handle, self.index = where, handle, index
        self._layouts = layouts
        self._latents, self._latents_xxh3 = index.latents.tolist(), index.latents_xxh3.tolist()
        self._masked, self._masked_xxh3 = index.masked.tolist(), index.masked_xxh3.tolist()
        self._texts, self._texts_xxh3 = index.texts.tolist(), index.texts_xxh3.tolist()
        self._text_row = index.text_row.tolist()

    def latents(self, row: int) -> _Member:
        offset, size = self._latents[row]
        return _Member(self._layouts[LATENTS], self.index.keys[row], offset, size, self._latents_xxh3[row])

    def masked(self, row: int, variant: int) -> _Member:
        offset, size = self._masked[row][variant]
        return _Member(self._layouts[MASKED], self.index.keys[row], offset, size, self._masked_xxh3[row][variant])

    def text(self, row: int) -> _Member:
        text = self._text_row[row]
        offset, size = self._texts[text]
        name = f"the text of {self.index.keys[row]}"
        return _Member(self._layouts[TEXT], name, offset, size, self._texts_xxh3[text])


class ShardReader:
    """Reads rows of a cache's shards; safe to call from many threads.

    Keeps the last few shards open. Raises DamagedShard, naming shard and sample, for whatever is not as written.
    """

    def __init__(self, cache: Cache) -> None:
        self.manifest, self.table = cache.manifest, cache.table
        self._folder, self._copies = cache.folder, cache.copies
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()
        self._scratch = threading.local()
        self._closing = threading.Event()
        self._last_fetch: dict[int, float] = {}
        self._max_open = _OPEN_SHARDS if cache.copies is None else min(_OPEN_SHARDS, cache.copies.max_open)

    def shard(self, number: int) -> _OpenShard:
        """An open shard.

        Raises DamagedShard if it is of another size, or not the one in the table; InputError if it is missing or the
        storage fails, and still does after a while.
        """
        try:
            return self._find(number)
        except OSError as error:
            what = f"{self._folder / str(self.table.path[number])}: cannot be opened ({error.strerror})"
            return with_retries(lambda: self._find(number), what, stop=self._closing)

    def _find(self, number: int) -> _OpenShard:
        with self._lock:
            if number in self._open:
                self._open.move_to_end(number)
                return self._open[number]
        # Not under the lock: the others read on while this thread waits for the disk. Two that open one shard at the
        # same moment end up with the same.
        newly_opened = self._open_shard(number)
        with self._lock:
            opened = self._open.setdefault(number, newly_opened)
            if len(self._open) > self._max_open:
                # Not closed here: another thread may be reading from it. The handle goes with the last reference.
                self._open.popitem(last=False)
            return opened

    def stop(self) -> None:
        """Try nothing again from now on, and fetch nothing more."""
        self._closing.set()

    def close(self) -> None:
        """Let go of all shards: their files are closed when nobody reads from them any more."""
        self.stop()
        with self._lock:
            self._open.clear()

    def _open_shard(self, number: int) -> _OpenShard:
        if self._copies is None:
            path = self._folder / str(self.table.path[number])
            index_file = index_path(path, self.manifest.format_version)
            return self._open_file(number, path, index_file, FileHandle(path), str(path))
        path, index_file = self._copies.path(number), self._copies.index_path(number)
        where = f"{self._copies.url_of(number)} (its copy {path})"
        handle = self._copies.open(number, stop=self._closing)
        assert handle is not None  # it may exceed the limit
        try:
            return self._open_file(number, path, index_file, handle, where)
        except (InputError, OSError) as error:  # of the copy or its index: the shard may be intact where it comes from
            log.warning("%s: damaged, fetched again (%s)", where, error)
            self._copies.discard(number, handle)
        handle = self._copies.open(number, stop=self._closing)
        assert handle is not None
        return self._open_file(number, path, index_file, handle, where)

    def _open_file(self, number: int, path: Path, index_file: Path, handle: FileHandle, where: str) -> _OpenShard:
        """where: the shard, for messages."""
        sha256, size = str(self.table.sha256[number]), int(self.table.bytes[number])
        if (actual := os.fstat(handle).st_size) != size:
            raise DamagedShard(
                f"{where}: {actual} bytes, the manifest says {size}. Restore it, or delete it and run "
                "`fluxfill preprocess CONFIG` again."
            )
        try:
            index = read_index(index_file)
        except FileNotFoundError:
            index = rebuild_index(path, index_file, plan=str(self.table.plan[number]), sha256=sha256)
        if index.tar_sha256 != sha256:
            raise DamagedShard(f"{index_file}: belongs to another shard. Delete it: it is rebuilt from the shard.")
        places = {LATENTS: index.latents, MASKED: index.masked.reshape(-1, 2), TEXT: index.texts}
        expected = sample_tensors(Bucket.parse(str(self.table.bucket[number])), self.manifest)
        layouts = {kind: _find_layout(handle, where, kind, places[kind], expected[kind]) for kind in places}
        return _OpenShard(where, handle, index, layouts)

    def key(self, shard: int, row: int) -> str:
        """A sample's name."""
        return self.shard(shard).index.keys[row]

    def num_samples(self, shard: int) -> int:
        """Rows of a shard."""
        return self.shard(shard).index.num_samples

    def num_variants(self, shard: int) -> int:
        """Mask variants that every sample of a shard has."""
        return self.shard(shard).index.masked.shape[1]

    def read(self, shard: int, row: int, out: Buffers, *, variant: int = 0) -> None:
        """Fill buffers with a sample's tensors as they are stored; what is not in `out` is not read.

        out: `latents`; `masked_latents` and `mask`, of one variant; `t5` and `pooled` (and `t5_scale` where texts are
        int8).
        Raises DamagedSample if they are not what was written, DamagedShard if the shard is not, InputError if the
        storage keeps failing.
        """
        opened = self.shard(shard)
        try:
            try:
                self._read(opened, row, out, variant)
            except (DamagedSample, OSError):
                if not self._copy_is_replaced(shard, opened):
                    raise
                self._read(self.shard(shard), row, out, variant)
        except OSError as error:
            where = f"{opened.where}: {opened.index.keys[row]} cannot be read ({error.strerror})"
            with_retries(lambda: self._refetch_and_read(shard, row, out, variant), where, stop=self._closing)

    def _copy_is_replaced(self, shard: int, opened: _OpenShard) -> bool:
        """Whether a shard is worth another look: it is a copy, which was perhaps damaged on this node. Once an hour, as
        what is damaged where it comes from would be fetched for each of its rows."""
        if self._copies is None:
            return False
        with self._lock:
            current = self._open.get(shard)
            if current is not None and current is not opened:
                return True  # another thread was first to see it
            now = time.monotonic()
            if now - self._last_fetch.get(shard, -math.inf) < _REFETCH_SECONDS:
                return current is None  # another thread fetches it just now
            self._last_fetch[shard] = now
            # Under the lock: another thread that opened it now would find the damaged copy once more.
            self._open.pop(shard, None)
            self._copies.discard(shard, opened.handle)
        log.warning("%s: damaged, fetched again", opened.where)
        return True

    def _refetch_and_read(self, shard: int, row: int, out: Buffers, variant: int) -> None:
        """Read with a new handle: that of a file that was replaced, or of a server that came back, stays stale."""
        with self._lock:
            self._open.pop(shard, None)
        self._read(self._find(shard), row, out, variant)

    def _read(self, opened: _OpenShard, row: int, out: Buffers, variant: int) -> None:
        members = []
        if "latents" in out:
            members.append(opened.latents(row))
        if "mask" in out:
            members.append(opened.masked(row, variant))
        if "t5" in out:
            members.append(opened.text(row))
        members.sort(key=_offset)
        run: list[_Member] = []
        for member in members:
            if run and member.offset - (run[-1].offset + run[-1].size) > _MAX_GAP:
                self._read_run(opened, run, out)
                run = []
            run.append(member)
        self._read_run(opened, run, out)

    def _read_run(self, opened: _OpenShard, run: list[_Member], out: Buffers) -> None:
        """Read neighbouring members by one call: tensors to their buffers, what lies between them to a scratch."""
        try:
            scratch: memoryview = self._scratch.memory
        except AttributeError:
            scratch = self._scratch.memory = memoryview(bytearray(4 * MAX_HEADER))
        parts: list[memoryview] = []
        headers: list[memoryview] = []
        used, end = 0, run[0].offset
        for member in run:
            layout = member.layout
            if member.size != layout.num_bytes:
                raise DamagedSample(
                    f"{_where(opened, member)} should have {layout.num_bytes} bytes, as the others of its shard. "
                    f"{_ENCODE_AGAIN}"
                )
            gap = member.offset - end
            if gap:
                parts.append(scratch[used : used + gap])
                used += gap
            header = scratch[used : used + len(layout.header)]
            used += len(layout.header)
            headers.append(header)
            parts.append(header)
            parts += [out[name] for name in layout.names]
            end = member.offset + member.size
        start = run[0].offset
        if read_into(opened.handle, parts, start) != end - start:
            _read_again(opened, parts, run)
        for member, header in zip(run, headers, strict=True):
            digest = xxhash.xxh3_64(header)
            for name in member.layout.names:
                digest.update(out[name])
            if digest.intdigest() != member.xxh3:
                raise DamagedSample(f"{_where(opened, member)} does not match its checksum. {_ENCODE_AGAIN}")
            if header != member.layout.header:
                raise DamagedSample(
                    f"{_where(opened, member)} holds other tensors than the others of its shard. {_ENCODE_AGAIN}"
                )
            # Not of texts: four times the bytes, shared by many samples.
            for name in ("latents", "masked_latents"):
                if name in member.layout.names and _not_finite(out[name]):
                    raise DamagedSample(f"{_where(opened, member)}: {name} are not finite numbers. {_ENCODE_AGAIN}")


def _not_finite(bf16: memoryview) -> bool:
    """Whether a number of a bf16 tensor is nan or inf: as integers these are the largest of each sign."""
    return bool(np.frombuffer(bf16, np.int16).max() >= 0x7F80 or np.frombuffer(bf16, np.uint16).max() >= 0xFF80)


def _offset(member: _Member) -> int:
    return member.offset


def _where(opened: _OpenShard, member: _Member) -> str:
    return f"{opened.where}: {member.name} ({member.layout.kind}, {member.size} bytes at {member.offset})"


def _find_layout(handle: int, where: str, kind: str, places: np.ndarray, expected: Tensors) -> _Layout:
    """The layout that a shard's members of one kind share: of the first one with an intact header.

    places: int64 [n, 2], offset and size of each.  Raises DamagedShard, of the first one, if no header is.
    """
    problem = None
    for number, (offset, size) in enumerate(places.tolist()):
        head = read_at(handle, min(size, MAX_HEADER), offset)
        try:
            return _parse_layout(
                kind, head, expected, f"{where}: {'first' if number == 0 else 'a later'} {kind} member"
            )
        except DamagedShard as error:
            problem = problem or error
    raise problem or DamagedShard(f"{where}: holds no {kind} member. {_ENCODE_AGAIN}")


def _read_again(opened: _OpenShard, parts: list[memoryview], run: list[_Member]) -> None:
    """Finish a short read: legal on network filesystems, and the only answer at the end of a cut file."""
    start, end = run[0].offset, run[-1].offset + run[-1].size
    data = bytearray()
    while len(data) < end - start and (piece := read_at(opened.handle, end - start - len(data), start + len(data))):
        data += piece
    cut = next((m for m in run if m.offset + m.size > start + len(data)), None)
    if cut is not None:
        raise DamagedShard(f"{_where(opened, cut)}: the file ends there. {_ENCODE_AGAIN}")
    at = 0
    for part in parts:
        part[:] = data[at : at + len(part)]
        at += len(part)
