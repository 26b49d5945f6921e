import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from configs.errors import InputError, StorageFailed
from data.storage.checkpoint_folders import COMPLETE, checkpoint_folder, complete_checkpoints, step_of
from trainer.checkpoints.folders import (
    MANIFEST,
    find_damage,
    latest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)

ROOT = Path(__file__).parents[3]
FILES = {"weights.safetensors": b"w" * 5000, "state.json": b'{"step": 3}', "adapter/adapter.safetensors": b"a" * 100}


def write(folder: Path) -> None:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def names(folders: list[Path]) -> list[int]:
    return [step_of(folder) for folder in folders]


@pytest.fixture(autouse=True)
def heard(caplog, monkeypatch):
    """What the run says, as its log has it."""
    monkeypatch.setattr(logging.getLogger("fluxfill"), "propagate", True)
    caplog.set_level(logging.INFO, logger="fluxfill")
    return caplog


def test_a_saved_checkpoint_is_the_latest_and_whole(tmp_path, heard):
    for step in (3, 20, 100):
        folder = save_checkpoint(tmp_path, step, write)
        assert find_damage(folder) is None
    assert latest_checkpoint(tmp_path) == folder == tmp_path / "checkpoints" / "step-00000100"
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    assert not heard.records


def test_a_run_without_checkpoints_has_no_latest(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert complete_checkpoints(tmp_path) == []
    (tmp_path / "checkpoints").mkdir()
    assert latest_checkpoint(tmp_path) is None


@pytest.mark.fault(19, "an old checkpoint's time set to now")
def test_order_is_that_of_the_step_not_of_time_or_name(tmp_path):
    for step in (5, 99_999_999, 100_000_000):
        save_checkpoint(tmp_path, step, write)
    os.utime(tmp_path / "checkpoints" / "step-00000005")
    assert names(complete_checkpoints(tmp_path)) == [5, 99_999_999, 100_000_000]


def test_other_folders_are_no_checkpoints(tmp_path):
    save_checkpoint(tmp_path, 1, write)
    for name in ("step-2", "step-00000002.old", "best", "step-abcdefgh"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / COMPLETE).touch()
    assert names(complete_checkpoints(tmp_path)) == [1]
    prune_checkpoints(tmp_path, keep_last=1)
    assert (tmp_path / "checkpoints" / "best").is_dir()
    with pytest.raises(InputError, match="not a checkpoint folder"):
        step_of(tmp_path / "best")


def test_the_marker_comes_last(tmp_path, monkeypatch):
    import trainer.checkpoints.folders as checkpoint

    seen = []
    real = checkpoint.write_text_atomically

    def watched(path, text):
        seen.append((path.name, sorted(p.relative_to(path.parent).as_posix() for p in path.parent.rglob("*"))))
        real(path, text)

    monkeypatch.setattr(checkpoint, "write_text_atomically", watched)
    save_checkpoint(tmp_path, 1, write)
    assert seen == [(MANIFEST, sorted([*FILES, "adapter"])), (COMPLETE, sorted([*FILES, "adapter", MANIFEST]))]


def test_hashes_given_by_write_are_taken_for_its_files(tmp_path):
    """Ranks hash what they wrote themselves; rank 0 does not read it again. A wrong one shows on reading."""
    right = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"

    def write_and_hash(folder: Path) -> dict[str, str]:
        (folder / "rank-0").write_bytes(b"test")
        return {"rank-0": right}

    assert find_damage(save_checkpoint(tmp_path, 1, write_and_hash)) is None
    right = "0" * 64
    assert "rank-0" in find_damage(save_checkpoint(tmp_path, 2, write_and_hash))


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.fault(11, "a bit of any file flipped")
@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("bit", [0, 3, 7])
def test_a_flipped_bit_in_any_file_is_found_and_told(tmp_path, heard, name, bit):
    save_checkpoint(tmp_path, 1, write)
    folder = save_checkpoint(tmp_path, 2, write)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1 << bit
    (folder / name).write_bytes(content)

    assert step_of(latest_checkpoint(tmp_path)) == 1
    assert [record.levelname for record in heard.records] == ["WARNING"]
    assert "step-00000002 is damaged" in heard.text and "before it" in heard.text


@pytest.mark.fault(11, "a file cut or removed")
@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("how", ["missing", "empty", "cut"])
def test_a_file_that_is_missing_or_cut_is_found(tmp_path, name, how):
    folder = save_checkpoint(tmp_path, 1, write)
    if how == "missing":
        (folder / name).unlink()
    else:
        os.truncate(folder / name, 0 if how == "empty" else (folder / name).stat().st_size - 1)
    damage = find_damage(folder)
    assert damage is not None
    if how == "missing":
        assert damage == f"{name} is missing"
    assert latest_checkpoint(tmp_path) is None


@pytest.mark.fault(8, "a checkpoint whose storage does not answer, which is no damage")
@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("error", [errno.EIO, errno.ETIMEDOUT, errno.ESTALE, errno.EACCES])
def test_storage_that_does_not_answer_is_no_damage(tmp_path, monkeypatch, name, error):
    monkeypatch.setattr("data.storage.retry.FIRST_WAIT_SECONDS", 0.0)
    folder = save_checkpoint(tmp_path, 1, write)
    opened, tries = Path.open, []

    def fail(path, *arguments, **options):
        if path == folder / name:
            tries.append(path)
            if len(tries) <= failures:
                raise OSError(error, os.strerror(error))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", fail)
    failures = 2
    assert find_damage(folder) is None and len(tries) == 3
    failures = 1000
    with pytest.raises(
        StorageFailed, match=rf"{folder / name}: failed 4 time\(s\), at last with .*{os.strerror(error)}"
    ):
        latest_checkpoint(tmp_path)


@pytest.mark.fault(11, "all checkpoints damaged")
def test_all_damaged_checkpoints_are_told(tmp_path, heard):
    for step in (1, 2, 3):
        folder = save_checkpoint(tmp_path, step, write)
        if step > 1:
            (folder / "state.json").write_text("{}")
    assert step_of(latest_checkpoint(tmp_path)) == 1
    assert [step in heard.text for step in ("step-00000002", "step-00000003")] == [True, True]


def test_a_half_written_folder_is_passed_over(tmp_path):
    save_checkpoint(tmp_path, 1, write)
    folder = save_checkpoint(tmp_path, 2, write)
    (folder / COMPLETE).unlink()
    assert step_of(latest_checkpoint(tmp_path)) == 1


# --- a save that fails ------------------------------------------------------------------------------------------------


def full_disk(folder: Path) -> None:
    (folder / "weights.safetensors").write_bytes(b"half")
    raise OSError(28, "No space left on device")


def test_a_failing_save_leaves_the_others_whole_and_can_be_repeated(tmp_path):
    save_checkpoint(tmp_path, 1, write)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, 2, full_disk)
    assert step_of(latest_checkpoint(tmp_path)) == 1
    assert step_of(save_checkpoint(tmp_path, 2, write)) == 2
    assert latest_checkpoint(tmp_path).joinpath("weights.safetensors").read_bytes() == FILES["weights.safetensors"]


