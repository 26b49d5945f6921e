import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from launch.cli import app


@pytest.fixture
def config(cache, demo_config, tmp_path) -> Path:
    """A config file whose cache may be damaged."""
    shutil.copytree(cache.folder, tmp_path / "cache")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(demo_config(tmp_path / "cache").model_dump(mode="json")))
    return path


def run(*arguments: object):
    return CliRunner().invoke(app, ["shards", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.mark.parametrize("command", ["verify"])
def test_help_has_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: fluxfill shards {command}" in result.output


def test_verify_of_a_whole_cache_ends_with_0(config, tmp_path):
    for place in (tmp_path / "cache", config):
        result = run("verify", place)
        assert result.exit_code == 0, result.output
        assert f"{tmp_path / 'cache'}: all is as it was written." in result.output


def test_verify_of_a_damaged_cache_ends_with_1_and_a_table_and_repair_with_0(config, cache, tmp_path):
    bad = str(cache.table.path[0])
    tar = tmp_path / "cache" / bad
    whole = tar.read_bytes()
    tar.write_bytes(whole[:7000])
    for arguments in ((tmp_path / "cache",), (config, "--threads", 1)):
        result = run("verify", *arguments)
        assert result.exit_code == 1
        assert bad in result.output and f"7000 bytes, {len(whole)} were written" in result.output
        assert "2 problems in 1 files." in result.output
    assert tar.read_bytes() == whole[:7000]
    result = run("verify", tmp_path / "cache", "--repair", config)
    assert result.exit_code == 0, result.output
    assert "other bytes than before" not in result.output
    assert f"What was bad lies in {tmp_path / 'cache' / 'quarantine'}" in result.output
    assert tar.read_bytes() == whole


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["verify", "nowhere"], "nowhere: neither a folder nor a config (.yaml)"),
        (["verify", "nowhere.yaml"], "nowhere.yaml: there is no such file"),
        (["verify", "."], ": no cache is there. Give the folder that `fluxfill preprocess CONFIG` wrote"),
    ],
)
def test_bad_input_is_a_message_and_exit_code_2(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr and "Traceback" not in result.output


def test_repair_by_the_config_of_another_cache_is_refused(config, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(config.read_text().replace(str(tmp_path / "cache"), str(tmp_path / "elsewhere")))
    result = run("verify", tmp_path / "cache", "--repair", other)
    assert result.exit_code == 2
    assert "--repair: data.cache is" in result.stderr
