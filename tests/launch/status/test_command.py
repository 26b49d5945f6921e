import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from launch.cli import app


def status(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["status", *words])
    return done.exit_code, done.output


def test_one_run_many_runs_and_all_below_runs(
    make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run("a", checkpoint=25)
    make_run("b", outcome={"code": 0, "reason": "done", "step": 40})
    now = time.time()
    monkeypatch.setattr("launch.status.run.time", SimpleNamespace(time=lambda: now))
    assert "40 of 4,000" in status(str(run))[1]
    assert [line.split()[:2] for line in status(str(tmp_path / "runs"))[1].splitlines()[1:]] == [
        ["a", "running"],
        ["b", "finished"],
    ]
    monkeypatch.chdir(tmp_path)
    assert status() == status("runs")
    assert [told["name"] for told in json.loads(status("--json")[1])] == ["a", "b"]


def test_a_job_is_found_by_its_id_without_slurm(
    make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run("a", job="12")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "12 on n[1-2]" in status("12")[1]
    code, output = status("13")
    assert code == 2 and "job 13: no run in runs has had it" in output


@pytest.mark.parametrize("words, told", [(["nowhere"], "no such folder"), (["."], "no run is in it")])
def test_what_is_no_run_is_said(words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, output = status(*words)
    assert code == 2 and told in output
