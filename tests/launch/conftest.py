import subprocess
from pathlib import Path

import pytest


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
