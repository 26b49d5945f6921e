import os
import sys
from pathlib import Path

import pytest

from configs.errors import InputError
from trainer.process.command_line import check_command_line, read_command_line

ROOT = Path(__file__).parents[3]


def test_config_overrides_and_resume_are_read_in_any_order(arguments):
    command = read_command_line([*arguments, "--resume", "never", "train.lr=5e-5"])
    assert (command.config.run.name, command.config.train.lr, command.resume) == ("test", 5e-5, "never")
    assert read_command_line(arguments).resume == "auto"


def test_accelerate_launch_alone_gives_torch_segments_that_grow(arguments, monkeypatch):
    """`fluxfill train` sets it for its processes; here it has to come before torch is imported."""
    monkeypatch.setattr(sys, "argv", ["main.py", *arguments])
    for settings, expected in (({}, "expandable_segments:True"), ({"PYTORCH_ALLOC_CONF": "own"}, "own")):
        environment = dict(settings)
        monkeypatch.setattr(os, "environ", environment)
        check_command_line()
        assert environment["PYTORCH_ALLOC_CONF"] == expected


def test_without_a_config_three_commands_are_told():
    with pytest.raises(InputError, match="needs a config: --config CONFIG") as refused:
        read_command_line([])
    commands = [line.strip() for line in str(refused.value).splitlines()[1:]]
    assert [command.split()[0] for command in commands] == ["fluxfill", "accelerate", "make"]
    for command in commands:
        configs = [word for word in command.split() if word.endswith(".yaml")]
        assert all((ROOT / name).is_file() for name in configs)


def test_an_unknown_option_is_bad_input(arguments):
    with pytest.raises(InputError, match="--learning-rate"):
        read_command_line([*arguments, "--learning-rate", "1"])


def test_a_wrong_key_is_bad_input(arguments):
    with pytest.raises(InputError, match=r"train\.lr"):
        read_command_line([*arguments, "train.learning_rate=1"])
