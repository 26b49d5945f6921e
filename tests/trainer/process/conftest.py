"""The command line of a run that is never started."""

import sys
from pathlib import Path

import pytest


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command line of a run in tmp_path, and sys.argv with it."""
    given = [
        "--config",
        str(Path(__file__).parents[3] / "configs" / "demo.yaml"),
        f"run.dir={tmp_path}",
        "run.name=test",
    ]
    monkeypatch.setattr(sys, "argv", ["main.py", *given])
    return given
