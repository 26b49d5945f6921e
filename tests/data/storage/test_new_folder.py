import errno
import json
import multiprocessing
import os
import signal
import socket
from pathlib import Path

import pytest

import data.storage.new_folder as module
from configs.errors import InputError
from data.storage.disk_full import DiskFull
from data.storage.new_folder import clear, new_folder


def write(folder: Path, name: str) -> None:
    with new_folder(folder) as inside:
        (inside / name).touch()


def test_a_second_one_is_refused_while_the_first_is_written_and_told_by_whom(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "first").touch()
        words = rf"process {os.getpid()} on {socket.gethostname()} is writing it, as out\.part\. "
        with pytest.raises(InputError, match=words):
            write(tmp_path / "out", "second")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "first"]


def write_and_die(folder: Path) -> None:
    with new_folder(folder) as inside:
        (inside / "half").touch()
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.fault(25, "kill -9 of an export")
def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=write_and_die, args=(tmp_path / "out",))
    process.start()
    process.join()
    assert (tmp_path / "out.part" / "half").exists()
    write(tmp_path / "out", "whole")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "whole"]


def test_one_that_another_has_begun_meanwhile_is_not_taken_for_what_was_left(tmp_path, monkeypatch):
    """Both have seen what a killed one left, and the other was quicker."""
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "half").touch()
    remove, others = module._remove_left, []

    def remove_late(folder, writer):
        if not others:
            others.append(new_folder(tmp_path / "out"))
            (others[0].__enter__() / "whole").touch()
        remove(folder, writer)

    monkeypatch.setattr("data.storage.new_folder._remove_left", remove_late)
    with pytest.raises(InputError, match="is writing it"):
        write(tmp_path / "out", "second")
    others[0].__exit__(None, None, None)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "whole"]


def test_of_another_machine_nobody_knows_whether_it_still_writes(tmp_path):
    part = tmp_path / "out.part"
    with new_folder(tmp_path / "other"):
        writer = json.loads((tmp_path / "other.part" / ".writer.json").read_text())
    part.mkdir()
    (part / ".writer.json").write_text(json.dumps(writer | {"host": "n02", "place": "elsewhere", "pid": 7}))
    with pytest.raises(InputError, match=r"process 7 on n02 .* If it does not run any more, remove that folder"):
        write(tmp_path / "out", "file")
    with new_folder(tmp_path / "out", replace=True):  # a run's own: its folder has one owner
        pass
    assert not part.exists()


def test_a_name_that_was_taken_meanwhile_is_left_as_it_is(tmp_path):
    def write_late():
        with new_folder(tmp_path / "out"):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "another's").touch()

    with pytest.raises(InputError, match="is there already, made meanwhile"):
        write_late()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "another's"]


def test_it_has_its_name_when_it_is_whole_whatever_an_earlier_try_left(tmp_path):
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "of a killed one").touch()
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").touch()
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "file"]


@pytest.mark.parametrize("error", [RuntimeError("other"), KeyboardInterrupt(), OSError(errno.EIO, "disk")])
def test_after_an_error_nothing_is_left(tmp_path, error):
    def fail():
        with new_folder(tmp_path / "out") as folder:
            (folder / "file").touch()
            raise error

    with pytest.raises(type(error)) as told:
        fail()
    assert told.value is error and list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_and_nothing_is_left(tmp_path):
    words = r"out: cannot be written .*run the same command again: nothing is left of it\.$"
    with pytest.raises(DiskFull, match=words), new_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_one_that_is_there_and_a_place_that_cannot_be_are_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--out .*file: is there already"), new_folder(tmp_path / "file"):
        pass
    with pytest.raises(InputError, match=r"--out .*: cannot be made \(Not a directory\)"):  # noqa: SIM117
        with new_folder(tmp_path / "file" / "out"):
            pass


def test_one_that_is_to_be_replaced_stays_until_the_new_one_is_whole(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with new_folder(tmp_path / "out", replace=True) as folder:
        (folder / "new").touch()
        assert (tmp_path / "out" / "old").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]


def test_a_try_can_be_cleared_for_another(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "part").mkdir()
        (folder / "part" / "half").touch()
        (folder / "file").touch()
        clear(folder)
        with pytest.raises(InputError, match="is writing it"):  # still by this process
            write(tmp_path / "out", "second")
        (folder / "whole").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "whole"]
