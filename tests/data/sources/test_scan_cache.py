import os
from pathlib import Path

import pytest

from data.sources.scan_cache import ScanCache


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
