"""Secrets planted wherever a run, its config and its environment may hold them: none comes out."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch.cli import app

PLANTED = [f"planted{number}secret0123456789" for number in range(8)]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", PLANTED[0])
    monkeypatch.setenv("NCCL_NOTE", f"https://me:{PLANTED[1]}@host/x")
    folder = tmp_path / "runs" / "try"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        f"run: {{name: try}}\nhf_token: {PLANTED[2]}\n"
        f"data: {{cache: 'https://host/cache?sig={PLANTED[3]}'}}\n# password: {PLANTED[4]}\n"
    )
    (folder / "outcome.json").write_text(f'{{"code": 1, "reason": "Bearer {PLANTED[5]} was refused", "step": null}}\n')
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 0.25}\n')
    (folder / "train.log").write_text(f"GET https://host/a.png?token={PLANTED[6]}\nWANDB_API_KEY={PLANTED[7]}\n```\n")
    return folder


def test_no_planted_secret_comes_out_and_the_rest_does(run, tmp_path):
    result = CliRunner().invoke(app, ["doctor", str(run)])
    assert result.exit_code == 0, result.output
    assert [secret for secret in PLANTED if secret in result.stdout] == []
    assert str(tmp_path) not in result.stdout and "~/runs/try" in result.stdout
    for kept in ('"loss": 0.25', "https://host/a.png", "HF_TOKEN is set", "name: try", "was refused"):
        assert kept in result.stdout


def test_it_is_written_to_a_file(run, tmp_path):
    out = tmp_path / "report.md"
    result = CliRunner().invoke(app, ["doctor", str(run), "--out", str(out)])
    assert result.exit_code == 0 and result.stdout == ""
    assert out.read_text().startswith("## Versions\n")
    result = CliRunner().invoke(app, ["doctor", "--out", "/nowhere/at/all.md"])
    assert result.exit_code == 2 and "--out /nowhere/at/all.md: cannot be written" in result.stderr


def test_bad_input_is_a_message(tmp_path):
    result = CliRunner().invoke(app, ["doctor", str(tmp_path / "nowhere")])
    assert result.exit_code == 2 and "neither a run's folder nor a config" in result.stderr
