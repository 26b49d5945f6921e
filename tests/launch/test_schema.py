import json
from pathlib import Path

from typer.testing import CliRunner

from configs.loading import json_schema
from launch.cli import app


def test_schema_is_printed_and_written(tmp_path: Path) -> None:
    printed = CliRunner().invoke(app, ["schema"])
    assert json.loads(printed.stdout) == json_schema()
    assert CliRunner().invoke(app, ["schema", "--out", str(tmp_path / "s.json")]).exit_code == 0
    assert (tmp_path / "s.json").read_text() == printed.stdout
