import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from configs.schema import EngineName
from launch import supervise
from launch.command import render_command, render_environment
from launch.supervise import Outcome, run_supervised, run_workers
from tests.patience import wait_until

# Says that it runs, and that it has heard a signal; saves until the test lets it go on, notes each signal until then,
# and leaves an outcome.
TRAINER = """\
import json, os, pathlib, signal, sys, time
folder, got = pathlib.Path(os.environ["FOLDER"]), []
signal.alarm(1700)  # it ends with a test that does not
for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"):
    signal.signal(getattr(signal, name), lambda number, frame: got.append(signal.Signals(number).name))
rank = os.environ.get("RANK", "0")
def tell(name, text):  # whole or not there
    (folder / f"{name}.{rank}.new").write_text(text)
    (folder / f"{name}.{rank}.new").rename(folder / f"{name}.{rank}")
tell("ready", str(os.getppid()))
while not got: time.sleep(0.02)
tell("heard", got[0])
while not (folder / "go").exists(): time.sleep(0.02)
tell("got", " ".join(got))
if rank == "0":
    outcome = {"code": 75, "reason": "stopped by " + got[0], "step": 12}
    pathlib.Path(os.environ["FLUXFILL_OUTCOME"]).write_text(json.dumps(outcome))
sys.exit(75)
"""


def wait_for(*paths: Path) -> None:
    wait_until(lambda: all(path.exists() for path in paths), f"{paths} did not appear")


def run_code(code: str, tmp_path: Path) -> Outcome:
    outcome_file = tmp_path / "outcome.json"
    variables = {"FLUXFILL_OUTCOME": str(outcome_file), "FOLDER": str(tmp_path)}
    return run_supervised([sys.executable, "-c", code], variables, outcome_file)


def send_when_ready(folder: Path, first: int, *later: int, ranks: int = 1) -> threading.Thread:
    """Signals to this very process, once the trainer runs; the later ones when it has heard the first. It goes on when
    all are sent: without a supervisor they would end the tests."""

    def send() -> None:
        wait_for(*(folder / f"ready.{rank}" for rank in range(ranks)))
        os.kill(os.getpid(), first)
        for number in later:
            wait_for(folder / "heard.0")
            os.kill(os.getpid(), number)
        (folder / "go").touch()

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_code_comes_from_the_outcome_not_from_the_launcher(tmp_path: Path) -> None:
    told = {"code": 2, "reason": "bad input", "step": None}
    code = f"import os; open(os.environ['FLUXFILL_OUTCOME'], 'w').write({json.dumps(told)!r}); raise SystemExit(1)"
    assert run_code(code, tmp_path) == Outcome(2, "bad input", None)


def test_without_an_outcome_a_failure_is_1_and_success_0(tmp_path: Path) -> None:
    assert run_code("raise SystemExit(9)", tmp_path).code == 1
    assert run_code("pass", tmp_path).code == 0


def test_outcome_of_an_earlier_run_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / "outcome.json").write_text('{"code": 75, "reason": "old", "step": 1}')
    assert run_code("raise SystemExit(9)", tmp_path).code == 1


# Ends each start as the next line of the file `ends` says, and counts the starts.
_ENDS = """\
import json, os, pathlib
folder = pathlib.Path(os.environ["FOLDER"])
starts = folder / "starts"
number = len(starts.read_text()) if starts.exists() else 0
starts.write_text("x" * (number + 1))
again, saved = json.loads(os.environ["ENDS"])[number]
if saved:
    (folder / "checkpoints" / f"step-{saved:08d}").mkdir(parents=True)
    (folder / "checkpoints" / f"step-{saved:08d}" / "COMPLETE").touch()
told = {"code": 1 if again else 0, "reason": f"end {number}", "step": None, "again": again}
pathlib.Path(os.environ["FLUXFILL_OUTCOME"]).write_text(json.dumps(told))
"""


