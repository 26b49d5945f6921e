import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_group
from typer.testing import CliRunner

from configs.errors import AlreadyRunning, InputError, StorageFailed
from launch import command as launch_command
from launch.cli import COMMANDS, app

RECIPE = str(launch_command.REPO_ROOT / "configs" / "fill_lora.yaml")


@pytest.mark.parametrize("error, code", [(InputError, 2), (AlreadyRunning, 3), (StorageFailed, 1)])
def test_the_exit_code_is_that_of_the_error(
    monkeypatch: pytest.MonkeyPatch, error: type[InputError], code: int
) -> None:
    def fail() -> None:
        raise error("so")

    monkeypatch.setattr("launch.schema.schema", fail)
    ended = CliRunner().invoke(app, ["schema"])
    assert (ended.exit_code, ended.stderr) == (code, "so\n")


def resolve(name: str) -> Any:
    """The command that a word of the command line means."""
    program = get_group(app)
    return program.resolve_command(program.make_context("fluxfill", [name]), [name])[1]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_table_says_of_every_command_what_its_own_help_begins_with(name: str) -> None:
    command = resolve(name)
    assert " ".join(command.help.split("\n\n")[0].split()) == COMMANDS[name][1]
    assert all(word in CliRunner().invoke(app, [name, "--help"]).output for word in COMMANDS[name][1].split())


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS if hasattr(resolve(name), "commands"))])
def test_every_command_is_listed_by_a_whole_sentence(words: list[str]) -> None:
    listed = CliRunner().invoke(app, [*words, "--help"]).output.partition("Commands:\n")[2].splitlines()
    assert listed and [line for line in listed if not line.endswith(".") or line.endswith("...")] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_has_an_example(name: str) -> None:
    inner = getattr(resolve(name), "commands", {"": None})
    for words in ([name, *word.split()] for word in inner):
        result = CliRunner().invoke(app, [*words, "--help"])
        assert result.exit_code == 0
        assert f"Example: fluxfill {' '.join(words)}" in result.output


def test_help_lists_the_commands_in_the_tables_order_and_imports_none() -> None:
    code = "import atexit, sys; from launch.cli import main\n"
    code += "atexit.register(lambda: print(*sys.modules, file=sys.stderr)); sys.argv[1:] = ['--help']; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    listed = done.stdout.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in listed] == list(COMMANDS)
    assert all(COMMANDS[line.split()[0]][1].startswith(line[17:].strip()) for line in listed)
    loaded = set(done.stderr.split())
    assert "typer" in loaded
    assert not loaded & {"pydantic", "yaml", "rich", "numpy", *(place.split(":")[0] for place, _ in COMMANDS.values())}


@pytest.mark.parametrize(
    "typed, completed",
    [("pre", ["preprocess", "preflight"]), ("shards ", ["verify", "show", "features"]), ("plan --no", ["--nodes"])],
)
def test_names_and_options_are_completed(typed: str, completed: list[str]) -> None:
    words = f"fluxfill {typed}"
    asked = {"_FLUXFILL_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    result = CliRunner().invoke(app, [], prog_name="fluxfill", env=asked)
    assert result.stdout.split() == completed


def test_a_misspelt_command_is_told_the_nearest() -> None:
    result = CliRunner().invoke(app, ["tran"])
    assert result.exit_code == 2 and "Did you mean 'train'?" in result.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["schema", "--out", "/nowhere/at/all.json"], "--out /nowhere/at/all.json: cannot be written"),
        (["train", "nowhere.yaml"], "nowhere.yaml: there is no such file"),
        (["preprocess", "nowhere.yaml"], "nowhere.yaml: there is no such file"),
        (["train", RECIPE, "train.lr=fast", "train.stps=3"], "train.stps is 3, but there is no such key"),
        (
            ["train", RECIPE, "parallel.engine=single", "--num-processes", "2"],
            "parallel.engine is single, which is one process, but 2",
        ),
    ],
)
def test_bad_input_is_a_message_and_exit_code_2(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert message in result.stderr and "Traceback" not in result.output and "\x1b" not in result.output


def test_command_line_starts_without_torch_from_a_folder_with_data_and_configs(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "configs").mkdir()
    code = "import sys, launch.cli; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(launch_command.REPO_ROOT)}
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=False).returncode == 0
