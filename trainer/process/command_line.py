"""The outside of a training process: its command line, its exit code, and outcome.json for who started it.

Imports nothing heavy: what is wrong with a config is said before ten seconds of imports.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

from configs.errors import InputError, StorageFailed
from configs.library_warnings import quiet_libraries
from configs.loading import load_config
from configs.schema import Config
from data.storage.atomic_write import write_text_atomically
from trainer.process.failed_ranks import leave_when_another_rank_fails

FAILED = 1
BAD_INPUT = 2
STOPPED = 75  # on purpose; the same command line goes on

_MAIN_SPEAKS_FIRST_SECONDS = 1.0

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
    """Do `work` and write outcome.json {code, reason, step}: the step that it reached, or how the first rank failed
    that did. What others say after it (a connection that was closed) follows from it.

    `accelerate launch` turns every exit code into 1; whoever needs the real one reads it there. Work that returns None
    (a check) has no outcome unless it fails. Returns the code: 0 done, 1 storage failed, 2 bad input, 75 stopped on
    purpose; anything else is raised on, with its traceback, after it was written.
    """
    path = _outcome_file()
    if _rank() == 0 and path is not None:
        path.unlink(missing_ok=True)  # of an earlier start; should this process be killed, there is none
    if path is not None and os.environ.get("WORLD_SIZE", "1") != "1":
        leave_when_another_rank_fails(partial(_tells_of_failure, path))
    try:
        step = work()
    except InputError as error:
        code = FAILED if isinstance(error, StorageFailed) else BAD_INPUT
        if _rank() != 0:
            time.sleep(_MAIN_SPEAKS_FIRST_SECONDS)  # what all ranks find wrong is said once, by rank 0
        if _write_failure(path, code, str(error)) or _rank() == 0:
            colour, end = ("\033[31m", "\033[0m") if sys.stderr.isatty() else ("", "")
            print(f"{colour}{_who()}{error}{end}", file=sys.stderr)
        return code
    except Stopped as stopped:
        if _rank() == 0:
            _write_outcome(path, STOPPED, str(stopped), stopped.step)
            print(stopped)
        return STOPPED
    except SystemExit:  # --help
        raise
    except BaseException as error:
        _write_failure(path, FAILED, f"{type(error).__name__}: {error}")
        raise
    if step is not None and _rank() == 0:
        _write_outcome(path, 0, "done", step)
    return 0


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _who() -> str:
    """Begins what a rank says that is not expected to speak."""
    return f"rank {_rank()}: " if _rank() else ""


def _write_outcome(path: Path | None, code: int, reason: str, step: int | None) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, json.dumps({"code": code, "reason": reason, "step": step}) + "\n")


def _write_failure(path: Path | None, code: int, reason: str) -> bool:
    """Write how this rank failed, unless another did before; returns whether it was written."""
    if path is None:
        return False
    own = path.with_name(f"{path.name}.{_rank()}")
    _write_outcome(own, code, f"{_who()}{reason}", None)
    try:
        os.link(own, path)  # the one way to name a whole file that fails if the name is taken, also on NFS
    except FileExistsError:
        return False
    except OSError:  # a filesystem without links: of two ranks that fail at the same moment, the last is heard
        if path.exists():
            return False
        own.replace(path)
    finally:
        own.unlink(missing_ok=True)
    return True


def _tells_of_failure(path: Path) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["code"] not in (0, STOPPED)
    except (OSError, ValueError):
        return False


def _outcome_file() -> Path | None:
    """$FLUXFILL_OUTCOME, else in the run's folder; None if neither is known."""
    if asked := os.environ.get("FLUXFILL_OUTCOME"):
        return Path(asked)
    try:
        return read_command_line().config.run.folder / "outcome.json"
    except InputError:
        return None
