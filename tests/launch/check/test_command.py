import json

import pytest
from typer.testing import CliRunner

from launch.cli import app


def run(*arguments: object):
    return CliRunner().invoke(app, ["check", *map(str, arguments)], env={"COLUMNS": "200"})


def test_a_right_config_ends_with_0_and_says_so(config_file):
    result = run(config_file, "--no-steps")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[-1] == f"{config_file}: all is right" and all(line.startswith("ok ") for line in lines[:-2])


def test_an_error_ends_with_2_and_a_warning_with_0(config_file, folder):
    (folder / "target" / "lonely.txt").write_text("a caption of nothing")
    result = run(config_file, "--no-steps")
    assert result.exit_code == 0 and result.stdout.endswith("1 warning\n")
    result = run(config_file, "--no-steps", "data.preprocess=never")
    assert result.exit_code == 2 and result.stdout.endswith("1 error, 1 warning\n")


def test_json_is_all_that_is_printed(config_file):
    result = run(config_file, "--no-steps", "--json", "train.stps=3")
    assert result.exit_code == 2 and json.loads(result.stdout)["errors"] == 1


def test_steps_are_not_tried_before_what_would_end_them_is_mended(config_file, folder):
    (folder / "model" / "tokenizer" / "merges.txt").unlink()
    result = run(config_file)
    assert result.exit_code == 2 and "skipped  steps" in result.stdout


@pytest.mark.parametrize("name, words", [("24GB", "of 24.0 GiB"), ("h100-80gb", "of 80.0 GiB")])
def test_a_gpu_is_taken_by_its_name(name, words, config_file):
    assert words in run(config_file, "--no-steps", "--gpu", name).stdout


def test_a_gpu_that_nobody_knows_is_bad_input(config_file):
    result = run(config_file, "--gpu", "abacus")
    assert result.exit_code == 2 and "there is no such GPU" in result.stderr


@pytest.mark.slow
def test_two_steps_are_the_last_line(config_file):
    result = run(config_file)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-3].startswith("ok       steps            2 steps, the last in ")
