"""What a supervisor makes of the run's folder: of what was there before it, and of a disk that fails."""

import errno
import json
import os
import sys
from pathlib import Path

import pytest

from configs.errors import InputError, StorageFailed
from configs.supervision import FAILED, STOPPED
from launch.supervise import Outcome, run_supervised

# Ends as out of memory, twice; has saved the same step as a checkpoint that was there, whose folder it sets aside.
_SAVES_AGAIN = """\
import json, os, pathlib
run = pathlib.Path(os.environ["FLUXFILL_OUTCOME"]).parent
with (run / "who").open("a") as who:
    who.write(WORD)
checkpoint = run / "checkpoints" / "step-00000005"
if WORD == "never ":
    checkpoint.rename(checkpoint.with_name("step-00000005.undone"))
    checkpoint.mkdir()
    (checkpoint / "COMPLETE").touch()
again = "out of memory" if WORD == "never " else None
told = {"code": 1 if again else 0, "reason": "so", "step": None, "again": again}
(run / "outcome.json").write_text(json.dumps(told))
"""


def test_a_run_that_began_anew_and_saved_the_step_of_an_old_checkpoint_goes_on_from_there(tmp_path: Path) -> None:
    """Started again as it was, it would refuse to begin anew over what it has saved itself."""
    old = tmp_path / "checkpoints" / "step-00000005"
    old.mkdir(parents=True)
    (old / "COMPLETE").touch()
    os.utime(old / "COMPLETE", (1, 1))
    first, then = ([sys.executable, "-c", f"WORD = {word!r}\n{_SAVES_AGAIN}"] for word in ("never ", "auto "))
    outcome_file = tmp_path / "outcome.json"
    variables = {"FLUXFILL_OUTCOME": str(outcome_file)}
    outcome = run_supervised(first, variables, outcome_file, restarts_after=("out of memory",), once_saved=then)
    assert (outcome.code, (tmp_path / "who").read_text()) == (0, "never auto ")


def refuse(*_: object, **__: object) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize(
    "code, expected",
    [
        ('open(PATH, \'w\').write(\'{"code": 75, "reason": "stopped", "step": 4}\')', (STOPPED, "stopped")),
        ("raise SystemExit(1)", (FAILED, "the launcher ended with code 1 and the trainer left no outcome")),
        ("raise SystemExit(75)", (STOPPED, "stopped by a signal before the trainer could say where; it goes on")),
    ],
)
def test_how_a_run_ended_is_told_where_its_checkpoints_cannot_be_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, expected: tuple[int, str]
) -> None:
    monkeypatch.setattr("launch.supervise.newest_save", refuse)
    outcome_file = tmp_path / "outcome.json"
    outcome = run_supervised([sys.executable, "-c", f"PATH = {str(outcome_file)!r}\n{code}"], {}, outcome_file)
    assert outcome.code == expected[0] and outcome.reason.startswith(expected[1])


@pytest.mark.parametrize("number, error", [(errno.EIO, StorageFailed), (errno.EACCES, InputError)])
def test_an_outcome_that_cannot_be_removed_is_not_taken_for_the_next_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[InputError]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    outcome_file = tmp_path / "outcome.json"
    told = json.dumps({"code": 1, "reason": "does not fit", "step": None, "again": "out of memory"})
    starts = f"open({str(tmp_path / 'starts')!r}, 'a').write('x')"
    command = [sys.executable, "-c", f"{starts}; open({str(outcome_file)!r}, 'w').write({told!r})"]
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refuse)
        with pytest.raises(error, match=r"outcome\.json: cannot be removed"):
            run_supervised(command, {}, outcome_file)
        assert not (tmp_path / "starts").exists()
        outcome = run_supervised(command, {}, outcome_file, is_alone=False, restarts_after=("out of memory",))
    assert outcome.code == FAILED and "does not fit. It cannot start again: " in outcome.reason
    assert (tmp_path / "starts").read_text() == "x"
    assert isinstance(outcome, Outcome)


@pytest.mark.parametrize("fails", ["", "n0: does not fit", "n0: of yesterday"])
def test_one_of_several_machines_stops_when_another_has_failed_now_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """Its ranks would wait for the others' until their collectives give up. The outcome of an earlier start is there
    until the first machine has removed it, and may say the same."""
    monkeypatch.setattr("launch.supervise._LOOK_SECONDS", 0.1)
    outcome_file = tmp_path / "outcome.json"
    outcome_file.write_text(json.dumps({"code": 1, "reason": "n0: of yesterday", "step": None}))
    now = json.dumps({"code": 1, "reason": fails, "step": None})
    code = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\ntime.sleep(1)\n"
    renamed = f"import os, sys\nopen(sys.argv[1] + '.new', 'w').write({now!r})\n"
    code += f"{renamed}os.replace(sys.argv[1] + '.new', sys.argv[1])\ntime.sleep(600)\n" if fails else ""
    command = [sys.executable, "-c", code, str(outcome_file)]
    ended = run_supervised(command, {}, outcome_file, is_alone=False, stop_after_failure=0.1, restarts_after=())
    assert ended.reason == (fails or "finished")


def test_the_end_of_an_earlier_start_is_not_that_of_a_machine_whose_others_never_came(tmp_path: Path) -> None:
    """The first machine removes it, when it starts."""
    outcome_file = tmp_path / "outcome.json"
    outcome_file.write_text(json.dumps({"code": 0, "reason": "done", "step": 100}))
    command = [sys.executable, "-c", "raise SystemExit(1)"]
    ended = run_supervised(command, {}, outcome_file, is_alone=False, stop_after_failure=30.0)
    assert ended.code == FAILED and "left no outcome" in ended.reason