def test_a_damaged_checkpoint_is_written_anew(tmp_path):
    """A run that went on from the one before comes to the same step again."""
    folder = save_checkpoint(tmp_path, 2, write)
    (folder / "state.json").write_text("{}")
    (folder / "stray").touch()
    assert save_checkpoint(tmp_path, 2, write) == folder
    assert find_damage(folder) is None
    assert not (folder / "stray").exists()


# --- going back -------------------------------------------------------------------------------------------------------


def test_a_run_that_went_back_goes_on_from_its_new_course(tmp_path, heard):
    """Started again from step 1 by choice: what the old course left must neither be resumed nor crowd out the new."""
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, write)
    save_checkpoint(tmp_path, 2, write)
    prune_checkpoints(tmp_path, keep_last=1)
    assert step_of(latest_checkpoint(tmp_path)) == 2
    assert "step-00000003: the run went back behind it; kept as step-00000003.undone" in heard.text
    save_checkpoint(tmp_path, 3, write)
    save_checkpoint(tmp_path, 2, write)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000003.undone",
        "step-00000003.undone1",
    ]


def test_pruning_to_one_never_leaves_a_damaged_checkpoint_alone(tmp_path):
    """The newest was damaged, the run went on from the one before: what it saves then is the one to keep."""
    save_checkpoint(tmp_path, 1, write)
    (save_checkpoint(tmp_path, 3, write) / "state.json").write_text("{}")
    assert step_of(latest_checkpoint(tmp_path)) == 1
    save_checkpoint(tmp_path, 2, write)
    prune_checkpoints(tmp_path, keep_last=1)
    assert step_of(latest_checkpoint(tmp_path)) == 2


# --- pruning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_last", [1, 2, 5])
def test_pruning_keeps_the_newest(tmp_path, keep_last):
    for step in range(1, 5):
        save_checkpoint(tmp_path, step, write)
    prune_checkpoints(tmp_path, keep_last=keep_last)
    assert names(complete_checkpoints(tmp_path)) == list(range(1, 5))[-keep_last:]
    assert len(list((tmp_path / "checkpoints").iterdir())) == min(4, keep_last)


