import os
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data.storage.run_lock import own_run_folder
from launch import command as launch_command
from launch.cli import app
from launch.supervise import OTHER_NODES_SECONDS, Outcome

RECIPE = str(launch_command.REPO_ROOT / "configs" / "fill_lora.yaml")

LAUNCHER = """\
import json, os, pathlib
told = {"code": 2, "reason": "model.base /x: no such folder.", "step": None}
pathlib.Path(os.environ["FLUXFILL_OUTCOME"]).write_text(json.dumps(told))
raise RuntimeError("as accelerate ends, with a traceback")
"""


def test_train_ends_with_the_trainers_reason_and_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launch.train.render_command", lambda *_, **__: [sys.executable, "-c", LAUNCHER])
    (tmp_path / "ended").mkdir()
    with pytest.raises(SystemExit, match="2"):
        app(["train", RECIPE, "data.mode=online", f"run.dir={tmp_path}", "run.name=ended"])
    *before, last = capfd.readouterr().err.splitlines()
    assert last.endswith("model.base /x: no such folder.")
    assert "RuntimeError: as accelerate ends, with a traceback" in before


def test_train_prints_the_command_and_exits_as_the_trainer_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "main.py").write_text(
        "import json, os, sys\n"
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


def test_an_encoder_on_a_gpu_that_is_not_here_ends_train_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.train.count_gpus", lambda _: 2)
    words = ["train", RECIPE, f"run.dir={tmp_path}", "data.mode=online", "--dry-run"]
    result = CliRunner().invoke(app, [*words, "data.encoder_devices=[cuda:2]"])
    assert result.exit_code == 2 and "data.encoder_devices names cuda:2" in result.stderr
    assert CliRunner().invoke(app, [*words, "data.encoder_devices=[cuda:1]"]).exit_code == 0


def test_each_of_several_machines_trains_its_part_of_the_run(tmp_path: Path) -> None:
    """Without preprocessing first: the machines would not be ready at the same time."""
    words = ["train", RECIPE, f"run.dir={tmp_path}", "--num-processes", "4", "--nodes", "2", "--node-rank", "1"]
    result = CliRunner().invoke(app, [*words, "--head", "10.0.0.1", "--port", "29500", "--dry-run"])
    assert result.exit_code == 0, result.output
    first, line = result.stdout.splitlines()
    assert first == "not preprocessed first: several machines train"
    for told in ("--num_processes 8", "--num_machines 2", "--machine_rank 1", "--main_process_ip 10.0.0.1", "ddp.yaml"):
        assert told in line


@pytest.mark.parametrize("machines, seconds", [(1, None), (2, OTHER_NODES_SECONDS)])
def test_of_several_machines_each_stops_when_another_has_failed(
    machines: int, seconds: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict = {}
    monkeypatch.setattr(
        "launch.train.run_supervised", lambda *_, **options: given.update(options) or Outcome(0, "done")
    )
    where = ["--nodes", str(machines), "--node-rank", str(machines - 1), "--port", "29500", "--num-processes", "1"]
    result = CliRunner().invoke(app, ["train", RECIPE, f"run.dir={tmp_path}", "data.mode=online", *where])
    assert result.exit_code == 0, result.output
    assert (given["stop_after_failure"], given["restarts_after"] == ()) == (seconds, machines > 1)


def test_a_port_that_none_can_be_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["train", RECIPE, f"run.dir={tmp_path}", "--port", "65536", "--dry-run"])
    assert result.exit_code == 2 and "less than or equal to 65535" in result.stderr


def test_a_run_folder_that_cannot_be_written_is_refused_before_anything_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was started")

    monkeypatch.setattr("launch.train.run_workers", refuse)
    monkeypatch.setattr("launch.train.run_supervised", refuse)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="2"):
        app(["train", RECIPE, f"run.dir={tmp_path / 'file'}"])
    assert f"run.dir {tmp_path / 'file' / 'fill-lora'}: nothing can be written in" in capfd.readouterr().err


