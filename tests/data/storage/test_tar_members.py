import io
import os
import tarfile

import pytest

from configs.errors import InputError
from data.storage.tar_members import read_members

BLOCK = 512


def write_tar(path, members, **options):
    """members: name -> bytes."""
    with tarfile.open(path, "w", **options) as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


MEMBERS = {f"a/{number:03d}.png": os.urandom(300 + 400 * number) for number in range(10)}


@pytest.fixture
def tar(tmp_path):
    write_tar(tmp_path / "a.tar", MEMBERS)
    return tmp_path / "a.tar"


def contents(tar):
    data = tar.read_bytes()
    return {name: data[offset : offset + size] for name, offset, size in read_members(tar, "a.tar")}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_lie_where_they_are_said_to(tmp_path, form):
    members = MEMBERS | {"empty.txt": b"", "folder/" * 14 + "x.png": b"a name in two parts"}
    if form != tarfile.USTAR_FORMAT:
        members |= {"深/" * 40 + "長い名前.png": b"a long name", "n" * 300 + ".png": b"a longer one", "é.png": b"e"}
    write_tar(tmp_path / "a.tar", members, format=form)
    assert contents(tmp_path / "a.tar") == members
    assert list(contents(tmp_path / "a.tar")) == list(members)


def test_a_size_that_octal_digits_cannot_say_is_read(tmp_path):
    """8 GiB and more: GNU writes it in binary, POSIX in a record ahead; both as sparse files here."""
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        entry = tarfile.TarInfo("huge.bin")
        entry.size = 9 << 30
        path = tmp_path / f"{form}.tar"
        with path.open("wb") as file:
            header = entry.tobuf(format=form)
            file.write(header)
            file.truncate(len(header) + entry.size + 2 * BLOCK)
        assert [(name, size) for name, _, size in read_members(path, "a.tar")] == [("huge.bin", 9 << 30)]


def test_folders_are_passed_over(tmp_path):
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "x.png").write_bytes(b"x")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "in", "in")
    assert contents(tmp_path / "a.tar") == {"in/a/x.png": b"x"}


def header_of(tar, number):
    """Where the header of a member lies."""
    return read_members(tar, "")[number].offset - BLOCK


def cut_in_data(tar):
    os.truncate(tar, read_members(tar, "")[5].offset + 100)


def cut_in_a_header(tar):
    os.truncate(tar, header_of(tar, 5) + 100)


def cut_between_members(tar):
    os.truncate(tar, header_of(tar, 5))


