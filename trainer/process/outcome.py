"""The outcome of a training process: exit code, outcome.json for its supervisor, the reason for its launcher.

`accelerate launch` turns every exit code into 1 and prints some forty lines of its own after the trainer's last one.
launch/without_traceback.py keeps those away under `fluxfill train`; nothing here can. torch's launcher (several
processes, or a --config_file of configs/engines/) ends with a summary of the first failure, and quotes in it what that
process left in $TORCHELASTIC_ERROR_FILE: so the reason is among the last lines. accelerate's own launcher (one process,
no config file) ends with a CalledProcessError, which quotes nothing and which its option --quiet leaves out. So the
reason is said once more, last: by `fluxfill train`, or where that is not above them as last_word.py does.

Imports nothing heavy: it is in force before torch is imported.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from configs.errors import AlreadyRunning, InputError, os_errors_named
from configs.supervision import FAILED, STOPPED, SUPERVISOR, exit_code
from configs.webhook import notify_end
from data.storage.atomic_write import write_text_atomically
from data.storage.run_lock import VARIABLE
from trainer.process.command_line import read_command_line
from trainer.process.disk_room import told_if_not_written, with_room
from trainer.process.failed_ranks import leave_when_another_rank_fails
from trainer.process.json_lines import write_waiting_lines
from trainer.process.last_word import repeat_behind_launcher
from trainer.process.launcher import has_lost_ranks
from trainer.process.run_owner import disown, may_write, own
from trainer.process.starts import note_end
from trainer.process.stop_signals import has_stop_signals

_MAIN_SPEAKS_FIRST_SECONDS = 10.0  # at the most; on a busy machine ranks start seconds apart
# By the name of an error: torch's, which is not imported here.
_ADVICE = {"OutOfMemoryError": " What helps: docs/troubleshooting.md#out-of-memory"}


class Stopped(Exception):
    """The run was told to stop after `step`, and can go on from the one that is saved.

    signal: what told this process; None: another.  saved: the step of the newest checkpoint.
    """

    def __init__(self, step: int, signal: str | None, saved: int) -> None:
        at = f"step {saved}" if saved else "the start"
        how = "; resumable" if saved == step else f", which was not saved; resumable from {at}"
        super().__init__(f"stopped by {signal or 'a signal to another process'} after step {step}{how}")
        self.step = step


class AlreadyDone(Exception):
    """Nothing is left to do: the run has reached its last step, `step`, in an earlier start."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(reason)
        self.step = step


class StartAgain(Exception):
    """This process cannot go on, but the same command can, from the last checkpoint.  why: in a word or two, for the
    supervisor: "out of memory" when the next start will take less at once, "hang"."""

    def __init__(self, reason: str, *, why: str) -> None:
        super().__init__(reason)
        self.why = why


def run_and_report(work: Callable[[], int | None]) -> int:
    """Do `work` in a run folder that is this run's own, and write outcome.json {code, reason, step, again}: the step
    that it reached, or how the first rank failed that did. What others say after it (a connection that was closed)
    follows from it.  again: why the same command is to be started once more, at once; null: it is not.

    Work that returns None (a check) has no outcome unless it fails. Returns the code: 0 done, 1 storage failed, 2 bad
    input, 3 the folder is another start's, whose outcome it is then, 75 stopped on purpose; anything else is raised on,
    with its traceback, after it was written.
    """
    folder, path, has_ended = _run_folder(), outcome_file(), True
    try:
        if path is not None and has_stop_signals():  # before rank 0 may have to wait for an owner
            word = partial(_stop_before_training, path)
            # Rank 0 says nothing where it has lost the folder: the outcome is another start's.
            leave_when_another_rank_fails(lambda: _tells_of_failure(path) or not may_write(), word)
        is_first = folder is None or own(folder, is_main=_rank() == 0)
        # Of an earlier start; should this process be killed, there is none. A supervisor has removed it before, and
        # what is there now is what another node has said of this start.
        if path is not None and is_first and _rank() == 0 and VARIABLE not in os.environ:
            _remove(path)
        code = _do_and_report(work, path)
        has_ended = code is not None
        return code or 0
    except InputError as error:  # of the folder, or of an outcome that could not be written
        _tell_failure(str(error))
        return exit_code(error)
    finally:
        if has_ended and _rank() == 0:
            if may_write():
                write_waiting_lines()
            disown()


def _do_and_report(work: Callable[[], int | None], path: Path | None) -> int | None:
    """The code, as above; None for work without an end. Raises AlreadyRunning if the folder was lost."""
    try:
        step = work()
    except AlreadyRunning:
        raise
    except InputError as error:
        code = exit_code(error)
        if _rank() != 0:  # what all ranks find wrong is said once, by rank 0
            _wait_for_main(lambda: path is None or _tells_of_failure(path))
        if _is_first_to_fail(path, code, str(error)) or _rank() == 0:
            _tell_failure(str(error), path)
        else:
            _leave_for_summary(str(error))  # this rank may be the first that the launcher sees end
        return code
    except Stopped as stopped:
        if _rank() == 0:
            with told_if_not_written("outcome"):
                _write_outcome(path, STOPPED, str(stopped), stopped.step)
            _tell_launcher(str(stopped))
            if not _is_repeated(str(stopped), path):
                print(stopped)
        return STOPPED
    except AlreadyDone as done:
        if _rank() == 0:
            with told_if_not_written("outcome"):
                _write_outcome(path, 0, "done", done.step)
            print(done)
        return 0
    except StartAgain as error:
        if _is_first_to_fail(path, FAILED, str(error), again=error.why) or path is None:
            _tell_launcher(str(error))
            if not _is_repeated(str(error), path):
                print(f"{_who()}{error}", file=sys.stderr)
        return FAILED
    except SystemExit:  # --help
        raise
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}{_ADVICE.get(type(error).__name__, '')}"
        if _is_first_to_fail(path, FAILED, reason) or path is None:
            _tell_launcher(reason)
        raise
    if step is None:
        return None
    if _rank() == 0:
        _write_outcome(path, 0, "done", step)
    return 0


