import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch.cli import app


@pytest.fixture
def seen(started: list[list[str]]) -> list[list[str]]:
    """The commands that are started, beside a run, a picture and a mask."""
    for name in ("p.png", "m.png"):
        Path(name).mkdir()
    return started


def test_fill_hands_its_options_on_and_ends_as_the_trainer_does(seen: list[list[str]]) -> None:
    arguments = [
        "fill",
        "runs/a",
        "--image",
        "p.png",
        "--mask",
        "m.png",
        "--prompt=-a sofa",
        "--step",
        "7",
        "--out",
        "o",
    ]
    assert CliRunner().invoke(app, arguments).exit_code == 2
    (command,) = seen
    assert command[:5] == [sys.executable, "-P", "-m", "trainer.evaluation.fill", "runs/a"]
    assert set(command[5:]) == {
        *("--image=p.png", "--mask=m.png", "--prompt=-a sofa", "--step=7", "--out=o"),
        *("--weights=live", "--feather=8.0"),
    }


def test_a_mask_must_be_given(seen: list[list[str]]) -> None:
    assert CliRunner().invoke(app, ["fill", "runs/a", "--image", "p.png"]).exit_code == 2
    assert not seen


def test_all_that_is_not_there_is_told_before_torch_is_imported(seen: list[list[str]]) -> None:
    result = CliRunner().invoke(app, ["fill", "runs/b", "--image", "p.png", "--mask", "n.png"])
    assert result.exit_code == 2 and not seen
    assert "RUN_OR_EXPORT runs/b: there is no such" in result.output and "--mask n.png" in result.output
    assert "--image" not in result.output