@pytest.mark.fault(24, "a run that ends the same way after every restart")
@pytest.mark.parametrize(
    "ends, starts, code",
    [
        ([["out of memory", 0]] * 5 + [[None, 0]], 6, 0),
        ([["hang", 0], ["hang", 0], [None, 0]], 3, 0),
        ([["hang", 0]] * 9, 3, 1),
        ([["hang", 0], ["hang", 0], ["hang", 7], ["hang", 0], ["hang", 0], ["hang", 0]], 6, 1),
        ([["another", 0]], 1, 1),
    ],
)
def test_it_starts_again_while_that_helps(tmp_path: Path, ends: list, starts: int, code: int) -> None:
    outcome_file = tmp_path / "outcome.json"
    variables = {"FLUXFILL_OUTCOME": str(outcome_file), "FOLDER": str(tmp_path), "ENDS": json.dumps(ends)}
    command = [sys.executable, "-c", _ENDS]
    outcome = run_supervised(command, variables, outcome_file, restarts_after=("out of memory", "hang"))
    assert (outcome.code, len((tmp_path / "starts").read_text())) == (code, starts)
    assert outcome.reason.startswith(f"end {starts - 1}")
    if starts == 3 and code:
        assert outcome.reason.endswith("3 starts in a row came no further than 0")


@pytest.mark.fault(24, "a run that finds the same not to fit at every start")
def test_a_want_of_memory_that_is_told_the_same_again_is_not_tried_again(tmp_path: Path) -> None:
    """Each start takes less at once; one that does not would be followed by others for ever. A save is progress."""
    code = _ENDS.replace('f"end {number}"', "ends[number]").replace(
        "again, saved = json", 'ends = ["8", "4", "4", "4"]\nagain, saved = json'
    )
    steps = [["out of memory", saved] for saved in (0, 0, 7, 0)]
    outcome_file = tmp_path / "outcome.json"
    variables = {"FLUXFILL_OUTCOME": str(outcome_file), "FOLDER": str(tmp_path), "ENDS": json.dumps(steps)}
    outcome = run_supervised([sys.executable, "-c", code], variables, outcome_file, restarts_after=("out of memory",))
    assert outcome == Outcome(1, "4. The start before ended the same way", None, "out of memory")
    assert (tmp_path / "starts").read_text() == "xxxx"


def test_once_it_has_saved_it_goes_on_from_there(tmp_path: Path) -> None:
    """Not from the checkpoint, or the beginning, that the first start was told."""
    ends = [["out of memory", 0], ["out of memory", 5], [None, 0]]
    variables = {"FLUXFILL_OUTCOME": str(tmp_path / "outcome.json"), "FOLDER": str(tmp_path), "ENDS": json.dumps(ends)}
    first, then = (
        [sys.executable, "-c", f"import os; open(os.environ['FOLDER'] + '/who', 'a').write({word!r})\n{_ENDS}"]
        for word in ("never ", "auto ")
    )
    outcome_file = tmp_path / "outcome.json"
    run_supervised(first, variables, outcome_file, restarts_after=("out of memory",), once_saved=then)
    assert (tmp_path / "who").read_text() == "never never auto "


def test_a_run_that_went_back_is_supervised_like_any_other(tmp_path: Path) -> None:
    """The checkpoints that it has set aside are complete, and no progress."""
    for name in ("step-00000004", "step-00000006.undone"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "COMPLETE").touch()
    ends = [["hang", saved] for saved in (0, 0, 5, 0, 0, 0)]
    outcome_file = tmp_path / "outcome.json"
    variables = {"FLUXFILL_OUTCOME": str(outcome_file), "FOLDER": str(tmp_path), "ENDS": json.dumps(ends)}
    outcome = run_supervised([sys.executable, "-c", _ENDS], variables, outcome_file, restarts_after=("hang",))
    assert outcome.reason == "end 5. 3 starts in a row came no further than 5"


def test_it_starts_again_for_nothing_that_was_not_asked_for(tmp_path: Path) -> None:
    told = {"code": 1, "reason": "once", "step": None, "again": "hang"}
    code = f"import os; open(os.environ['FLUXFILL_OUTCOME'], 'w').write({json.dumps(told)!r})"
    assert run_code(code, tmp_path) == Outcome(1, "once", None, "hang")


