"""The outside of a training process: its command line, its exit code, and outcome.json for who started it.

Imports nothing heavy: what is wrong with a config is said before ten seconds of imports.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

from configs.errors import InputError
from configs.loading import load_config
from configs.schema import Config
from data.atomic_write import write_text_atomically
from data.library_noise import quiet_libraries

BAD_INPUT = 2
STOPPED = 75  # on purpose; the same command line goes on

_USAGE = """\
Three commands to begin with:
  fluxfill preprocess configs/fill_lora.yaml     encode the pictures once
  accelerate launch trainer/main.py --config configs/fill_lora.yaml
  make demo                                      the whole path on a small example, on a CPU"""


class Stopped(Exception):
    """The run was told to stop, saved, and can go on from `step`.  signal: what told this process; None: another."""

    def __init__(self, step: int, signal: str | None) -> None:
        super().__init__(f"stopped by {signal or 'a signal to another process'} after step {step}; resumable")
        self.step = step


class CommandLine(NamedTuple):
    """config: validated.  resume: "auto" (the newest whole checkpoint, if any), "never", or a checkpoint's folder."""

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
    """Raises InputError if the command line or the config is wrong."""
    quiet_libraries()
    read_command_line()


def run_and_report(work: Callable[[], int | None]) -> int:
    """Do `work` and write outcome.json {code, reason, step} on rank 0: how it failed, or the step that it reached.

    `accelerate launch` turns every exit code into 1; whoever needs the real one reads it there. Work that returns None
    (a check) has no outcome unless it fails. Returns the code: 0 done, 2 bad input, 75 stopped on purpose; anything
    else is raised on, with its traceback, after it was written.
    """
    if _is_main() and (old := _outcome_file()) is not None:
        old.unlink(missing_ok=True)  # of an earlier start; should this process be killed, there is none
    try:
        step = work()
    except InputError as error:
        _write_outcome(BAD_INPUT, str(error), None)
        if _is_main():
            colour, end = ("\033[31m", "\033[0m") if sys.stderr.isatty() else ("", "")
            print(f"{colour}{error}{end}", file=sys.stderr)
        return BAD_INPUT
    except Stopped as stopped:
        _write_outcome(STOPPED, str(stopped), stopped.step)
        if _is_main():
            print(stopped)
        return STOPPED
    except SystemExit:  # --help
        raise
    except BaseException as error:
        _write_outcome(1, f"{type(error).__name__}: {error}", None)
        raise
    if step is not None:
        _write_outcome(0, "done", step)
    return 0


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _write_outcome(code: int, reason: str, step: int | None) -> None:
    """To $FLUXFILL_OUTCOME, else the run's folder."""
    if _is_main() and (path := _outcome_file()) is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, json.dumps({"code": code, "reason": reason, "step": step}) + "\n")


def _outcome_file() -> Path | None:
    """None if nobody asked for it and the command line names no run either."""
    if asked := os.environ.get("FLUXFILL_OUTCOME"):
        return Path(asked)
    try:
        return read_command_line().config.run.folder / "outcome.json"
    except InputError:
        return None
