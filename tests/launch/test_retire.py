"""Old files are moved all or none, whenever the command is killed, and come back as they were."""

import fcntl
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from launch.cli import app
from launch.command import REPO_ROOT
from tests.other_user import as_nobody
from tests.patience import PATIENCE


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The old trainer: a file, and a folder with an executable, a link and a subfolder; beside it a run that saved."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "new" / "checkpoints" / "step-00000002").mkdir(parents=True)
    (tmp_path / "runs" / "new" / "checkpoints" / "step-00000002" / "COMPLETE").touch()
    folder = tmp_path / "old"
    (folder / "toolkit" / "deep").mkdir(parents=True)
    (folder / "process.py").write_text("train()\n")
    (folder / "toolkit" / "loader.py").write_text("#!/usr/bin/env python3\n")
    (folder / "toolkit" / "loader.py").chmod(0o750)
    (folder / "toolkit" / "latest.py").symlink_to("loader.py")
    (folder / "toolkit" / "deep" / "empty").touch()
    (folder / "toolkit" / "deep").chmod(0o700)
    os.utime(folder / "process.py", (1_000_000_000, 1_000_000_000))
    return folder


RETIRE = ["retire", "old/process.py", "old/toolkit", "--after", "runs/new", "--backup", "backup"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def state(folder: Path) -> dict[str, object]:
    """Path -> kind, mode and content of everything in a folder."""
    return {
        path.relative_to(folder).as_posix(): (
            os.readlink(path) if path.is_symlink() else (path.stat().st_mode, path.is_file() and path.read_bytes())
        )
        for path in sorted(folder.rglob("*"))
    }


def backups() -> list[Path]:
    return sorted(Path("backup").glob("20*"))


def test_files_and_folders_move_and_come_back_as_they_were(old: Path) -> None:
    before = state(old)
    assert run(*RETIRE).exit_code == 0
    assert state(old) == {}
    (backup,) = backups()
    stored = backup / "files" / str(old).lstrip("/")
    assert state(stored) == before and (stored / "process.py").stat().st_mtime == 1_000_000_000
    done = run("retire", "--undo", str(backup))
    assert done.exit_code == 0, done.stderr
    assert state(old) == before and backups() == []
    assert (old / "process.py").stat().st_mtime == 1_000_000_000


def test_a_link_moves_as_a_link(old: Path) -> None:
    (old / "link").symlink_to(old / "process.py")
    assert run("retire", "old/link", "--after", "runs/new", "--backup", "backup").exit_code == 0
    assert not (old / "link").is_symlink() and (old / "process.py").read_text() == "train()\n"


def test_a_dry_run_changes_nothing(old: Path) -> None:
    before = state(old)
    assert "would move" in run(*RETIRE, "--dry-run").stdout
    assert state(old) == before and not Path("backup").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["old/process.py", "--after", "old", "--backup", "backup"], "--after old: no complete checkpoint is there"),
        (["old/nothing.py", "--after", "runs/new", "--backup", "backup"], "there is no such file"),
        (["old", "old/process.py", "--after", "runs/new", "--backup", "backup"], "which is given too"),
        (["runs/new/checkpoints", "--after", "runs/new", "--backup", "backup"], "belongs to the run"),
        (["runs", "--after", "runs/new", "--backup", "backup"], "belongs to the run"),
        (["old", "--after", "runs/new", "--backup", "old/backup"], "belongs to the backup"),
        (
            [str(REPO_ROOT / "launch" / "cli.py"), "--after", "runs/new", "--backup", "backup"],
            "is part of fluxfill",
        ),
        ([str(REPO_ROOT), "--after", "runs/new", "--backup", "backup"], "is part of fluxfill"),
        (["old", "--after", "runs/new", "--backup", "runs/new/checkpoints/step-00000002/COMPLETE"], "is a file"),
        (["old/pipe", "--after", "runs/new", "--backup", "backup"], "is neither a file"),
        (["old", "--backup", "backup"], "Give the files, --after RUN and --backup DIR"),
        (["old", "--undo", "backup"], "give it alone"),
        (["--undo", "old"], "no backup is there"),
    ],
)
def test_what_may_not_be_moved_is_refused(old: Path, arguments: list[str], message: str) -> None:
    os.mkfifo(old / "pipe")
    before = state(old / "toolkit")
    done = run("retire", *arguments)
    assert done.exit_code == 2 and message in done.stderr
    assert state(old / "toolkit") == before and not Path("backup").exists()


