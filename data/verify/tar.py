"""One pass over a shard's tar: the structure, every member, and the sha256 of the whole.

An intact index says what belongs at every byte, so that a damaged header does not hide the members
after it, as it does from Python's tarfile and from webdataset.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import xxhash

from data.cache.members import LATENTS, MASKED, NO_TEXT, TEXT, TEXT_SUFFIX, Tensors, parse_header
from data.cache.shard_index import ShardIndex
from data.storage.tar_members import BLOCK, padded

_READ_AHEAD = 1 << 20
_ADVANCE_BYTES = 8 << 20  # told at once: a bar that is drawn for every member of small pictures costs more than hashing


@dataclass(frozen=True)
class Problem:
    """Something that is not as it was written.

    path: the file, below the cache folder.  member: of a tar, or "" where the whole file is meant.
    """

    path: str
    member: str
    what: str


@dataclass(frozen=True)
class _Member:
    """A member's place, as the index has it. name: None for a text of format 1, whose name the index does not hold."""

    kind: str
    name: str | None
    row: int
    offset: int
    size: int
    xxh3: int


class TarWalk:
    """One pass over a tar.

    sha256: of all that was read.  position: bytes read so far.  misfits: intact members that hold other tensors than
    the manifest says.  path: what problems call it.  tensors: kind of member (LATENTS, MASKED, TEXT) -> what it has to
    hold.  advance: called with the number of bytes that were read.
    """

    def __init__(
        self,
        file: "io.BufferedReader[io.FileIO]",
        path: str,
        tensors: Mapping[str, Tensors],
        index: ShardIndex | None,
        advance: Callable[[int], None],
    ) -> None:
        self.sha256 = hashlib.sha256()
        self.position = 0
        self.misfits: list[Problem] = []
        self._file = file
        self._path = path
        self._tensors = tensors
        self._index = index
        self._advance = advance
        self._not_told = 0
        self._buffer = bytearray(BLOCK)
        self._problems: list[Problem] = []
        self._texts: dict[int, str] = {}  # row -> name, as the tar has them: of the member, or in its sample's JSON

    def check(self) -> list[Problem]:
        """Read to the end. Returns the problems, without the misfits."""
        if self._index is None:
            self._follow_headers()
        else:
            self._follow_index(self._index)
        while self._read(_READ_AHEAD):  # what stands after damage, and a longer file's end: for the sum of the whole
            pass
        self._advance(self._not_told)
        return self._problems

    def _read(self, size: int) -> memoryview:
        """The next `size` bytes, fewer at the end of the file. Good until the next call."""
        if size > len(self._buffer):
            self._buffer = bytearray(size)
        view = memoryview(self._buffer)[:size]
        count = 0
        while count < size and (more := self._file.readinto(view[count:])):
            count += more
        self.sha256.update(view[:count])
        self.position += count
        self._not_told += count
        if self._not_told >= _ADVANCE_BYTES:
            self._advance(self._not_told)
            self._not_told = 0
        return view[:count]

    def _note(self, member: str, what: str) -> None:
        self._problems.append(Problem(self._path, member, what))

    def _follow_headers(self) -> None:
        """Without an index: from header to header, until one is damaged."""
        name = ""
        while True:
            start = self.position
            header = bytes(self._read(BLOCK))
            if not any(header) and len(header) == BLOCK:
                self._check_end(len(header))
                return
            try:
                info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            except tarfile.HeaderError as error:
                after = f"after {name}" if name else "at the start"
                self._note("", f"no tar header at byte {start}, {after} ({error}); what follows cannot be told apart")
                return
            name = info.name
            end = self.position + padded(info.size)
            while self.position < end and self._read(min(_READ_AHEAD, end - self.position)):
                pass
            if self.position < end:
                self._note(name, f"the file ends inside it, at byte {self.position}")
                return

    def _follow_index(self, index: ShardIndex) -> None:
        """Check every member of the index, whatever precedes it in the tar."""
        members = sorted(_members(index), key=lambda member: member.offset)
        for number, member in enumerate(members):
            start = self.position + BLOCK
            if member.offset != start or start + member.size > index.tar_bytes:
                self._note(_name_of(member), f"the index places {member.size} bytes at {member.offset}, not at {start}")
                return
            header = bytes(self._read(BLOCK))
            if len(header) < BLOCK:
                where = "inside its header" if header else "before its header"
                self._note_cut(member, where, members[number + 1 :], index)
                return
            name = self._check_header(header, member)
            data = self._read(padded(member.size))
            if len(data) < member.size:
                self._note_cut(member, "inside it", members[number + 1 :], index)
                return
            body, padding = data[: member.size], data[member.size :]
            if xxhash.xxh3_64_intdigest(body) != member.xxh3:
                self._note(name, f"does not match its checksum{_use_of(member, index)}")
            elif member.kind == "meta":
                self._check_meta(name, bytes(body), member.row, index)
            elif member.kind in self._tensors:
                self._check_tensors(name, body, self._tensors[member.kind])
            if any(padding):
                self._note(name, "the padding after it is not zero")
        self._check_end(0)

    def _note_cut(self, member: _Member, where: str, rest: list[_Member], index: ShardIndex) -> None:
        lost = f"; {len(rest)} more members are lost with it" if rest else ""
        self._note(_name_of(member), f"the file ends {where}, at byte {self.position}{_use_of(member, index)}{lost}")

    def _check_header(self, header: bytes, member: _Member) -> str:
        """Record the problems of a member's tar header. Returns the member's name."""
        should = _name_of(member)
        if not any(header):
            self._note(should, "its tar header is all zeros: other readers take it for the end of the tar")
            return should
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            self._note(should, f"its tar header is damaged ({error})")
            return should
        if member.name is None:
            self._texts[member.row] = info.name.partition(".")[0]
            should = info.name
        if (info.name, info.size, info.isreg()) != (should, member.size, True):
            said = f"its tar header says {info.name}, {info.size} bytes"
            self._note(should, f"{said}; the index {should}, {member.size}")
        return should

    def _check_tensors(self, name: str, body: memoryview, should: Tensors) -> None:
        try:
            _, entries = parse_header(body)
        except ValueError as error:
            self.misfits.append(Problem(self._path, name, f"no safetensors header ({error})"))
            return
        found = {tensor: (entry["dtype"], entry["shape"]) for tensor, entry in entries.items()}
        if found != should:
            self.misfits.append(Problem(self._path, name, f"holds {found}, the manifest says {dict(should)}"))

    def _check_meta(self, name: str, body: bytes, row: int, index: ShardIndex) -> None:
        """A sample's JSON against what the index says of the sample."""
        try:
            meta = json.loads(body)
            found = (meta["text"], meta["tokens"], np.float32(meta["hole_fractions"]).tolist())
        except (ValueError, KeyError, TypeError) as error:
            self._note(name, f"no JSON of a sample ({error})")
            return
        text_row = int(index.text_row[row])
        if index.format_version > 1:
            self._texts.setdefault(text_row, found[0])
        text = self._texts.get(text_row)
        should = (text, int(index.tokens[row]), index.hole_fraction[row].tolist())
        if text is not None and found != should:
            self._note(name, f"says text, tokens and hole fractions are {found}, the index {should}")

    def _check_end(self, zeros: int) -> None:
        """Two blocks of zeros or more, and nothing after them. zeros: bytes of them that were read already."""
        start = self.position - zeros
        while data := self._read(_READ_AHEAD):
            if any(data):
                self._note("", f"something stands after its end, at byte {start + zeros}")
                return
            zeros += len(data)
        if zeros < 2 * BLOCK:
            self._note("", f"the file ends at byte {self.position}, without the two blocks that end a tar")