def _stop_before_training(path: Path, signal: str) -> None:
    """Word of an end before there was anything to save: of a stop, or of a rank that was killed and left none itself.
    A rank that failed was the first to speak."""
    if _rank() != 0:
        _wait_for_main(path.exists)  # which counts the ranks that are left
        return
    is_told = False
    with suppress(OSError):  # of a disk that does not answer
        is_told = path.exists() and may_write()
    if not is_told:
        reason = f"stopped by {signal} before the first step; the same command starts again"
        if is_gone := has_lost_ranks():
            reason = "another rank was killed before the first step and left no word, perhaps as the memory was full"
        with told_if_not_written(f"{_who()}outcome"):
            if is_gone:
                write_failure(path, FAILED, reason)
            else:
                _write_outcome(path, STOPPED, reason, None)
        _tell_launcher(reason)
        if not _is_repeated(reason, path):
            print(reason, flush=True)
    disown()


def _tell_failure(reason: str, path: Path | None = None) -> None:
    """path: of the outcome, where it was to be written."""
    _tell_launcher(reason)
    if _is_repeated(reason, path):
        return
    colour, end = ("\033[31m", "\033[0m") if sys.stderr.isatty() else ("", "")
    print(f"{colour}{_who()}{reason}{end}", file=sys.stderr)


def _is_repeated(reason: str, path: Path | None) -> bool:
    """Whether a supervisor will say this once the launcher has ended: it stands in the outcome."""
    if SUPERVISOR not in os.environ or path is None:
        return False
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["reason"]).endswith(reason)
    except (OSError, ValueError, KeyError):
        return False


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _wait_for_main(has_spoken: Callable[[], bool]) -> None:
    """Wait until rank 0, or whoever was first, has told how it ended; not long, for it may have nothing to tell."""
    deadline = time.monotonic() + _MAIN_SPEAKS_FIRST_SECONDS
    while not has_spoken() and time.monotonic() < deadline:
        time.sleep(0.1)


def _who() -> str:
    """Prefix of what a rank other than 0 says."""
    return f"rank {_rank()}: " if _rank() else ""


def _remove(path: Path) -> None:
    with os_errors_named(path, "removed"):
        path.unlink(missing_ok=True)


def _write_outcome(path: Path | None, code: int, reason: str, step: int | None, again: str | None = None) -> None:
    if path is not None and may_write():
        told = {"code": code, "reason": reason, "step": step, "again": again}
        with os_errors_named(path, "written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with_room(path.parent, lambda: write_text_atomically(path, json.dumps(told) + "\n"))
        if path == outcome_file():  # not a rank's own, which may not be the first
            _tell_end(code=code, reason=reason, step=step)


def write_failure(path: Path | None, code: int, reason: str, again: str | None = None) -> bool:
    """Write how this rank failed, unless another did before; returns whether it was written."""
    if path is None or not may_write():
        return False
    of_rank = path.with_name(f"{path.name}.{_rank()}")
    _write_outcome(of_rank, code, f"{_who()}{reason}", None, again)
    try:
        os.link(of_rank, path)  # the one way to name a whole file that fails if the name is taken, also on NFS
    except FileExistsError:
        return False
    except OSError:  # a filesystem without links: of two ranks that fail at the same moment, the last is heard
        if path.exists():
            return False
        of_rank.replace(path)
    finally:
        of_rank.unlink(missing_ok=True)
    _tell_end(code=code, reason=f"{_who()}{reason}", step=None)
    return True


def _tell_end(*, code: int, reason: str, step: int | None) -> None:
    """Note the outcome with the start that it is of; and a notice of it, unless a supervisor sends that."""
    folder = _run_folder()
    note_end(folder, code=code, reason=reason, step=step)
    if folder is not None and SUPERVISOR not in os.environ:
        notify_end(folder.name, code=code, reason=reason, step=step)


def _is_first_to_fail(path: Path | None, code: int, reason: str, again: str | None = None) -> bool:
    """`write_failure`; true too where the disk takes no word, of this rank or of another: then what is printed is all
    that tells."""
    with told_if_not_written(f"{_who()}outcome"):
        return write_failure(path, code, reason, again)
    return True


def _tell_launcher(reason: str) -> None:
    """Leave the reason for the summary that torch's launcher ends with, and for the line below it."""
    repeat_behind_launcher(reason)
    _leave_for_summary(reason)


def _leave_for_summary(reason: str) -> None:
    """Without it the summary asks to "enable traceback"."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        told = {"message": {"message": reason, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with suppress(OSError):  # of a disk that is full
            Path(file).write_text(json.dumps(told), encoding="utf-8")


def _tells_of_failure(path: Path) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["code"] not in (0, STOPPED)
    except (OSError, ValueError):
        return False


def outcome_file() -> Path | None:
    """$FLUXFILL_OUTCOME, else in the run's folder; None if neither is known."""
    if asked := os.environ.get("FLUXFILL_OUTCOME"):
        return Path(asked)
    folder = _run_folder()
    return folder and folder / "outcome.json"


def _run_folder() -> Path | None:
    """None if the config is wrong: nobody knows it then."""
    try:
        return read_command_line().config.run.folder
    except InputError:
        return None