@contextmanager
def unprivileged() -> Iterator[Path]:
    """A folder of a user that may not write everything, as root may; until then this process is that user's."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # TMPDIR may be in a folder that is closed to that user
        Path(name).chmod(0o777)
        with as_nobody():
            yield Path(name)


def test_a_folder_that_may_not_be_written_is_refused_before_anything_is_moved() -> None:
    with unprivileged() as place:
        (place / "run" / "checkpoints" / "step-00000002").mkdir(parents=True)
        (place / "run" / "checkpoints" / "step-00000002" / "COMPLETE").touch()
        (place / "old" / "locked").mkdir(parents=True)
        (place / "old" / "locked" / "empty").mkdir(0o555)
        (place / "old" / "locked").chmod(0o555)
        before = state(place / "old")
        command = ["retire", f"{place}/old", "--after", f"{place}/run", "--backup"]
        done = run(*command, f"{place}/backup")
        assert done.exit_code == 2 and f"{place}/old/locked: may not be written" in done.stderr
        assert state(place / "old") == before and not (place / "backup").exists()
        (place / "old" / "locked").chmod(0o755)
        done = run(*command, f"{place}/run/../old/locked/empty/backup")
        assert done.exit_code == 2 and "belongs to the backup" in done.stderr
        (place / "sealed").mkdir(0o000)
        done = run(*command, f"{place}/sealed/backup")
        assert done.exit_code == 2 and f"{place}/sealed/backup: Permission denied" in done.stderr
        assert run(*command, f"{place}/backup").exit_code == 0 and not (place / "old").exists()
        (place / "sealed").chmod(0o755)


def test_undo_overwrites_nothing(old: Path) -> None:
    run(*RETIRE)
    (old / "process.py").write_text("something newer")
    (backup,) = backups()
    done = run("retire", "--undo", str(backup))
    assert done.exit_code == 2 and "something else is there now" in done.stderr
    assert state(old).keys() == {"process.py"} and (old / "process.py").read_text() == "something newer"
    (old / "process.py").unlink()
    assert run("retire", "--undo", str(backup)).exit_code == 0


def test_undo_does_not_put_back_what_was_changed_in_the_backup(old: Path) -> None:
    run(*RETIRE)
    (backup,) = backups()
    (backup / "files" / str(old / "process.py").lstrip("/")).write_text("damaged")
    done = run("retire", "--undo", str(backup))
    assert done.exit_code == 2 and "was changed or is missing" in done.stderr and state(old) == {}


def test_a_file_that_changes_meanwhile_stays_with_all_others(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = shutil.copy2

    def change_and_copy(source: Path, target: Path) -> object:
        if source.name == "loader.py":
            source.write_text("changed")
        return copy(source, target)

    monkeypatch.setattr("shutil.copy2", change_and_copy)
    done = run(*RETIRE)
    assert done.exit_code == 2 and "Nothing was moved" in done.stderr
    assert (old / "process.py").is_file() and (old / "toolkit" / "loader.py").read_text() == "changed"
    assert backups() == []


def test_a_folder_that_gets_a_file_meanwhile_stays_with_all_others(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, copy = state(old), shutil.copy2

    def add_and_copy(source: Path, target: Path) -> object:
        (old / "toolkit" / "new.py").touch()
        return copy(source, target)

    monkeypatch.setattr("shutil.copy2", add_and_copy)
    done = run("retire", "old/toolkit", "old/process.py", *RETIRE[3:])
    assert done.exit_code == 2 and "Nothing was moved" in done.stderr
    (old / "toolkit" / "new.py").unlink()
    assert state(old) == before and backups() == []


def test_two_commands_do_not_meet_in_one_backup(old: Path) -> None:
    Path("backup").mkdir()
    handle = os.open("backup", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    done = run(*RETIRE)
    os.close(handle)
    assert done.exit_code == 2 and "another fluxfill retire is at work" in done.stderr


def test_undo_beside_a_move_that_ends_meanwhile_puts_its_files_back(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = state(old)
    run(*RETIRE)
    (backup,) = backups()
    finished = (backup / "manifest.json").read_text()
    (backup / "manifest.json").write_text(finished.replace('"retired"', '"copying"'))

    def lock_when_the_move_has_ended(handle: int) -> bool:
        (backup / "manifest.json").write_text(finished)
        return True

    monkeypatch.setattr("launch.retire.try_lock", lock_when_the_move_has_ended)
    assert run("retire", "--undo", str(backup)).exit_code == 0
    assert state(old) == before


CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.chmod", "os.symlink"}


def killed_at(nth: int, *arguments: str) -> bool:
    """Whether a command was killed right before its nth change of the disk (else it ended before)."""
    child = os.fork()
    if child == 0:
        left = nth

        def count(event: str, _: object) -> None:
            nonlocal left
            left -= event in CHANGES
            if left == 0:
                os._exit(9)

        sys.addaudithook(count)
        os._exit(run(*arguments).exit_code)
    deadline = time.monotonic() + PATIENCE
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail(f"{arguments}, to be killed at its change {nth}, hangs")
        time.sleep(0.005)
    code = os.waitstatus_to_exitcode(ended[1])
    assert code in (0, 9)
    return code == 9


def moments(*arguments: str, every: int = 1) -> Iterator[int]:
    """Kill a command at each of its moments, or every so many, until one ends by itself."""
    nth = 1
    while killed_at(nth, *arguments):
        yield nth
        nth += every
    assert nth > 10, "it was never killed"


def test_a_move_that_is_killed_is_finished_by_the_same_command(old: Path, tmp_path: Path) -> None:
    before = state(old)
    for _ in moments(*RETIRE):
        stored = [backup / "files" / str(old).lstrip("/") for backup in backups()]
        assert all(any((place / name).exists() for place in (old, *stored)) for name in before), "something is lost"
        done = run(*RETIRE)
        assert done.exit_code == 0, done.stderr
        assert state(old) == {}
        full = [backup for backup in backups() if (backup / "manifest.json").exists()]
        assert len(full) == 1
        assert run("retire", "--undo", str(full[0])).exit_code == 0
        assert state(old) == before
        shutil.rmtree("backup")


def test_an_undo_that_is_killed_is_finished_by_the_same_command(old: Path) -> None:
    before = state(old)
    run(*RETIRE)
    (backup,) = backups()
    shutil.copytree("backup", "kept", symlinks=True)
    for _ in moments("retire", "--undo", str(backup), every=2):
        if (backup / "manifest.json").exists():
            done = run("retire", "--undo", str(backup))
            assert done.exit_code == 0, done.stderr
        assert {name: found for name, found in state(old).items() if not name.endswith(".part")} == before
        shutil.rmtree(old)
        old.mkdir()
        shutil.rmtree("backup")
        shutil.copytree("kept", "backup", symlinks=True)


def test_a_killed_move_can_be_undone(old: Path) -> None:
    before = state(old)
    for _ in moments(*RETIRE, every=3):
        for backup in backups():
            if (backup / "manifest.json").exists():
                assert run("retire", "--undo", str(backup)).exit_code == 0
        assert {name: found for name, found in state(old).items() if not name.endswith(".part")} == before
        shutil.rmtree("backup", ignore_errors=True)