def _members(index: ShardIndex) -> Iterator[_Member]:
    """Every member that an index knows."""
    names = _text_names(index)
    for row, (offset, size) in enumerate(index.texts.tolist()):
        yield _Member(TEXT, names.get(row), row, offset, size, int(index.texts_xxh3[row]))
    for row, key in enumerate(index.keys):
        offset, size = index.latents[row].tolist()
        name = f"{key}.{TEXT_SUFFIX}"
        if index.format_version > 1 and names.get(int(index.text_row[row])) != name:
            start = offset - BLOCK - padded(len(NO_TEXT))
            yield _Member("no text", name, row, start, len(NO_TEXT), xxhash.xxh3_64_intdigest(NO_TEXT))
        yield _Member(LATENTS, f"{key}.safetensors", row, offset, size, int(index.latents_xxh3[row]))
        for variant, (offset, size) in enumerate(index.masked[row].tolist()):
            xxh3 = int(index.masked_xxh3[row, variant])
            yield _Member(MASKED, f"{key}.m{variant}.safetensors", row, offset, size, xxh3)
        offset, size = index.metas[row].tolist()
        yield _Member("meta", f"{key}.json", row, offset, size, int(index.metas_xxh3[row]))


def _text_names(index: ShardIndex) -> dict[int, str]:
    """Row of a text -> name of its member: with the first sample that has it. None in format 1."""
    if index.format_version == 1:
        return {}
    texts, first = np.unique(index.text_row, return_index=True)
    return {text: f"{index.keys[row]}.{TEXT_SUFFIX}" for text, row in zip(texts.tolist(), first.tolist(), strict=True)}


def _name_of(member: _Member) -> str:
    return member.name or f"text {member.row}"


def _use_of(member: _Member, index: ShardIndex) -> str:
    """Whose text a text member is: that many samples are lost with it."""
    if member.kind != TEXT:
        return ""
    rows = np.flatnonzero(index.text_row == member.row)
    more = ", ..." if len(rows) > 2 else ""
    return f" (the text of {len(rows)} samples, {', '.join(index.keys[row] for row in rows[:2])}{more})"
