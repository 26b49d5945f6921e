"""The outside of a training process: its command line, its exit code, and outcome.json for who started it.

Imports nothing heavy: what is wrong with a config is said before ten seconds of imports.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from configs.errors import InputError
from configs.loading import load_config
from configs.schema import Config
from data.library_noise import quiet_libraries

BAD_INPUT = 2

_USAGE = """\
trainer/main.py needs a config: --config CONFIG.yaml. Three commands to begin with:
  fluxfill preprocess configs/fill_lora.yaml     encode the pictures once
  accelerate launch trainer/main.py --config configs/fill_lora.yaml
  make demo                                      the whole path on a small example, on a CPU"""


class CommandLine(NamedTuple):
    """config: validated.  resume: "auto" (the newest whole checkpoint, if any), "never", or a checkpoint's folder."""

    config: Config
    resume: str


def read_command_line(arguments: list[str] | None = None) -> CommandLine:
    """--config FILE [--resume auto|never|FOLDER] [key=value ...]. Raises InputError if it or the config is wrong."""
    parser = argparse.ArgumentParser(
        prog="accelerate launch trainer/main.py", description="Train FLUX.1-Fill as a config says."
    )
    parser.add_argument("--config", type=Path, help="the run's YAML file")
    parser.add_argument("--resume", default="auto", help="auto (default), never, or a checkpoint's folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.lr=5e-5")
    options = parser.parse_args(arguments)
    if options.config is None:
        raise InputError(_USAGE)
    return CommandLine(load_config(options.config, options.overrides), options.resume)


def check_command_line() -> int:
    """Raises InputError if the command line or the config is wrong. Returns step 0."""
    quiet_libraries()
    read_command_line()
    return 0


def run_and_report(work: Callable[[], int]) -> int:
    """Run `work`, which returns the step it reached, and write outcome.json {code, reason, step} on rank 0.

    `accelerate launch` turns every exit code into 1; whoever needs the real one reads it there. Returns the code: 0
    done, 2 bad input; anything else is raised on, with its traceback, after it was written.
    """
    try:
        step = work()
    except InputError as error:
        _write_outcome(BAD_INPUT, str(error), None)
        if _is_main():
            colour, end = ("\033[31m", "\033[0m") if sys.stderr.isatty() else ("", "")
            print(f"{colour}{error}{end}", file=sys.stderr)
        return BAD_INPUT
    except BaseException as error:
        _write_outcome(1, f"{type(error).__name__}: {error}", None)
        raise
    _write_outcome(0, "done", step)
    return 0


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _write_outcome(code: int, reason: str, step: int | None) -> None:
    """To $FLUXFILL_OUTCOME, if whoever started the run asked for it."""
    path = os.environ.get("FLUXFILL_OUTCOME")
    if path and _is_main():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps({"code": code, "reason": reason, "step": step}) + "\n", encoding="utf-8")
