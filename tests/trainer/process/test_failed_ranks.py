import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from configs.supervision import STOP_SIGNALS, SUPERVISOR, list_children_of
from data.storage.run_lock import VARIABLE, own_run_folder
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[3]

# A rank that waits for others in the middle of a step: the handler runs, but the step does not end.
_WAITING = """
import os, sys, threading
from pathlib import Path
import trainer.process.failed_ranks, trainer.process.outcome
from trainer.process.launcher import save_before_the_end
from trainer.process.outcome import run_and_report
from trainer.process.stop_signals import install_stop_signals, stop_signal

trainer.process.failed_ranks.GRACE_SECONDS = 0.2
trainer.process.outcome._MAIN_SPEAKS_FIRST_SECONDS = 200
install_stop_signals()

def step():
    if not os.environ["PHASE"].startswith("starts"):
        save_before_the_end()
    print("waiting", flush=True)
    if os.environ["PHASE"] == "starts, one is killed":
        Path(f"ready.{os.environ['RANK']}").touch()
        if os.environ["RANK"] == "1":
            while not Path("ready.0").exists():
                threading.Event().wait(0.05)
            os.kill(os.getpid(), 9)
    if os.environ["PHASE"] == "saves":
        while stop_signal() is None:
            threading.Event().wait(0.01)
        threading.Event().wait(3)
        return 7
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()

sys.exit(run_and_report(step))
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("FLUXFILL_OUTCOME", str(tmp_path / "outcome.json"))
    started = []

    def start(phase="waits"):
        line = [sys.executable, "-c", _WAITING, "--config", str(ROOT / "configs" / "demo.yaml"), f"run.dir={tmp_path}"]
        environment = {**os.environ, "PHASE": phase}
        process = subprocess.Popen(line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert "waiting\n" in process.stdout
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def write_outcome(folder, code):
    (folder / "outcome.json").write_text(json.dumps({"code": code, "reason": "rank 1: a.tar: damaged.", "step": None}))


def test_a_rank_that_waits_for_a_failed_one_leaves(start, tmp_path):
    process = start()
    write_outcome(tmp_path, 2)
    process.send_signal(signal.SIGTERM)  # as the launcher does once a rank has ended
    assert process.wait(timeout=PATIENCE) == 1
    assert json.loads((tmp_path / "outcome.json").read_text())["code"] == 2


def test_a_rank_that_waits_for_one_that_has_lost_the_folder_leaves(start, tmp_path, monkeypatch):
    """Rank 0 ended without a word, as another start has the folder."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv(VARIABLE, "0" * 16)
    monkeypatch.setenv("MASTER_PORT", "29501")
    process = start()
    with own_run_folder(tmp_path / "demo", {}, supervisor="the next start"):
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=PATIENCE) == 1
    assert not (tmp_path / "outcome.json").exists()


def test_without_a_failure_a_signal_ends_no_rank(start, tmp_path):
    """It may be saving: that takes minutes."""
    process = start("saves")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE) == 0
    assert json.loads((tmp_path / "outcome.json").read_text()) == {
        "code": 0,
        "reason": "done",
        "step": 7,
        "again": None,
    }


def test_without_a_signal_a_failure_ends_no_rank(start, tmp_path):
    """The launcher decides: it may let the others finish."""
    process = start()
    write_outcome(tmp_path, 2)
    time.sleep(2.5)
    assert process.poll() is None


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_rank_that_has_nothing_to_save_yet_leaves_at_once(start, tmp_path, number):
    """It may wait for others in init_process_group, where no handler runs."""
    process = start("starts")
    process.send_signal(number)
    assert process.wait(timeout=PATIENCE) == 75
    reason = f"stopped by {number.name} before the first step; the same command starts again"
    assert json.loads((tmp_path / "outcome.json").read_text()) == {
        "code": 75,
        "reason": reason,
        "step": None,
        "again": None,
    }
    assert process.stdout.read() == f"{reason}\n"


def test_what_a_supervisor_will_say_of_such_a_stop_is_said_once(start, tmp_path, monkeypatch):
    monkeypatch.setenv(SUPERVISOR, str(os.getppid()))  # a launcher is between a supervisor and its ranks
    process = start("starts")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE) == 75
    assert "stopped by SIGTERM" in json.loads((tmp_path / "outcome.json").read_text())["reason"]
    assert process.stdout.read() == ""


def test_a_rank_that_can_leave_no_word_leaves_all_the_same(start, tmp_path, monkeypatch):
    monkeypatch.setenv("FLUXFILL_OUTCOME", str(tmp_path / "asked" / "outcome.json"))
    process = start("starts")
    (tmp_path / "asked").touch()  # no folder can be made there
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE) == 75
    assert "stopped by SIGTERM before the first step" in process.stdout.read()


def test_of_a_failure_while_all_start_the_first_word_stays(start, tmp_path):
    process = start("starts")
    write_outcome(tmp_path, 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE) == 75
    assert json.loads((tmp_path / "outcome.json").read_text())["code"] == 2
    assert process.stdout.read() == "", "it was not stopped: a rank had failed"


def test_a_rank_whose_parent_is_no_launcher_counts_no_others(start, tmp_path, monkeypatch):
    """A script around each rank has one child."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    process = start("starts")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE) == 75
    assert json.loads((tmp_path / "outcome.json").read_text())["code"] == 75


@pytest.fixture
def start_launcher(tmp_path):
    """Starts two ranks below torch's launcher; none of them outlives the test."""
    started = []

    def start(phase):
        (tmp_path / "rank.py").write_text(_WAITING)
        line = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "rank.py"]
        line += ["--config", str(ROOT / "configs" / "demo.yaml"), f"run.dir={tmp_path}"]
        environment = {**os.environ, "PHASE": phase, "PYTHONPATH": str(ROOT)}
        environment["FLUXFILL_OUTCOME"] = str(tmp_path / "outcome.json")
        started.append(subprocess.Popen(line, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for launcher in started:
        if launcher.poll() is None:
            for process in (*list_children_of(launcher.pid), launcher.pid):
                with suppress(ProcessLookupError):  # it has just ended by itself
                    os.kill(process, signal.SIGKILL)
        launcher.communicate()


def test_a_rank_that_is_killed_while_all_start_is_a_failure_and_no_stop(start_launcher, tmp_path):
    """The launcher tells rank 0 by the signal of a stop; nobody had asked for one."""
    launched = start_launcher("starts, one is killed")
    said, _ = launched.communicate(timeout=PATIENCE)
    told = json.loads((tmp_path / "outcome.json").read_text())
    assert (launched.returncode, told["code"]) == (1, 1)
    assert told["reason"].startswith("another rank was killed before the first step")
    assert "stopped by" not in said


def test_ranks_that_are_all_told_to_stop_while_they_start_were_stopped(start_launcher, tmp_path):
    launched = start_launcher("starts")
    assert all("waiting\n" in launched.stdout for _ in range(2))
    launched.send_signal(signal.SIGTERM)
    launched.communicate(timeout=PATIENCE)
    assert json.loads((tmp_path / "outcome.json").read_text())["code"] == 75
