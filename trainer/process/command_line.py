"""The trainer's command line, read and checked before ten seconds of imports."""

import argparse
import os
from pathlib import Path
from typing import NamedTuple, NoReturn

from configs.errors import InputError
from configs.gpu_allocator import allocator_settings
from configs.library_warnings import quiet_libraries
from configs.loading import load_config
from configs.schema import Config

_USAGE = """\
Three commands to begin with:
  fluxfill preprocess configs/fill_lora.yaml     encode the pictures once
  accelerate launch trainer/main.py --config configs/fill_lora.yaml
  make demo                                      the whole path on a small example, on a CPU"""


class CommandLine(NamedTuple):
    """config: validated.  resume: "auto" (the newest intact checkpoint, if any), "never", or a checkpoint's folder."""

    config: Config
    resume: str


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"trainer/main.py: {message}\n{_USAGE}")


def read_command_line(arguments: list[str] | None = None) -> CommandLine:
    """--config FILE [--resume auto|never|FOLDER] [key=value ...]. Raises InputError if it or the config is wrong."""
    parser = _Parser(prog="accelerate launch trainer/main.py", description="Train FLUX.1-Fill as a config says.")
    parser.add_argument("--config", type=Path, help="the run's YAML file")
    parser.add_argument("--resume", default="auto", help="auto (default), never, or a checkpoint's folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.lr=5e-5")
    options = parser.parse_intermixed_args(arguments)
    if options.config is None:
        raise InputError(f"trainer/main.py needs a config: --config CONFIG.yaml. {_USAGE}")
    return CommandLine(load_config(options.config, options.overrides), options.resume)


def check_command_line() -> None:
    """Raises InputError if the command line or the config is wrong. What torch has to find in the environment when it
    is imported is there from then on."""
    quiet_libraries()
    os.environ.update(allocator_settings(os.environ))  # by `fluxfill train` they are there already
    read_command_line()
