"""The outcome of a training process: exit code, outcome.json for its supervisor, the reason for its launcher.

`accelerate launch` turns every exit code into 1 and prints some forty lines of its own after the trainer's last one;
nothing here can keep those away. torch's launcher (several processes, or a --config_file of configs/engines/) ends
with a summary of the first failure, and quotes in it what that process left in $TORCHELASTIC_ERROR_FILE: so the reason
is among the last lines. accelerate's own launcher (one process, no config file) ends with a CalledProcessError, which
quotes nothing and which its option --quiet leaves out. `fluxfill train` says the reason once more, last.

Imports nothing heavy: it is in force before torch is imported.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from configs.errors import InputError, StorageFailed
from configs.supervision import BAD_INPUT, FAILED, STOPPED
from data.storage.atomic_write import write_text_atomically
from trainer.process.command_line import read_command_line
from trainer.process.failed_ranks import leave_when_another_rank_fails

_MAIN_SPEAKS_FIRST_SECONDS = 1.0


class Stopped(Exception):
    """The run was told to stop, saved, and can go on from `step`.  signal: what told this process; None: another."""

    def __init__(self, step: int, signal: str | None) -> None:
        super().__init__(f"stopped by {signal or 'a signal to another process'} after step {step}; resumable")
        self.step = step


def run_and_report(work: Callable[[], int | None]) -> int:
    """Do `work` and write outcome.json {code, reason, step}: the step that it reached, or how the first rank failed
    that did. What others say after it (a connection that was closed) follows from it.

    Work that returns None (a check) has no outcome unless it fails. Returns the code: 0 done, 1 storage failed, 2 bad
    input, 75 stopped on purpose; anything else is raised on, with its traceback, after it was written.
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
            _tell_launcher(str(error))
            colour, end = ("\033[31m", "\033[0m") if sys.stderr.isatty() else ("", "")
            print(f"{colour}{_who()}{error}{end}", file=sys.stderr)
        return code
    except Stopped as stopped:
        if _rank() == 0:
            _write_outcome(path, STOPPED, str(stopped), stopped.step)
            _tell_launcher(str(stopped))
            print(stopped)
        return STOPPED
    except SystemExit:  # --help
        raise
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        if _write_failure(path, FAILED, reason) or path is None:
            _tell_launcher(reason)
        raise
    if step is not None and _rank() == 0:
        _write_outcome(path, 0, "done", step)
    return 0


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _who() -> str:
    """Prefix of what a rank other than 0 says."""
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


def _tell_launcher(reason: str) -> None:
    """Leave the reason for the summary that torch's launcher ends with; without it that asks to "enable traceback"."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        told = {"message": {"message": reason, "extraInfo": {"timestamp": str(int(time.time()))}}}
        Path(file).write_text(json.dumps(told), encoding="utf-8")


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
