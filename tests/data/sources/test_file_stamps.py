import os
import time
from types import SimpleNamespace

import pytest

from configs.errors import InputError
from data.sources.file_stamps import outwait_the_clock, stamp_of


def test_a_file_written_again_has_another_stamp_even_of_the_same_size(tmp_path):
    path = tmp_path / "a.png"
    stamps = set()
    for number in range(5):
        path.write_bytes(bytes([number]))
        outwait_the_clock([str(path)])
        stamps.add(stamp_of(str(path)))
        assert stamp_of(str(path)) in stamps, "it changes by itself"
    assert len(stamps) == 5


@pytest.mark.fault(19, "a file's time set back")
def test_a_file_whose_time_was_set_back_has_another_stamp(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"1")
    outwait_the_clock([str(path)])
    before, status = stamp_of(str(path)), path.stat()
    path.write_bytes(b"2")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert stamp_of(str(path)) != before


def test_a_file_that_is_gone_has_a_stamp_too(tmp_path):
    assert stamp_of(str(tmp_path / "gone.png")) == "gone"


def test_old_files_are_not_waited_for(tmp_path, monkeypatch):
    clock = SimpleNamespace(time=time.time, sleep=lambda seconds: pytest.fail("it waits"))
    monkeypatch.setattr("data.sources.file_stamps.time", clock)
    outwait_the_clock([str(tmp_path / "gone.png"), __file__])


def test_objects_are_stamped_by_what_their_storage_says(tmp_path, serve_folder, no_waits):
    (tmp_path / "a.png").write_bytes(b"1")
    url, _ = serve_folder(tmp_path)
    before = stamp_of(f"{url}/a.png")
    assert stamp_of(f"{url}/a.png") == before
    (tmp_path / "a.png").write_bytes(b"22")
    assert stamp_of(f"{url}/a.png") != before
    with pytest.raises(InputError, match="404"):
        stamp_of(f"{url}/gone.png")
