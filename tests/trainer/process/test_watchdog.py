"""Processes that hang: one by one here, two ranks of a run in tests/trainer/test_hangs.py."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.patience import PATIENCE
from trainer.process.watchdog import _Watchdog

ROOT = Path(__file__).parents[3]

# The limit is fifty ticks of the watchdog, which come by the clock, or one by one when the process says so (`given`).
_HANGING = """
import queue, sys, threading, time
from pathlib import Path
from trainer.process import watchdog
from trainer.process.watchdog import beat, longer, watch_for_hangs

watchdog._TICK_SECONDS, watchdog._TO_WRITE_SECONDS = 0.02, 120
folder, what = Path(sys.argv[1]), sys.argv[2]

class Given:
    def __init__(self):
        self.ticks = queue.Queue()
    def wait(self, seconds):
        ended = self.ticks.get()
        self.ticks.task_done()
        return ended
    def set(self):
        self.ticks.put(True)
    def give(self, number):
        for _ in range(number):
            self.ticks.put(False)
        self.ticks.join()

def wait_for_a_rank_that_hangs():
    threading.Event().wait()

with watch_for_hangs(folder, None if what == "off" else 1.0 / 60):
    if what == "hangs":
        for _ in range(3):
            beat("step")
        wait_for_a_rank_that_hangs()
    if what == "off":
        beat("step")
        time.sleep(2)
    else:
        given = watchdog._watchdog._ended = Given()
        for _ in range(10):
            beat("step")
            given.give(45)
        with longer():
            given.give(250)
        beat("step")
    if what == "asked":
        print("ready", flush=True)
        sys.stdin.readline()
"""


def start(folder: Path, what: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", _HANGING, str(folder), what],
        cwd=ROOT,
        env={**os.environ, "FLUXFILL_OUTCOME": str(folder / "outcome.json")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.fault(17, "a process without a sign of life")
def test_a_process_without_a_beat_leaves_its_stacks_and_ends(tmp_path):
    process = start(tmp_path, "hangs")
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert (outcome["code"], outcome["again"]) == (1, "hang")
    assert "guard.step_timeout_minutes" in outcome["reason"] and outcome["reason"] in said
    assert "wait_for_a_rank_that_hangs" in (tmp_path / "stacks" / "rank-00000.txt").read_text()


@pytest.mark.parametrize("what", ["goes on", "off"])
def test_a_process_that_does_something_or_may_wait_is_left_alone(tmp_path, what):
    process = start(tmp_path, what)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    assert list(tmp_path.iterdir()) == []


def test_at_no_moment_does_a_shorter_bound_hold_for_what_was_waited_under_a_longer_one(tmp_path):
    moments = []

    class Watched(_Watchdog):
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if name in ("_allowed", "_beats") and hasattr(self, "_thread"):
                moments.append((self._beats, self._allowed))

    watchdog = Watched(tmp_path, 0, 10.0, None, None)
    watchdog.beat("step")  # begins, with LONGER
    moments.clear()
    watchdog.beat("step")
    with watchdog.longer():
        pass
    watchdog.end()
    assert moments == [(2, 60.0), (2, 10.0), (2, 60.0), (3, 60.0), (3, 10.0)]


def test_a_run_that_fails_by_itself_leaves_no_empty_stacks(tmp_path, monkeypatch):
    from trainer.process.watchdog import watch_for_hangs

    unlink = Path.unlink

    def unlink_closed(path):
        assert path not in [file.resolve() for file in Path("/proc/self/fd").iterdir()], "NFS would leave .nfs*"
        unlink(path)

    monkeypatch.setattr(Path, "unlink", unlink_closed)
    with pytest.raises(ValueError, match="boom"), watch_for_hangs(tmp_path, 60.0):
        raise ValueError("boom")
    assert list(tmp_path.iterdir()) == []


def test_stacks_can_be_asked_for(tmp_path):
    process = start(tmp_path, "asked")
    assert "ready\n" in process.stdout
    process.send_signal(signal.SIGQUIT)
    stacks = tmp_path / "stacks" / "rank-00000.txt"
    deadline = time.monotonic() + PATIENCE
    while "most recent call first" not in stacks.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.communicate("\n", timeout=PATIENCE)
    assert process.returncode == 0