def test_train_hands_on_where_to_go_on_from(tmp_path: Path) -> None:
    words = ["train", RECIPE, f"run.dir={tmp_path}", "data.mode=online", "--dry-run"]
    assert "--resume" not in CliRunner().invoke(app, words).stdout
    line = CliRunner().invoke(app, [*words, "--resume", "never"]).stdout.splitlines()[-1]
    assert f"--config {RECIPE} --resume never run.dir={tmp_path}" in line
    refused = CliRunner().invoke(app, [*words, "--resume", str(tmp_path / "step-00000001")])
    assert refused.exit_code == 2 and "step-00000001: no such folder. Give auto, never, or" in refused.stderr


def test_a_folder_that_is_no_checkpoint_is_refused_before_anything_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.train.run_workers", lambda *_: pytest.fail("it preprocesses"))
    monkeypatch.setattr("launch.train.run_supervised", lambda *_, **__: pytest.fail("it trains"))
    complete = tmp_path / "fill-lora" / "checkpoints" / "step-00000010"
    complete.mkdir(parents=True)
    words = ["train", RECIPE, f"run.dir={tmp_path}", "--resume"]
    for options in ([], ["--dry-run"]):
        refused = CliRunner().invoke(app, [*words, str(complete), *options])
        assert refused.exit_code == 2
        assert refused.stderr.strip() == (
            f"--resume {complete}: no checkpoint (no COMPLETE). Give auto, never, or "
            "runs/NAME/checkpoints/step-<number>"
        )
    (complete / "COMPLETE").touch()
    assert CliRunner().invoke(app, [*words, str(complete), "--dry-run"]).exit_code == 0
    refused = CliRunner().invoke(app, [*words, str(tmp_path / "fill-lora")])
    assert refused.exit_code == 2 and refused.stderr.strip().endswith(f"Give auto, never, or {complete}")


@pytest.mark.fault(23, "fluxfill train beside a run")
def test_a_second_train_ends_with_3_and_names_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it preprocesses, or runs anything."""
    monkeypatch.setattr("launch.train.run_workers", lambda *_: pytest.fail("it preprocesses"))
    monkeypatch.setattr("launch.train.run_supervised", lambda *_, **__: pytest.fail("it trains"))
    with own_run_folder(tmp_path / "fill-lora", {}, supervisor="fluxfill train"):
        before = [path.name for path in (tmp_path / "fill-lora").iterdir()]
        result = CliRunner().invoke(app, ["train", RECIPE, f"run.dir={tmp_path}", "data.mode=online"])
        assert [path.name for path in (tmp_path / "fill-lora").iterdir()] == before
    assert result.exit_code == 3
    assert f"belongs to another start of this run (fluxfill train, process {os.getpid()} on " in result.stderr


def test_the_first_machine_sends_a_notice_of_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[dict] = []
    monkeypatch.setattr("launch.train.notify_end", lambda run, **told: sent.append({"run": run, **told}))
    monkeypatch.setattr("launch.train.run_supervised", lambda *_, **__: Outcome(75, "stopped by SIGTERM", 7))
    words = ["train", RECIPE, "data.mode=online", f"run.dir={tmp_path}", "run.name=ended", "--num-processes", "1"]
    assert CliRunner().invoke(app, words).exit_code == 75
    other = ["--nodes", "2", "--node-rank", "1", "--head", "10.0.0.1", "--port", "29500"]
    assert CliRunner().invoke(app, [*words, *other]).exit_code == 75
    assert sent == [{"run": "ended", "code": 75, "reason": "stopped by SIGTERM", "step": 7}]


@pytest.mark.parametrize("code, reason", [(2, "not finished; what is wrong stands above"), (75, "stopped by SIGTERM")])
def test_preprocessing_that_fails_before_a_run_is_its_end_and_a_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, reason: str
) -> None:
    sent: list[dict] = []
    monkeypatch.setattr("launch.train.notify_end", lambda run, **told: sent.append({"run": run, **told}))
    monkeypatch.setattr("launch.train.run_workers", lambda *_: Outcome(code, reason))
    monkeypatch.setattr("launch.train.run_supervised", lambda *_, **__: pytest.fail("it trains"))
    words = ["train", RECIPE, f"data.cache={tmp_path / 'cache'}", f"run.dir={tmp_path}", "--num-processes", "1"]
    assert CliRunner().invoke(app, words).exit_code == code
    assert sent == [{"run": "fill-lora", "code": code, "reason": f"preprocessing: {reason}", "step": None}]
