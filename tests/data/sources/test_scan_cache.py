import errno
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from configs.errors import InputError, StorageFailed
from data.sources.scan_cache import ScanCache
from tests.other_user import as_nobody


@pytest.fixture
def results(tmp_path):
    return ScanCache(tmp_path / "cache", "cats")


def test_what_was_found_is_read_again_and_what_is_unused_is_forgotten(results):
    used, unused = results.key("a"), "0" * 32
    for key in (used, unused):
        results.write(key, [["ä", 1, None]])
    results.delete_unused()
    assert [results.read(key) for key in (used, unused)] == [[["ä", 1, None]], None]


def test_a_damaged_result_is_none(results):
    results.write("a" * 32, [[1]])
    file = results.folder / f"{'a' * 32}.json"
    file.write_text(file.read_text().replace("[1]", "[2]"))
    assert results.read("a" * 32) is None


def test_one_that_clears_up_disturbs_nobody_who_still_writes(results, monkeypatch):
    """A worker that helped to scan may be at it when another is done: what it found is only not kept."""
    other, replace = ScanCache(results.folder.parents[1], "cats"), Path.replace

    def replace_after_the_other_cleared_up(file, target):
        assert os.listdir(results.folder) == [file.name]
        other.delete_unused()
        return replace(file, target)

    monkeypatch.setattr(Path, "replace", replace_after_the_other_cleared_up)
    results.write(results.key("a"), [[1]])
    assert os.listdir(results.folder) == []


@pytest.mark.parametrize("closed", ["cache/scan/cats", "cache/scan", "cache", "."])
def test_a_cache_that_this_user_may_not_write_to_says_so_before_anything_is_read(closed):
    with TemporaryDirectory() as folder:  # where any user may go, as pytest's folders are root's alone
        place = Path(folder, closed)
        place.mkdir(parents=True, exist_ok=True)
        for path in (Path(folder), *Path(folder).rglob("*")):
            path.chmod(0o555)
        cache = Path(folder, "cache")
        told = rf"^{place}: cannot be written to \(Permission denied\)\. .*an online run too, .* data\.cache {cache}: "
        with as_nobody(), pytest.raises(InputError, match=told + ".*data.mode=cached data.preprocess=never"):
            ScanCache(cache, "cats")


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "scan").write_text("in the way")
    with pytest.raises(InputError, match=r"scan/cats: cannot be written to \(Not a directory\)\. .*point data\.cache"):
        ScanCache(tmp_path, "cats")


def test_a_disk_that_failed_is_not_told_as_a_folder_of_another_user(results, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("data.sources.scan_cache.write_text_atomically", fail)
    with pytest.raises(StorageFailed, match=r"cannot be written to \(Input/output error\)\.$"):
        results.write("a" * 32, [[1]])


def test_what_can_no_longer_be_written_is_named(results):
    results.write("a" * 32, [[1]])
    (results.folder / f"{'b' * 32}.json").mkdir()
    with pytest.raises(InputError, match=rf"{'b' * 32}\.json: cannot be written to \(Is a directory\)"):
        results.write("b" * 32, [[1]])