def test_pruning_removes_half_written_ones_but_never_the_newest(tmp_path):
    """The newest may be one that another process is writing now."""
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, step, write)
    for step in (1, 4):
        (tmp_path / "checkpoints" / f"step-{step:08d}" / COMPLETE).unlink()
    prune_checkpoints(tmp_path, keep_last=5)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000003",
        "step-00000004",
    ]


def test_one_that_cannot_be_deleted_now_is_told_keeps_no_other_and_goes_later(tmp_path, heard, monkeypatch):
    """As on NFS, where a file that another process reads stays in its folder under another name."""
    for step in range(1, 5):
        save_checkpoint(tmp_path, step, write)
    read, remove = checkpoint_folder(tmp_path, 1), shutil.rmtree

    def leave_what_is_read(folder: Path) -> None:
        if folder == read:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(folder))
        remove(folder)

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", leave_what_is_read)
        prune_checkpoints(tmp_path, keep_last=1)
    assert f"{read}: not deleted" in heard.text and read.is_dir()
    assert names(complete_checkpoints(tmp_path)) == [4] and not checkpoint_folder(tmp_path, 2).exists()
    prune_checkpoints(tmp_path, keep_last=1)
    assert not read.exists()


def test_pruning_without_a_complete_one_removes_nothing(tmp_path):
    folder = save_checkpoint(tmp_path, 1, write)
    (folder / COMPLETE).unlink()
    prune_checkpoints(tmp_path, keep_last=1)
    assert folder.is_dir()


# --- kill -9 ----------------------------------------------------------------------------------------------------------

# A child that saves steps 1 and 2, then stops for ever at one point of saving step 3 or of pruning.
CHILD = """
import shutil, sys, time
from pathlib import Path
import trainer.checkpoints.folders as checkpoint

run, point = Path(sys.argv[1]), sys.argv[2]

def stop():
    print("here", flush=True)
    time.sleep(600)

def write(folder, stop_after=None):
    for number in range(3):
        (folder / f"file-{number}").write_bytes(b"x" * 1000)
        if number == stop_after:
            stop()

def stopping(function, condition, before=True):
    def wrapped(*args, **kwargs):
        if condition(*args):
            if not before:
                function(*args, **kwargs)
            stop()
        return function(*args, **kwargs)
    return wrapped

for step in (1, 2):
    checkpoint.save_checkpoint(run, step, write)
if point == "in write":
    checkpoint.save_checkpoint(run, 3, lambda folder: write(folder, stop_after=1))
if point == "between files":
    checkpoint.flush_and_hash = stopping(checkpoint.flush_and_hash, lambda path: path.name == "file-1")
if point == "before the manifest":
    checkpoint.write_text_atomically = stopping(
        checkpoint.write_text_atomically, lambda path, text: path.name == "manifest.json")
if point == "before the marker":
    checkpoint.write_text_atomically = stopping(
        checkpoint.write_text_atomically, lambda path, text: path.name == "COMPLETE")
if point == "after the marker":
    checkpoint.write_text_atomically = stopping(
        checkpoint.write_text_atomically, lambda path, text: path.name == "COMPLETE", before=False)
checkpoint.save_checkpoint(run, 3, write)
def half_removed(folder):
    next(path for path in folder.iterdir()).unlink()
    stop()
checkpoint.shutil.rmtree = half_removed
if point == "in pruning":
    checkpoint.prune_checkpoints(run, keep_last=1)
if point == "in replacing":
    checkpoint.save_checkpoint(run, 3, write)
"""

SURVIVORS = {
    "in write": [1, 2],
    "between files": [1, 2],
    "before the manifest": [1, 2],
    "before the marker": [1, 2],
    "after the marker": [1, 2, 3],
    "in pruning": [2, 3],
    "in replacing": [1, 2],
}


@pytest.mark.fault(10, "kill -9 of a real process in seven phases of a save")
@pytest.mark.parametrize("point, survivors", SURVIVORS.items())
def test_after_kill_9_at_any_point_the_right_one_is_picked(tmp_path, heard, point, survivors):
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(tmp_path), point]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "here\n"
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL

    complete = complete_checkpoints(tmp_path)
    assert names(complete) == survivors
    assert latest_checkpoint(tmp_path) == complete[-1]
    assert not heard.records  # nothing half-done even looks damaged

    # The next process goes on: what is half-done is in nobody's way.
    save_checkpoint(tmp_path, 3, write)
    save_checkpoint(tmp_path, 4, write)
    prune_checkpoints(tmp_path, keep_last=2)
    assert names(complete_checkpoints(tmp_path)) == [3, 4]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000003", "step-00000004"]
