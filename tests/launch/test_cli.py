import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from configs.loading import json_schema
from launch import command as launch_command
from launch.cli import app

RECIPE = str(launch_command.REPO_ROOT / "configs" / "fill_lora.yaml")


@pytest.mark.parametrize("command", ["schema", "preprocess", "train", "export"])
def test_help_of_every_command_has_an_example(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"Example: fluxfill {command}" in result.output


def test_schema_is_printed_and_written(tmp_path: Path) -> None:
    printed = CliRunner().invoke(app, ["schema"])
    assert json.loads(printed.stdout) == json_schema()
    assert CliRunner().invoke(app, ["schema", "--out", str(tmp_path / "s.json")]).exit_code == 0
    assert (tmp_path / "s.json").read_text() == printed.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["schema", "--out", "/nowhere/at/all.json"], "--out /nowhere/at/all.json: cannot be written"),
        (["train", "nowhere.yaml"], "nowhere.yaml: there is no such file"),
        (["preprocess", "nowhere.yaml"], "nowhere.yaml: there is no such file"),
        (["train", RECIPE, "train.lr=fast", "train.stps=3"], "train.stps is 3, but there is no such key"),
        (["train", RECIPE, "parallel.engine=single", "--num-processes", "2"], "--num-processes is 2"),
    ],
)
def test_bad_input_is_a_message_and_exit_code_2(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert message in result.stderr and "Traceback" not in result.output and "\x1b" not in result.output


LAUNCHER = """\
import json, os, pathlib
told = {"code": 2, "reason": "model.base /x: no such folder.", "step": None}
pathlib.Path(os.environ["FLUXFILL_OUTCOME"]).write_text(json.dumps(told))
raise RuntimeError("as accelerate ends, with a traceback")
"""


def test_train_ends_with_the_trainers_reason_and_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launch.cli.render_command", lambda *_, **__: [sys.executable, "-c", LAUNCHER])
    (tmp_path / "ended").mkdir()
    with pytest.raises(SystemExit, match="2"):
        app(["train", RECIPE, "data.mode=online", f"run.dir={tmp_path}", "run.name=ended"])
    *before, last = capfd.readouterr().err.splitlines()
    assert last.endswith("model.base /x: no such folder.")
    assert "RuntimeError: as accelerate ends, with a traceback" in before


def test_export_hands_its_options_on_and_ends_as_the_trainer_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def run(command: list[str], check: bool) -> subprocess.CompletedProcess:
        seen.append(command)
        return subprocess.CompletedProcess(command, 2)

    monkeypatch.setattr(subprocess, "run", run)
    arguments = ["export", "runs/a", "--out", "b", "--weights", "ema", "--dtype", "bf16"]
    assert CliRunner().invoke(app, arguments).exit_code == 2
    module = [sys.executable, "-P", "-m", "trainer.export.from_checkpoint"]
    assert seen == [[*module, "runs/a", "--out", "b", "--weights", "ema", "--dtype", "bf16"]]
    assert CliRunner().invoke(app, ["export", "runs/a"]).exit_code == 2  # --out is missing
    assert CliRunner().invoke(app, ["export", "runs/a", "--out", "b", "--weights", "mean"]).exit_code == 2
    assert len(seen) == 1


def test_train_prints_the_command_and_exits_as_the_trainer_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "main.py").write_text(
        "import json, os, sys\n"
        "os.makedirs(os.path.dirname(os.environ['FLUXFILL_OUTCOME']))\n"
        "reason = ' '.join(sys.argv[1:])\n"
        "json.dump({'code': 75, 'reason': reason, 'step': 7}, open(os.environ['FLUXFILL_OUTCOME'], 'w'))\n"
        "sys.exit(75)\n"
    )
    (tmp_path / "configs").symlink_to(launch_command.REPO_ROOT / "configs")
    monkeypatch.setattr(launch_command, "REPO_ROOT", tmp_path)
    result = CliRunner().invoke(
        app, ["train", RECIPE, f"run.dir={tmp_path}", "data.mode=online", "--num-processes", "1"]
    )
    assert result.exit_code == 75
    line = result.stdout.splitlines()[-1]
    assert "PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGUSR1,SIGUSR2" in line and "accelerate.commands.launch" in line
    assert f"FLUXFILL_OUTCOME={tmp_path}/fill-lora/outcome.json" in line
    assert f"--config {RECIPE} run.dir={tmp_path} data.mode=online (step 7)" in result.stderr


def test_preprocess_reports_a_missing_model_without_a_traceback(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["preprocess", RECIPE, f"model.base={tmp_path}", f"data.cache={tmp_path / 'cache'}"]
    )
    assert result.exit_code == 2
    assert str(tmp_path) in result.stderr and not (tmp_path / "cache").exists()


def test_command_line_starts_without_torch_from_a_folder_with_data_and_configs(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "configs").mkdir()
    code = "import sys, launch.cli; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(launch_command.REPO_ROOT)}
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=False).returncode == 0
