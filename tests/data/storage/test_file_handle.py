import errno
import importlib
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from data.storage import file_handle

CONTENT = bytes(number * 7 % 251 for number in range(100_000)) + b"\r\n\x1a\n" * 10


@pytest.fixture(params=["in one call", "moved first"])
def reading(request, monkeypatch):
    """The module as it is, and as it is where there is no os.preadv."""
    if request.param == "in one call":
        yield file_handle
        return
    monkeypatch.delattr(os, "preadv")
    monkeypatch.delattr(os, "pread")
    yield importlib.reload(file_handle)
    monkeypatch.undo()
    importlib.reload(file_handle)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    return path


def test_threads_read_one_handle_at_offsets_of_their_own(reading, path):
    handle = reading.FileHandle(path)

    def read(offset):
        parts = [memoryview(bytearray(size)) for size in (100, 1, 3000)]
        assert reading.read_into(handle, parts, offset) == 3101
        assert b"".join(parts) == CONTENT[offset : offset + 3101] == reading.read_at(handle, 3101, offset)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(0, 90_000, 31)))


def test_the_end_of_a_file_ends_a_reading(reading, path):
    handle = reading.FileHandle(path)
    parts = [memoryview(bytearray(30)) for _ in range(3)]
    assert reading.read_into(handle, parts, len(CONTENT) - 40) == 40
    assert b"".join(parts) == CONTENT[-40:] + bytes(50)
    assert reading.read_at(handle, 100, len(CONTENT) - 40) == CONTENT[-40:]
    assert reading.read_at(handle, 100, len(CONTENT)) == b""


def is_open_as(path, number):
    """Whether it is the descriptor of this file: another thread may be given the number of one that was closed."""
    try:
        return os.path.samestat(os.fstat(number), path.stat())
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
        return False


def test_a_handle_is_closed_with_its_last_reference(reading, path):
    handle = reading.FileHandle(path)
    number = int(handle)
    assert is_open_as(path, number)
    del handle
    assert not is_open_as(path, number)
