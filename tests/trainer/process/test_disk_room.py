"""A disk that is full to the last byte, and what is written on it all the same."""

import json
import os
from pathlib import Path

import pytest

from data.storage.disk_full import DiskFull
from tests.data.storage.small_disk import open_small_disk
from trainer.process.disk_room import append_text, keep_room, release_room, with_room
from trainer.process.json_lines import append_line
from trainer.process.outcome import run_and_report


@pytest.fixture
def run(tmp_path):
    """The folder of a run on a disk of 16 MiB."""
    with open_small_disk(tmp_path) as disk:
        if not disk.is_real:
            pytest.skip("no disk can be mounted here")
        yield disk.folder


def fill(run: Path) -> None:
    with (run / "ballast").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)) == 4096:
                pass
        except OSError:
            pass


def test_a_line_that_does_not_fit_leaves_no_half_of_it(run):
    append_text(run / "lines", "a" * 4000 + "\n")
    fill(run)
    with pytest.raises(OSError, match="No space left"):
        append_text(run / "lines", "b" * 10**6)
    assert (run / "lines").read_text() == "a" * 4000 + "\n"


def test_the_room_that_was_kept_is_used_once_the_disk_is_full(run):
    keep_room(run)
    fill(run)
    for number in range(1000):
        append_line(run / "metrics.jsonl", {"step": number})
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1000))
    assert not (run / ".room").exists()


def test_without_room_lines_wait_until_there_is_some(run):
    fill(run)
    for number in range(3):
        append_line(run / "metrics.jsonl", {"step": number})
    with pytest.raises(DiskFull):
        with_room(run, lambda: append_text(run / "other", "x" * 5000))
    (run / "ballast").unlink()
    append_line(run / "metrics.jsonl", {"step": 3})
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]


def test_lines_that_wait_at_the_end_of_a_run_are_written_if_there_is_room_by_then(run, monkeypatch):
    monkeypatch.setenv("FLUXFILL_OUTCOME", str(run / "outcome.json"))

    def work() -> int:
        fill(run)
        append_line(run / "validation.jsonl", {"step": 4})
        assert not (run / "validation.jsonl").exists() or not (run / "validation.jsonl").read_text()
        (run / "ballast").unlink()
        return 7

    assert run_and_report(work) == 0
    assert json.loads((run / "validation.jsonl").read_text()) == {"step": 4}


def test_the_outcome_is_written_on_a_full_disk(run, monkeypatch):
    monkeypatch.setenv("FLUXFILL_OUTCOME", str(run / "outcome.json"))
    keep_room(run)
    fill(run)
    assert run_and_report(lambda: 7) == 0
    assert json.loads((run / "outcome.json").read_text())["step"] == 7


def test_the_room_is_given_back(tmp_path):
    keep_room(tmp_path)
    assert os.stat(tmp_path / ".room").st_blocks * 512 >= 2 << 20
    release_room(tmp_path)
    assert list(tmp_path.iterdir()) == []
