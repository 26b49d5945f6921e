import re
import sys

from typer.testing import CliRunner

from launch.cli import app


def test_export_hands_its_options_on_and_ends_as_the_trainer_does(started: list[list[str]]) -> None:
    arguments = ["export", "runs/a", "--out", "b", "--weights", "ema", "--dtype", "bf16", "--step", "best"]
    arguments += ["--base", "models/fill"]
    assert CliRunner().invoke(app, arguments).exit_code == 2
    module = [sys.executable, "-P", "-m", "trainer.export.from_checkpoint"]
    given = ["--format=diffusers", "--weights=ema", "--step=best", "--dtype=bf16", "--base=models/fill"]
    assert started == [[*module, "runs/a", "--out", "b", *given]]
    assert CliRunner().invoke(app, ["export", "runs/a"]).exit_code == 2  # --out is missing
    assert CliRunner().invoke(app, ["export", "runs/a", "--out", "b", "--weights", "mean"]).exit_code == 2
    missing = CliRunner().invoke(app, ["export", "runs/b", "--out", "b"])
    assert missing.exit_code == 2 and "CHECKPOINT_OR_RUN runs/b: there is no such" in missing.output
    assert len(started) == 1


def test_the_help_says_which_file_suits_which_program() -> None:
    """Each of the formats that it takes, and each program."""
    shown = CliRunner().invoke(app, ["export", "--help"], env={"COLUMNS": "80"}).output
    table = shown.partition("--format ")[2].partition("Example:")[0]
    formats = ("diffusers", "comfyui", "bfl", "onefile", "merged", "peft", "kohya")
    rows = [line.split()[0] for line in table.splitlines()[1:] if re.match(r"  \w", line)]
    assert sorted(rows) == sorted(formats)
    assert f"<{'|'.join(formats)}>" in shown
    assert all(name in table for name in ("ComfyUI", "OneTrainer", "ai-toolkit", "sd-scripts", "LyCORIS", "BFL"))
