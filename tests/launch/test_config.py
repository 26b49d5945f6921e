from pathlib import Path

import pytest
from typer.testing import CliRunner

from configs.loading import load_config
from launch.cli import app
from tests.configs.run_file import VALID

OLD = VALID + "checkpoint: {requantize: true, keep_last: 2}\n"


@pytest.fixture
def old(tmp_path) -> Path:
    path = tmp_path / "old.yaml"
    path.write_text(OLD)
    return path


def run(*arguments: object):
    return CliRunner().invoke(app, ["config", *map(str, arguments)], env={"COLUMNS": "200"})


def test_an_old_config_loads_behind_it_and_what_changed_is_said(old):
    assert "nothing was written" in run("upgrade", old, "--dry-run").output and old.read_text() == OLD
    result = run("upgrade", old)
    assert result.exit_code == 0 and "checkpoint.requantize is gone. Remove it" in result.output
    assert load_config(old).checkpoint.keep_last == 2
    again = run("upgrade", old)
    assert again.exit_code == 0 and "is up to date" in again.output


def test_what_is_still_wrong_is_told_behind_the_changes(old):
    old.write_text(OLD.replace("keep_last: 2", "keep_lost: 2"))
    result = run("upgrade", old)
    assert result.exit_code == 2 and "checkpoint.requantize is gone" in result.output
