"""The members of a tar and their places, read strictly.

Python's tarfile and WebDataset take a damaged header for the end and say nothing: the samples behind it are gone. Here
every header's checksum is checked, every member has to lie within the file, and the end has to be marked as the format
wants it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from configs.errors import InputError

BLOCK = 512  # tar's unit: one header block per member, its data padded to whole blocks
_LONGEST_RECORD = 1 << 16  # bytes of a record that holds a name
_REGULAR = (b"0", b"\0", b"7")
_WITHOUT_DATA = (b"5", b"g")  # folders; what is said of all members (no name, no size)
_AHEAD = (b"L", b"K", b"x")  # records ahead of a header that say its name, as GNU and POSIX write them
_REFUSED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"S": "a file with gaps",
}


def padded(size: int) -> int:
    """Bytes that `size` bytes of a member take in a tar."""
    return -(-size // BLOCK) * BLOCK


class Member(NamedTuple):
    """A file in a tar: its name, and where its bytes are."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class _Ahead:
    """What records ahead of a header say of its member."""

    name: str | None = None
    size: int | None = None


def read_members(tar: Path, called: str) -> list[Member]:
    """Every file of a tar, in its order. called: the tar's name in messages.

    Raises InputError if the tar is empty, no tar, cut off anywhere or damaged in a header, or if a member is a link, a
    device, or has a name that leads elsewhere.
    """
    try:
        with tar.open("rb") as file:
            return _read_all(file, tar.stat().st_size, called)
    except FileNotFoundError:
        raise InputError(f"{called}: no such tar. Restore it, or correct data.datasets.*.tars.") from None
    except OSError as error:
        raise InputError(
            f"{called}: cannot be read ({error.strerror}). Restore the file or its permissions."
        ) from error


def _read_all(file: BinaryIO, size: int, called: str) -> list[Member]:
    if not size:
        raise InputError(f"{called}: an empty file, no tar. Fetch or write the tar again.")
    members: list[Member] = []
    offset, ahead = 0, _Ahead()
    while True:
        try:
            file.seek(offset)
            header = file.read(BLOCK)
            if not header.strip(b"\0"):
                _check_end(file, header)
                return members
            if len(header) < BLOCK:
                raise ValueError("cut off within a header")
            if not _sums_up(header):
                if not members:
                    raise InputError(f"{called}: no tar; it begins with {header[:24]!r}. Fetch or write the tar again.")
                raise ValueError("a damaged header")
            length = _number(header[124:136]) if ahead.size is None else ahead.size
            kind, data_offset = header[156:157], offset + BLOCK
            if length < 0:
                raise ValueError(f"a member of {length} bytes")
            if data_offset + length > size:
                raise ValueError(f"cut off within a member of {length} bytes")
            if kind in _AHEAD:
                if length > _LONGEST_RECORD:
                    raise ValueError(f"a name in {length} bytes")
                ahead = _read_ahead(kind, file.read(length), ahead)
            else:
                name, ahead = ahead.name or _name(header), _Ahead()
                if kind in _REGULAR:
                    members.append(Member(_checked(name, called), data_offset, length))
                elif kind not in _WITHOUT_DATA:
                    what = _REFUSED.get(kind, f"of the unknown kind {kind!r}")
                    raise InputError(f"{called}: the member {name!a} is {what}. Write the tar with plain files alone.")
            offset = data_offset + padded(length)
        except ValueError as error:
            behind = f" behind {members[-1].name}" if members else ""
            raise InputError(
                f"{called}: {error}, at byte {offset}{behind}; {len(members)} members are whole. "
                "Fetch or write the tar again."
            ) from error


def _checked(name: str, called: str) -> str:
    if name.startswith("/") or ".." in name.split("/"):
        raise InputError(f"{called}: the member {name!a} leads out of the tar. Do not use this tar.")
    return name


def _check_end(file: BinaryIO, header: bytes) -> None:
    """The end is two blocks of zeros, and nothing but zeros behind them."""
    second = file.read(BLOCK)
    if len(header) < BLOCK or len(second) < BLOCK:
        raise ValueError("cut off: the mark of its end is missing")
    while second:
        if second.strip(b"\0"):
            raise ValueError("zeros in the place of a header")
        second = file.read(1 << 20)


def _sums_up(header: bytes) -> bool:
    """Whether a header has the checksum that stands in it (counted with blanks in its place, signed or not)."""
    try:
        stored = _number(header[148:156])
    except ValueError:
        return False
    unsigned = sum(header) - sum(header[148:156]) + 8 * 32
    signed = unsigned - 256 * sum(byte > 127 for byte in header[:148] + header[156:])
    return stored in (unsigned, signed)


def _number(field: bytes) -> int:
    """Octal digits, or, as GNU tar writes what is too large for them, a binary number behind a set bit."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.strip(b"\0 ") or b"0", 8)


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and (prefix := header[345:500].partition(b"\0")[0]):
        name = prefix + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _read_ahead(kind: bytes, record: bytes, ahead: _Ahead) -> _Ahead:
    """The name (GNU: the whole record; POSIX: its `path`) and the size of the member that comes next."""
    if kind == b"K":  # a link's target
        return ahead
    if kind == b"L":
        return _Ahead(record.rstrip(b"\0").decode("utf-8", "surrogateescape"), ahead.size)
    name, size = ahead.name, ahead.size
    while record:
        length = int(record.partition(b" ")[0])  # of the whole entry: "25 path=a/b/c.target.png\n"
        whole, entry, record = length <= len(record), record[:length], record[length:]
        key, separator, value = entry.partition(b" ")[2].removesuffix(b"\n").partition(b"=")
        if not whole or not separator:
            raise ValueError("a damaged record of a name")
        if key == b"path":
            name = value.decode("utf-8", "surrogateescape")
        elif key == b"size":
            size = int(value)
    return _Ahead(name, size)
