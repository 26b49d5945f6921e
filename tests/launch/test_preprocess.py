from pathlib import Path

from typer.testing import CliRunner

from launch import command as launch_command
from launch.cli import app

RECIPE = str(launch_command.REPO_ROOT / "configs" / "fill_lora.yaml")


def test_preprocess_reports_a_missing_model_without_a_traceback(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["preprocess", RECIPE, f"model.base={tmp_path}", f"data.cache={tmp_path / 'cache'}"]
    )
    assert result.exit_code == 2
    assert str(tmp_path) in result.stderr and not (tmp_path / "cache").exists()