def cut_in_the_end(tar):
    last = read_members(tar, "")[-1]
    os.truncate(tar, last.offset + -(-last.size // BLOCK) * BLOCK + BLOCK)


def flip_a_bit_of_a_name(tar):
    data = bytearray(tar.read_bytes())
    data[header_of(tar, 5) + 3] ^= 1
    tar.write_bytes(data)


def zero_a_header(tar):
    data = bytearray(tar.read_bytes())
    place = header_of(tar, 5)
    data[place : place + BLOCK] = bytes(BLOCK)
    tar.write_bytes(data)


def zero_two_blocks(tar):
    data = bytearray(tar.read_bytes())
    place = header_of(tar, 5)
    data[place : place + 2 * BLOCK] = bytes(2 * BLOCK)
    tar.write_bytes(data)


@pytest.mark.parametrize(
    "damage, message",
    [
        (cut_in_data, r"a\.tar: cut off within a member of 2300 bytes, at byte \d+ behind a/004\.png; 5 members are"),
        (cut_in_a_header, r"a\.tar: cut off within a header, at byte \d+ behind a/004\.png; 5 members are whole"),
        (cut_between_members, r"a\.tar: cut off: the mark of its end is missing, at byte \d+ behind a/004\.png; 5 mem"),
        (cut_in_the_end, r"a\.tar: cut off: the mark of its end is missing, at byte \d+ behind a/009\.png; 10 member"),
        (flip_a_bit_of_a_name, r"a\.tar: a damaged header, at byte \d+ behind a/004\.png; 5 members are whole\. Fetch"),
        (zero_a_header, r"a\.tar: zeros in the place of a header, at byte \d+ behind a/004\.png; 5 members are whole"),
        (zero_two_blocks, r"a\.tar: zeros in the place of a header, at byte \d+ behind a/004\.png; 5 members are whol"),
    ],
)
def test_damage_that_tarfile_is_silent_about_is_named(tar, damage, message):
    damage(tar)
    with pytest.raises(InputError, match=message):
        read_members(tar, "a.tar")


@pytest.mark.fault(6, "every bit of a header flipped")
def test_every_flipped_bit_of_a_header_is_found(tar):
    whole = tar.read_bytes()
    place = header_of(tar, 5)
    used = [offset for offset in range(BLOCK) if whole[place + offset]]
    for offset in used:
        data = bytearray(whole)
        data[place + offset] ^= 1 << offset % 7
        tar.write_bytes(data)
        with pytest.raises(InputError, match=r"a\.tar: "):
            read_members(tar, "a.tar")


@pytest.mark.fault(5, "cut at any block, also between two members or samples, as tar itself would not notice")
def test_every_cut_is_found(tar):
    """At any byte but within the zeros behind the mark of the end."""
    size = tar.stat().st_size
    last = read_members(tar, "")[-1]
    end = last.offset + -(-last.size // BLOCK) * BLOCK + 2 * BLOCK
    data = tar.read_bytes()
    for length in [*range(0, end, 97), end - 1]:
        tar.write_bytes(data[:length])
        with pytest.raises(InputError, match=r"a\.tar: "):
            read_members(tar, "a.tar")
    assert end <= size
    tar.write_bytes(data[:end])
    assert len(read_members(tar, "a.tar")) == 10


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", r"a\.tar: an empty file, no tar"),
        (b"<!DOCTYPE html><html>" + b"404 " * 300, r"a\.tar: no tar; it begins with b'<!DOCTYPE html><html>404'"),
        (b"\x1f\x8b" + bytes(range(256)) * 4, r"a\.tar: no tar; it begins with b'\\x1f\\x8b"),
        (b"short", r"a\.tar: cut off within a header"),
    ],
)
def test_what_is_no_tar_is_named(tmp_path, data, message):
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(InputError, match=message):
        read_members(tmp_path / "a.tar", "a.tar")


def test_a_missing_tar_is_named(tmp_path):
    with pytest.raises(InputError, match=r"a\.tar: no such tar\. Restore it, or correct data\.datasets\.\*\.tars"):
        read_members(tmp_path / "a.tar", "a.tar")


@pytest.mark.fault(27, "tar members with `..` and absolute names")
@pytest.mark.parametrize("name", ["../../etc/passwd.png", "/etc/passwd.png", "a/../../b.png", "..", "a/.."])
def test_a_name_that_leads_out_is_refused(tmp_path, name):
    write_tar(tmp_path / "a.tar", {"fine.png": b"x", name: b"x"})
    with pytest.raises(InputError, match=r"a\.tar: the member '.*' leads out of the tar"):
        read_members(tmp_path / "a.tar", "a.tar")


@pytest.mark.fault(27, "links and devices in a tar")
@pytest.mark.parametrize(
    "kind, message",
    [
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.FIFOTYPE, "a pipe"),
        (tarfile.GNUTYPE_SPARSE, "a file with gaps"),
        (b"V", "of the unknown kind b'V'"),
    ],
)
@pytest.mark.parametrize("target", ["/etc/passwd", "x" * 200])
def test_links_and_devices_are_refused(tmp_path, kind, message, target):
    entry = tarfile.TarInfo("cat.png")
    entry.type, entry.linkname = kind, target if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
    (tmp_path / "a.tar").write_bytes(entry.tobuf(tarfile.GNU_FORMAT) + bytes(2 * BLOCK))
    with pytest.raises(InputError, match=rf"a\.tar: the member 'cat\.png' is {message}"):
        read_members(tmp_path / "a.tar", "a.tar")


@pytest.mark.parametrize(
    "record",
    [
        b"x path=a\n",
        b"0 path=a\n",
        b"-5 path=a\n",
        b"11 path\n",
        b"99999 path=a.png",
        b"14 size=-5000\n",
        b"13 size=-512\n",
    ],
)
def test_a_damaged_record_of_a_name_is_named(tmp_path, record):
    """Not an endless loop, nor an exception of another kind."""
    ahead = tarfile.TarInfo("ahead")
    ahead.type, ahead.size = tarfile.XHDTYPE, len(record)
    data = ahead.tobuf(tarfile.USTAR_FORMAT) + record.ljust(BLOCK, b"\0")
    entry = tarfile.TarInfo("cat.png")
    entry.size = 5
    (tmp_path / "a.tar").write_bytes(data + entry.tobuf(tarfile.USTAR_FORMAT) + b"12345".ljust(3 * BLOCK, b"\0"))
    with pytest.raises(InputError, match=r"^a\.tar: "):
        read_members(tmp_path / "a.tar", "a.tar")
