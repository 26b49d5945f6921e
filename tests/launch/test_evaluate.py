import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch.cli import app


@pytest.fixture
def seen(started: list[list[str]]) -> list[list[str]]:
    """The commands that are started, beside a run and a folder of pictures."""
    for name in ("mine",):
        Path(name).mkdir()
    return started


def test_evaluate_hands_its_options_on_and_ends_as_the_trainer_does(seen: list[list[str]]) -> None:
    arguments = ["evaluate", "runs/a", "--step", "7", "--step", "9", "--data", "mine", "--no-consistency"]
    assert CliRunner().invoke(app, arguments).exit_code == 2
    (command,) = seen
    assert command[:7] == [sys.executable, "-P", "-m", "trainer.evaluation.evaluate", "runs/a", "--step=7", "--step=9"]
    assert set(command[7:]) == {
        *("--data=mine", "--against=base", "--weights=live", "--images=64", "--no-consistency"),
    }


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["runs/b"], "RUN runs/b"),
        (["runs/a", "--data", "holdouts"], "--data"),
        (["runs/a", "--against", "bas"], "--against"),
    ],
)
def test_what_is_not_there_is_told_before_torch_is_imported(
    seen: list[list[str]], arguments: list[str], named: str
) -> None:
    result = CliRunner().invoke(app, ["evaluate", *arguments])
    assert result.exit_code == 2 and not seen
    assert named in result.output and "there is no such file or folder" in result.output
