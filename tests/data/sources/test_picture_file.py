"""Pictures' bytes, and whose fault it is where they cannot be had."""

import errno
import os
import threading

import pytest

import data.sources.picture_file as picture_files
from configs.errors import InputError, StorageFailed
from data.sources.picture_file import PictureFile
from data.storage.retry import ATTEMPTS


@pytest.fixture
def fail_with(monkeypatch):
    """`fail_with(code, times)`: the next reads of local files fail so; returns a list of them."""
    read = picture_files._read_local

    def start(code, times):
        failed = []

        def fail(path, offset, size):
            if len(failed) < times:
                failed.append(path)
                raise OSError(code, os.strerror(code))
            return read(path, offset, size)

        monkeypatch.setattr(picture_files, "_read_local", fail)
        return failed

    return start


@pytest.fixture
def picture(tmp_path):
    (tmp_path / "a.png").write_bytes(b"bytes of a picture")
    return PictureFile(str(tmp_path / "a.png"))


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE])
def test_storage_that_fails_is_tried_again_and_is_no_fault_of_the_picture(picture, fail_with, no_waits, code):
    failed = fail_with(code, ATTEMPTS - 1)
    assert picture.read(100).data == b"bytes of a picture"
    assert len(failed) == ATTEMPTS - 1
    fail_with(code, 10**6)
    with pytest.raises(StorageFailed, match=r"a\.png: cannot be read \(.*\): failed 8 time\(s\), .* Look at the stor"):
        picture.read(100)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EISDIR, errno.ELOOP])
def test_what_is_a_files_own_fault_is_told_at_once(picture, fail_with, code):
    failed = fail_with(code, 10**6)
    with pytest.raises(InputError, match=r"a\.png: cannot be read .*Restore the file or its permissions") as caught:
        picture.read(100)
    assert not isinstance(caught.value, StorageFailed)
    assert len(failed) == 1


def test_a_missing_picture_is_one_and_a_missing_folder_is_not(picture, tmp_path, no_waits):
    with pytest.raises(InputError, match=r"b\.png: no such picture") as caught:
        PictureFile(str(tmp_path / "b.png")).read(100)
    assert not isinstance(caught.value, StorageFailed)
    with pytest.raises(StorageFailed, match=r"b\.png: cannot be read \(No such file or directory\): failed 8"):
        PictureFile(str(tmp_path / "unmounted" / "b.png")).read(100)


def test_a_stop_ends_the_waiting(picture, fail_with):
    failed, stop = fail_with(errno.EIO, 10**6), threading.Event()
    stop.set()
    with pytest.raises(StorageFailed, match=r"failed 1 time\(s\)"):
        picture.read(100, stop=stop)
    assert len(failed) == 2
