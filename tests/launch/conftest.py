import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.orphans import adopt_no_orphans


@pytest.fixture(autouse=True)
def orphans_are_adopted_by_a_tests_own_supervisor_alone() -> Iterator[None]:
    yield
    adopt_no_orphans()


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that a command of fluxfill starts, in a folder that holds a run, runs/a; each ends with 2."""
    monkeypatch.chdir(tmp_path)
    Path("runs/a").mkdir(parents=True)
    commands: list[list[str]] = []

    def run(command: list[str], check: bool) -> subprocess.CompletedProcess:
        commands.append(command)
        return subprocess.CompletedProcess(command, 2)

    monkeypatch.setattr(subprocess, "run", run)
    return commands