@pytest.mark.parametrize("stopped", [False, True])
def test_a_stop_that_nobody_asked_for_after_the_kernel_killed_is_a_failure(
    stopped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher ends the other ranks by TERM once one is gone."""
    killed = iter([0, 1, 1])
    monkeypatch.setattr("launch.supervise.count_oom_kills", lambda: next(killed))
    told = {"code": 75, "reason": "stopped by SIGTERM", "step": None}
    ready = "open(os.environ['FOLDER'] + '/ready.0', 'w'); time.sleep(600)"
    code = f"import os, time; open(os.environ['FLUXFILL_OUTCOME'], 'w').write({json.dumps(told)!r})"
    sender = send_when_ready(tmp_path, signal.SIGTERM) if stopped else None
    outcome = run_code(f"{code}; {ready if stopped else 'raise SystemExit(1)'}", tmp_path)
    if sender is not None:
        sender.join()
    assert outcome.code == (75 if stopped else 1)
    assert outcome.reason.startswith("stopped by SIGTERM" if stopped else "the kernel killed 1 process(es)")
    assert json.loads((tmp_path / "outcome.json").read_text())["code"] == outcome.code


def test_what_the_kernel_killed_before_this_start_is_no_reason_for_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = iter([0, 1, 1])
    monkeypatch.setattr("launch.supervise.count_oom_kills", lambda: next(killed))
    outcome_file, code = tmp_path / "outcome.json", _ENDS.replace("1 if again else 0", "1")
    variables = {"FLUXFILL_OUTCOME": str(outcome_file), "FOLDER": str(tmp_path)}
    variables["ENDS"] = json.dumps([["out of memory", 0], [None, 0]])
    ended = run_supervised([sys.executable, "-c", code], variables, outcome_file, restarts_after=("out of memory",))
    assert ended == Outcome(1, "end 1")


@pytest.mark.parametrize("lasts", [False, True])
def test_a_failure_that_was_taken_back_stops_nobody(
    lasts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two looks at the outcome; one that lasts is acted on."""
    monkeypatch.setattr("launch.supervise._LOOK_SECONDS", 0.1)
    looks: list[Outcome | None] = [Outcome(1, "of another start"), None, None]
    real = supervise._read_outcome

    def look(file: Path) -> Outcome | None:
        if not looks or lasts:
            (tmp_path / "go").touch()
        return Outcome(1, "so") if lasts else looks.pop(0) if looks else real(file)

    monkeypatch.setattr(supervise, "_read_outcome", look)
    code = "import os, pathlib, signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
    code += "while not (pathlib.Path(os.environ['FOLDER'], 'go')).exists() or os.environ['LASTS']: time.sleep(0.05)"
    variables = {"FOLDER": str(tmp_path), "LASTS": "x" if lasts else ""}
    outcome_file = tmp_path / "outcome.json"
    ended = run_supervised([sys.executable, "-c", code], variables, outcome_file, stop_after_failure=0.1)
    assert ended.code == (1 if lasts else 0)


@pytest.mark.parametrize("other", [None, {"code": 75, "reason": "stopped by SIGTERM", "step": 4}])
def test_a_node_whose_ranks_died_without_a_word_says_so_to_the_others(other: dict | None, tmp_path: Path) -> None:
    outcome_file = tmp_path / "outcome.json"
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    if other is not None:
        outcome_file.write_text(json.dumps(other))
    run_supervised([sys.executable, "-c", code], {}, outcome_file, is_alone=False)
    told = json.loads(outcome_file.read_text())
    assert told["code"] == (1 if other is None else 75)
    assert "the launcher ended with code -9" in told["reason"] or other == told


def test_what_cannot_be_sent_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On Windows Ctrl-C has reached the trainer by itself: it is only waited for."""
    monkeypatch.setattr("launch.supervise.SIGNALS_CAN_BE_SENT", False)
    sender = send_when_ready(tmp_path, signal.SIGINT)
    code = "import os, time; folder = os.environ['FOLDER']; open(folder + '/ready.0', 'w')\n"
    code += "while not os.path.exists(folder + '/go'): time.sleep(0.02)\nraise SystemExit(4)"
    outcome = run_code(code, tmp_path)
    sender.join()
    assert outcome.code == 75 and outcome.reason.startswith("stopped by SIGINT before the trainer could say where")


@pytest.mark.parametrize("half", ["", '{"code": 7', '{"code": 75}', "[]"])
def test_half_an_outcome_is_none(half: str, tmp_path: Path) -> None:
    code = f"import os; open(os.environ['FLUXFILL_OUTCOME'], 'w').write({half!r}); raise SystemExit(1)"
    assert run_code(code, tmp_path).code == 1


@pytest.mark.fault(3, "two signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_first_stop_signal_reaches_the_trainer_and_later_ones_do_not(number: signal.Signals, tmp_path: Path) -> None:
    sender = send_when_ready(tmp_path, number, signal.SIGTERM, signal.SIGINT)
    assert run_code(TRAINER, tmp_path) == Outcome(75, f"stopped by {number.name}", 12)
    sender.join()
    assert (tmp_path / "got.0").read_text() == number.name


def test_stop_before_the_trainer_could_speak_is_resumable(tmp_path: Path) -> None:
    code = "import os, pathlib, time; pathlib.Path(os.environ['FOLDER'], 'ready.0').touch(); time.sleep(600)"
    sender = send_when_ready(tmp_path, signal.SIGUSR1)
    outcome = run_code(code, tmp_path)
    sender.join()
    assert outcome.code == 75 and "SIGUSR1" in outcome.reason


def test_own_signal_handlers_are_back_afterwards(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    run_code("pass", tmp_path)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.fault(2, "kill -9 of `fluxfill train`")
def test_trainer_is_told_to_stop_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    variables = {"FLUXFILL_OUTCOME": str(tmp_path / "outcome.json"), "FOLDER": str(tmp_path)}
    code = (
        "import sys, pathlib; from launch.supervise import run_supervised; "
        f"outcome_file = pathlib.Path({str(tmp_path)!r}, 'outcome.json'); "
        f"run_supervised([sys.executable, '-c', {TRAINER!r}], {variables!r}, outcome_file)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    supervisor = subprocess.Popen([sys.executable, "-c", code], env=environment)
    wait_for(tmp_path / "ready.0")
    (tmp_path / "go").touch()
    supervisor.kill()
    supervisor.wait()
    wait_for(tmp_path / "got.0")
    assert (tmp_path / "got.0").read_text() == "SIGTERM"


def launched_trainer(engine: EngineName, count: int, tmp_path: Path) -> tuple[list[str], dict[str, str], Path]:
    """What starts TRAINER under accelerate's launcher: command, variables and outcome file of `run_supervised`."""
    script, outcome_file = tmp_path / "trainer.py", tmp_path / "outcome.json"
    script.write_text(TRAINER)
    command = render_command("unused.yaml", [], engine, count, port=0)
    command[command.index("--config") - 1] = str(script)
    variables = render_environment(outcome_file, count, 1, {}) | {"FOLDER": str(tmp_path)}
    variables["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # it warns of a host name that it cannot look up
    return command, variables, outcome_file


@pytest.mark.fault(3, "USR1 to `accelerate launch`, which hands it to every rank")
@pytest.mark.parametrize("engine, count", [("single", 1), ("ddp", 2)])
def test_accelerate_passes_usr1_to_every_rank_and_waits_for_the_save(
    engine: EngineName, count: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = launched_trainer(engine, count, tmp_path)
    sender = send_when_ready(tmp_path, signal.SIGUSR1, ranks=count)
    assert run_supervised(*given) == Outcome(75, "stopped by SIGUSR1", 12)
    sender.join()
    assert [(tmp_path / f"got.{rank}").read_text() for rank in range(count)] == ["SIGUSR1"] * count
    assert capfd.readouterr().err == "", "the last line is the supervisor's"


def test_ranks_that_the_launcher_left_behind_are_waited_for(tmp_path: Path) -> None:
    """torch's launcher leaves at the third signal, and at a time limit SLURM may send that many."""
    given = launched_trainer("ddp", 2, tmp_path)

    def send() -> None:
        wait_for(tmp_path / "ready.0", tmp_path / "ready.1")
        launcher = int((tmp_path / "ready.0").read_text())
        with suppress(ProcessLookupError):
            while True:
                os.kill(launcher, signal.SIGTERM)
                time.sleep(0.5)  # of signals that come at once it hears one
        (tmp_path / "go").touch()

    sender = threading.Thread(target=send)
    sender.start()
    assert run_supervised(*given) == Outcome(75, "stopped by SIGTERM", 12)
    sender.join()
    assert all((tmp_path / f"got.{rank}").exists() for rank in range(2))


def test_what_is_printed_goes_to_a_file_where_one_is_given(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    command = [sys.executable, "-c", "import sys; print('here'); print('there', file=sys.stderr)"]
    with (tmp_path / "log").open("wb") as output:
        run_supervised(command, {}, tmp_path / "outcome.json", output=output)
        run_workers(command, [{}], output=output)
    assert sorted((tmp_path / "log").read_text().split()) == ["here", "here", "there", "there"]
    assert capfd.readouterr() == ("", "")


def run_codes(*codes: int) -> int:
    """The exit code of workers that end so."""
    command = [sys.executable, "-c", "import os, sys; sys.exit(int(os.environ['CODE']))"]
    return run_workers(command, [{"CODE": str(code)} for code in codes]).code


def test_work_is_done_when_one_of_its_workers_says_so_and_else_ends_with_their_code() -> None:
    assert run_codes(0, 0) == 0
    assert run_codes(9, 0) == 0
    assert run_codes(9, 2) == 2
    assert run_codes(9, 9) == 1


def test_what_workers_say_alike_is_printed_once(capfd: pytest.CaptureFixture) -> None:
    says = "for line in ('no mask', 'disk full', os.environ['NAME'], 'no mask'): print(line, file=sys.stderr)"
    code = f"import os, sys\n{says}\nsys.exit(2)"
    assert run_workers([sys.executable, "-c", code], [{"NAME": name} for name in "abc"]).code == 2
    lines = capfd.readouterr().err.splitlines()
    assert sorted(lines) == ["a", "b", "c", "disk full", "no mask", "no mask"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_stop_signal_ends_all_workers_at_once_and_is_resumable(number: signal.Signals, tmp_path: Path) -> None:
    code = "import os, pathlib, time; pathlib.Path(os.environ['READY']).touch(); time.sleep(600)"
    sender = send_when_ready(tmp_path, number, ranks=2)
    environments = [{"READY": str(tmp_path / f"ready.{rank}")} for rank in range(2)]
    outcome = run_workers([sys.executable, "-c", code], environments)
    sender.join()
    assert outcome == Outcome(75, f"stopped by {number.name}; the same command goes on")


@pytest.mark.fault(4, "a trainer that is killed behind its stop signal, in mid-save")
def test_a_trainer_that_was_killed_while_it_saved_goes_on_from_the_checkpoint_before(tmp_path: Path) -> None:
    """A grace period shorter than a save: SIGKILL, and no outcome."""
    (tmp_path / "checkpoints" / "step-00000250").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000250" / "COMPLETE").touch()
    (tmp_path / "checkpoints" / "step-00000263.staging").mkdir()
    code = (
        "import os, pathlib, signal, time\n"
        "got = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: got.append(1))\n"
        "pathlib.Path(os.environ['FOLDER'], 'ready.0').touch()\n"
        "while not got: time.sleep(0.02)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    thread = send_when_ready(tmp_path, signal.SIGTERM)
    outcome = run_code(code, tmp_path)
    thread.join()
    assert outcome.code == 75
    assert outcome.reason == (
        "stopped by SIGTERM before the trainer could say where; it goes on from step 250, its newest checkpoint"
    )
