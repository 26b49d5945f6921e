from pathlib import Path

import pytest

from configs.errors import InputError
from launch.quickstart.folder import WRITTEN, compare_folder, write_folder

OLD = {"run.yaml": "lr: 1\n", "start.sh": "echo old\n"}
NEW = {"run.yaml": "lr: 2\n", "start.sh": "echo old\n"}


def write(folder: Path, texts: dict[str, str], *, force: bool = False) -> list[str]:
    return write_folder(folder, compare_folder(folder, texts), executable=["start.sh"], force=force)


def found(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.name != WRITTEN}


def test_files_are_written_once_and_again_when_their_text_is_another(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    assert write(folder, OLD) == ["run.yaml", "start.sh"]
    assert write(folder, OLD) == []
    assert write(folder, NEW) == ["run.yaml"]
    assert write(folder, OLD) == ["run.yaml"]
    assert found(folder) == OLD


def test_an_edited_file_is_in_conflict_with_a_newer_text_alone(tmp_path: Path) -> None:
    write(tmp_path, OLD)
    (tmp_path / "run.yaml").write_text("lr: mine\n")
    same, newer = compare_folder(tmp_path, OLD), compare_folder(tmp_path, NEW)
    assert same.edited == newer.edited == {"run.yaml": "lr: mine\n"}
    assert same.in_conflict == [] and newer.in_conflict == ["run.yaml"]
    assert write(tmp_path, NEW) == []
    assert found(tmp_path)["run.yaml"] == "lr: mine\n"
    assert compare_folder(tmp_path, NEW).in_conflict == ["run.yaml"], "asked twice, and overwritten the second time"
    assert write(tmp_path, NEW, force=True) == ["run.yaml"]
    assert found(tmp_path) == NEW and compare_folder(tmp_path, OLD).edited == {}


def test_a_file_that_was_there_before_is_an_edited_one(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("not ours\n")
    assert compare_folder(tmp_path, OLD).in_conflict == ["run.yaml"]


def test_an_edit_that_comes_to_the_new_text_is_none(tmp_path: Path) -> None:
    write(tmp_path, OLD)
    (tmp_path / "run.yaml").write_text(NEW["run.yaml"])
    assert compare_folder(tmp_path, NEW).edited == {}


def test_files_are_not_taken_for_edited_after_a_run_that_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, OLD)
    comparison = compare_folder(tmp_path, NEW)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("launch.quickstart.folder.write_bytes_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            write_folder(tmp_path, comparison, executable=[], force=False)
    assert found(tmp_path) == OLD and compare_folder(tmp_path, NEW).edited == {}
    (tmp_path / "run.yaml").write_text(NEW["run.yaml"])  # or killed right after this file
    assert compare_folder(tmp_path, OLD).edited == {}


def test_scripts_may_be_run_by_whoever_may_read_them(tmp_path: Path) -> None:
    write(tmp_path, OLD)
    assert (tmp_path / "start.sh").stat().st_mode & 0o111 == (tmp_path / "run.yaml").stat().st_mode >> 2 & 0o111
    assert (tmp_path / "run.yaml").stat().st_mode & 0o111 == 0


def test_a_folder_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="Give another --out"):
            write(folder, OLD)
    (tmp_path / "run.yaml").mkdir()
    with pytest.raises(InputError, match=r"run\.yaml: cannot be read \(Is a directory\)"):
        write(tmp_path, OLD)


@pytest.mark.parametrize("text", ["{", "[]", '{"written": 3}', "{}"])
def test_a_damaged_list_of_what_was_written_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / WRITTEN).write_text(text)
    with pytest.raises(InputError, match="Delete it; every file that differs is then taken for an edited one"):
        compare_folder(tmp_path, OLD)
