import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

# A rank that waits for others in the middle of a step: the handler runs, but the step does not end.
_WAITING = """
import sys, threading
import trainer.process.failed_ranks
from trainer.process.outcome import run_and_report
from trainer.process.stop_signals import install_stop_signals, stop_signal

trainer.process.failed_ranks.GRACE_SECONDS = 0.2
install_stop_signals()

def step():
    print("waiting", flush=True)
    if len(sys.argv) > 3:
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

    def start(*arguments):
        line = [sys.executable, "-c", _WAITING, "--config", str(ROOT / "configs" / "demo.yaml"), *arguments]
        process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "waiting\n"
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
    assert process.wait(timeout=20) == 1
    assert json.loads((tmp_path / "outcome.json").read_text())["code"] == 2


def test_without_a_failure_a_signal_ends_no_rank(start, tmp_path):
    """It may be saving: that takes minutes."""
    process = start("saves")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 0
    assert json.loads((tmp_path / "outcome.json").read_text()) == {"code": 0, "reason": "done", "step": 7}


def test_without_a_signal_a_failure_ends_no_rank(start, tmp_path):
    """The launcher decides: it may let the others finish."""
    process = start()
    write_outcome(tmp_path, 2)
    time.sleep(2.5)
    assert process.poll() is None
