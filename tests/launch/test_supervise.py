import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from configs.schema import EngineName
from launch.command import render_command, render_environment
from launch.supervise import Outcome, run_supervised, run_workers

# Says that it runs, waits for signals for a while, notes each, and leaves an outcome once one has come.
TRAINER = """\
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(os.environ["FOLDER"])
got = []
for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"):
    signal.signal(getattr(signal, name), lambda number, frame: got.append(signal.Signals(number).name))
rank = os.environ.get("RANK", "0")
(folder / f"ready.{rank}").touch()
deadline = time.monotonic() + 60
while not got and time.monotonic() < deadline:
    time.sleep(0.02)
time.sleep(1)  # a save
(folder / f"got.{rank}").write_text(" ".join(got))
if rank == "0":
    outcome = {"code": 75, "reason": "stopped by " + got[0], "step": 12}
    pathlib.Path(os.environ["FLUXFILL_OUTCOME"]).write_text(json.dumps(outcome))
sys.exit(75)
"""


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"{paths} did not appear"
        time.sleep(0.02)


def run_code(code: str, tmp_path: Path) -> Outcome:
    outcome_file = tmp_path / "outcome.json"
    variables = {"FLUXFILL_OUTCOME": str(outcome_file), "FOLDER": str(tmp_path)}
    return run_supervised([sys.executable, "-c", code], variables, outcome_file)


def send_when_ready(folder: Path, *numbers: int, ranks: int = 1) -> threading.Thread:
    """Signals to this very process, once the trainer runs."""

    def send() -> None:
        wait_for(*(folder / f"ready.{rank}" for rank in range(ranks)))
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.2)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_code_comes_from_the_outcome_not_from_the_launcher(tmp_path: Path) -> None:
    told = {"code": 3, "reason": "another job's folder", "step": None}
    code = f"import os; open(os.environ['FLUXFILL_OUTCOME'], 'w').write({json.dumps(told)!r}); raise SystemExit(1)"
    assert run_code(code, tmp_path) == Outcome(3, "another job's folder", None)


def test_without_an_outcome_a_failure_is_1_and_success_0(tmp_path: Path) -> None:
    assert run_code("raise SystemExit(9)", tmp_path).code == 1
    assert run_code("pass", tmp_path).code == 0


def test_outcome_of_an_earlier_run_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / "outcome.json").write_text('{"code": 75, "reason": "old", "step": 1}')
    assert run_code("raise SystemExit(9)", tmp_path).code == 1


@pytest.mark.parametrize("half", ["", '{"code": 7', '{"code": 75}', "[]"])
def test_half_an_outcome_is_none(half: str, tmp_path: Path) -> None:
    code = f"import os; open(os.environ['FLUXFILL_OUTCOME'], 'w').write({half!r}); raise SystemExit(1)"
    assert run_code(code, tmp_path).code == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_first_stop_signal_reaches_the_trainer_and_later_ones_do_not(number: signal.Signals, tmp_path: Path) -> None:
    sender = send_when_ready(tmp_path, number, signal.SIGTERM, signal.SIGINT)
    assert run_code(TRAINER, tmp_path) == Outcome(75, f"stopped by {number.name}", 12)
    sender.join()
    assert (tmp_path / "got.0").read_text() == number.name


def test_stop_before_the_trainer_could_speak_is_resumable(tmp_path: Path) -> None:
    code = "import os, pathlib, time; pathlib.Path(os.environ['FOLDER'], 'ready.0').touch(); time.sleep(60)"
    sender = send_when_ready(tmp_path, signal.SIGUSR1)
    outcome = run_code(code, tmp_path)
    sender.join()
    assert outcome.code == 75 and "SIGUSR1" in outcome.reason


def test_own_signal_handlers_are_back_afterwards(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    run_code("pass", tmp_path)
    assert signal.getsignal(signal.SIGINT) is before


def test_trainer_is_told_to_stop_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    variables = {"FLUXFILL_OUTCOME": str(tmp_path / "outcome.json"), "FOLDER": str(tmp_path)}
    code = (
        "import sys, pathlib; from launch.supervise import run_supervised; "
        f"outcome_file = pathlib.Path({str(tmp_path)!r}, 'outcome.json'); "
        f"run_supervised([sys.executable, {str(script)!r}], {variables!r}, outcome_file)"
    )
    supervisor = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    wait_for(tmp_path / "ready.0")
    supervisor.kill()
    supervisor.wait()
    wait_for(tmp_path / "got.0")
    assert (tmp_path / "got.0").read_text() == "SIGTERM"


@pytest.mark.parametrize("engine, count", [("single", 1), ("ddp", 2)])
def test_accelerate_passes_usr1_to_every_rank_and_waits_for_the_save(
    engine: EngineName, count: int, tmp_path: Path
) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    command = render_command("unused.yaml", [], engine, count, port=0)
    command[command.index("--config") - 1] = str(script)
    outcome_file = tmp_path / "outcome.json"
    variables = render_environment(outcome_file, count, 1, {}) | {"FOLDER": str(tmp_path)}
    sender = send_when_ready(tmp_path, signal.SIGUSR1, ranks=count)
    assert run_supervised(command, variables, outcome_file) == Outcome(75, "stopped by SIGUSR1", 12)
    sender.join()
    assert [(tmp_path / f"got.{rank}").read_text() for rank in range(count)] == ["SIGUSR1"] * count


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
    code = "import os, pathlib, time; pathlib.Path(os.environ['READY']).touch(); time.sleep(60)"
    sender = send_when_ready(tmp_path, number, ranks=2)
    began = time.monotonic()
    outcome = run_workers(
        [sys.executable, "-c", code], [{"READY": str(tmp_path / f"ready.{rank}")} for rank in range(2)]
    )
    sender.join()
    assert outcome == Outcome(75, f"stopped by {number.name}; the same command goes on")
    assert time.monotonic() - began < 55
