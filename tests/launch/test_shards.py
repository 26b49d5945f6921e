import shutil
import subprocess
import sys
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


@pytest.mark.parametrize("command", ["verify", "show", "features"])
def test_help_has_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: fluxfill shards {command}" in result.output


def test_features_are_python_alone_that_a_file_can_hold(cache):
    result = run("features", cache.folder)
    assert result.exit_code == 0
    compile(result.output, "features.py", "exec")
    assert result.output.startswith("from datasets import ") and "features = Features({" in result.output


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


def test_a_repair_whose_output_is_a_file_draws_no_bars_of_libraries(config, cache, tmp_path):
    (tmp_path / "cache" / str(cache.table.path[0])).write_bytes(b"")
    command = [sys.executable, "-m", "launch", "shards", "verify", str(tmp_path / "cache"), "--repair", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Loading weights" not in done.stderr + done.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["verify", "nowhere"], "nowhere: neither a folder nor a config (.yaml)"),
        (["verify", "nowhere.yaml"], "nowhere.yaml: there is no such file"),
        (["show", "nowhere"], "nowhere: neither a folder nor a config (.yaml)"),
        (["show", "."], "no manifest.json, so no finished cache is there"),
        (["show", ".", "--out", "x.pdf"], "--out x.pdf: give a name that ends in .html or .png"),
        (
            ["show", ".", "--out", "no/x.png"],
            "/no (No such file or directory). Make the folder, change its permissions, or give another.",
        ),
        (["show", ".", "--out", "/proc/x.png"], "--out /proc/x.png: nothing can be written in /proc ("),
        (["show", ".", "--out", "folder.png"], "--out folder.png: is a folder. Give the name of a file."),
        (["verify", "."], ": no cache is there. Give the folder that `fluxfill preprocess CONFIG` wrote"),
    ],
)
def test_bad_input_is_a_message_and_exit_code_2(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr and "Traceback" not in result.output
    assert result.stdout == "", "no bar either"


def test_a_cache_at_a_url_is_looked_at_where_it_was_made(config, tmp_path):
    text = yaml.safe_load(config.read_text())
    text["data"] |= {"cache": "https://example.org/cache", "local_cache": str(tmp_path / "copies")}
    config.write_text(yaml.safe_dump(text))
    for command in ("verify", "show"):
        result = run(command, config)
        assert result.exit_code == 2
        assert "data.cache is https://example.org/cache. Give the folder that was copied there" in result.stderr


def test_repair_by_the_config_of_another_cache_is_refused(config, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(config.read_text().replace(str(tmp_path / "cache"), str(tmp_path / "elsewhere")))
    result = run("verify", tmp_path / "cache", "--repair", other)
    assert result.exit_code == 2
    assert "--repair: data.cache is" in result.stderr


def test_show_prints_tables_and_writes_pictures(config, cache, tmp_path):
    result = run("show", tmp_path / "cache", "--shard", cache.table.path[0])
    assert result.exit_code == 0, result.output
    assert f"stored for {cache.table.samples[0]} samples" in result.output
    for out, arguments in (("a.PNG", (config,)), ("a.html", (tmp_path / "cache", "--model", cache_model(config)))):
        result = run("show", *arguments, "--out", tmp_path / out, "--samples", 3)
        assert result.exit_code == 0, result.output
        assert f"{tmp_path / out}: 3 samples" in result.output
        assert (tmp_path / out).stat().st_size > 5000


def cache_model(config: Path) -> str:
    return yaml.safe_load(config.read_text())["model"]["base"]


def test_show_without_a_model_says_how_to_get_pictures(config, tmp_path):
    result = run("show", tmp_path / "cache", "--out", tmp_path / "a.png")
    assert result.exit_code == 2
    assert "give --model, or a config in the folder's place" in result.stderr
    assert not (tmp_path / "a.png").exists()
