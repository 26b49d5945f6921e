"""The command line of a run that is never started."""

import sys
from pathlib import Path

import pytest

from tests.patience import PATIENCE
from trainer.process.last_word import _SCRIPT


@pytest.fixture
def patient_main(tmp_path: Path) -> str:
    """The path of a trainer/main.py whose ranks give the first of them all the time that it may take to speak, and the
    last word their launcher what it may take to end."""
    script = "import runpy, sys\nsys.path[0] = ROOT\nimport trainer.process.last_word, trainer.process.outcome\n"
    script += "trainer.process.outcome._MAIN_SPEAKS_FIRST_SECONDS = 200\n"
    patient = _SCRIPT.replace("[], 60)", f"[], {PATIENCE})")
    assert patient != _SCRIPT
    script += f"trainer.process.last_word._SCRIPT = {patient!r}\n"
    script += "runpy.run_path(ROOT + '/trainer/main.py', run_name='__main__')\n"
    path = tmp_path / "patient_main.py"
    path.write_text(script.replace("ROOT", repr(str(Path(__file__).parents[3]))))
    return str(path)


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
