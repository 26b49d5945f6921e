"""CONTRIBUTING.md names files that are there: a guide to rooms that have moved is worse than none."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
TOP = ("configs", "data", "trainer", "launch", "demo", "tests", "benchmarks", "docs")


def section(title: str) -> str:
    return TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]


def missing_files(text: str) -> list[str]:
    """Paths in backticks, of our folders, at which nothing is."""
    paths = re.findall(rf"`((?:{'|'.join(TOP)})/[\w./-]*)`", text)
    return [path for path in paths if not (ROOT / path).exists()]


def test_every_file_that_is_named_is_there() -> None:
    assert missing_files("see `data/nowhere.py`, and `trainer/main.py`") == ["data/nowhere.py"]
    assert missing_files(TEXT) == []


def test_each_of_ten_changes_begins_in_one_file() -> None:
    text = section("Ten changes, and where to begin")
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 10
    for row in rows:
        assert len(re.findall(r"`[a-z]+/[\w/]+\.py`", row.split("|")[2])) == 1, row


@pytest.mark.parametrize("folder", ["data", "trainer"])
def test_the_tour_passes_through_every_room(folder: str) -> None:
    rooms = {path.parent.name for path in (ROOT / folder).glob("*/__init__.py")}
    assert {room for room in rooms if f"| `{room}/` |" not in section("Tour of the tree")} == set()
